"""Which format each tensor of the artifact gets, and what must be said about it (core)."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from client.convert.source import SourceTensor
from shoal.artifact.inventory import Slot
from shoal.quant import Format

FOUR_BIT = (Format.Q4_0, Format.Q4_1, Format.Q4_K, Format.Q4_T, Format.Q3_T)  # or fewer


@dataclass(slots=True)
class FormatChooser:
    """Answers for each tensor, and remembers where the answer is not what was asked for.

    requested: --quant, or None for the source's own.
    """

    requested: Format | None
    _remarks: Counter[str] = field(default_factory=Counter)

    def dense(self, slot: Slot, tensor: SourceTensor) -> Format:
        """Return the format of a vector or matrix."""
        if slot.always_f32:
            return Format.F32
        wanted = self.requested
        if wanted is None:
            return tensor.require_format(slot.name)
        if slot.is_vocabulary and wanted in FOUR_BIT:
            return Format.Q8_0
        what = slot.name.split(".", 2)[-1]  # without the layer: one remark for all of them
        return self._remarked(what, (tensor,), self._fitting(what, wanted, slot.shape[-1]))

    def ffn(self, part: str, tensors: Iterable[SourceTensor], cols: int) -> Format:
        """Return the one format of a layer's gate and up, or of its down, with `cols` columns."""
        tensors = tuple(tensors)
        if self.requested is None:
            return self._common(part, tensors)
        what = f"experts' {part}"
        return self._remarked(what, tensors, self._fitting(what, self.requested, cols))

    def notes(self) -> tuple[str, ...]:
        """Return what the manifest says about choices that were not asked for."""
        return tuple(
            f"{text} ({count} tensors)" if count > 1 else text
            for text, count in sorted(self._remarks.items())
        )

    def _fitting(self, what: str, wanted: Format, cols: int) -> Format:
        if wanted is Format.Q4_K and cols % wanted.block_cols:
            self._remarks[
                f"{what}: q8_0 instead of {wanted.label}: {cols} columns are not a multiple of"
                f" {wanted.block_cols}"
            ] += 1
            return Format.Q8_0
        return wanted

    def _common(self, part: str, tensors: tuple[SourceTensor, ...]) -> Format:
        formats = {tensor.require_format(f"an expert's {part}") for tensor in tensors}
        if len(formats) == 1:
            return formats.pop()
        common = Format.F32 if all(fmt.is_float for fmt in formats) else Format.Q8_0
        labels = ", ".join(fmt.label for fmt in sorted(formats))
        self._remarks[f"experts' {part}: {common.label}, for the source mixes {labels}"] += 1
        return common

    def _remarked(self, what: str, tensors: Iterable[SourceTensor], chosen: Format) -> Format:
        for tensor in tensors:  # quantising floats is what was asked for; anything else is said
            is_float = tensor.format is not None and tensor.format.is_float
            if tensor.format is not chosen and not is_float:
                self._remarks[f"{what}: transcoded from {tensor.type_name} to {chosen.label}"] += 1
        return chosen


def down_format(chooser_requested: Format | None, own: Iterable[Format], ffn_dim: int) -> Format:
    """Return the format that decides where a dense FFN may be cut: the coarsest block of down's."""
    if chooser_requested is None:
        return max(own, key=lambda fmt: fmt.block_cols)
    if chooser_requested is Format.Q4_K and ffn_dim % chooser_requested.block_cols:
        return Format.Q8_0
    return chooser_requested
