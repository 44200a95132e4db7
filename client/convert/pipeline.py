"""Convert: plan every tensor, then stream them into the artifact, one expert at a time.

    open source -> family's spec -> formats -> FFN slices -> tensor plan -> dense.safetensors
    -> experts/layer-NNN.safetensors (and the layer's grid) -> pregate.safetensors -> text files
    -> manifest

Memory: one packed expert, a few MiB of rows in flight; the checkpoint is mapped, not read.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from client.convert.formats import FormatChooser, down_format
from client.convert.pack import pack_ffn, packed_rows
from client.convert.source import F32, U8, Source, SourceTensor, TextFiles
from client.convert.text_files import encode_generation_config
from client.convert.transcode import Region
from shoal import ops
from shoal.artifact import (
    DenseTensor,
    ExpertLayer,
    Kind,
    Manifest,
    Slot,
    TextFile,
    Weights,
    dense_slots,
)
from shoal.artifact.canonical import digest
from shoal.artifact.grid import GridProbe
from shoal.artifact.layout import dense_header, expert_header
from shoal.artifact.manifest import DENSE_FILE, PAGE, expert_file, slot_bytes
from shoal.artifact.pregate import PregatePlan, plan_pregates
from shoal.artifact.pregate_build import write_pregates
from shoal.artifact.writer import ArtifactWriter, new_artifact
from shoal.errors import CorruptArtifact, UnsupportedModel, UsageError
from shoal.families import FfnRule, TensorRule, plan_tensors, slice_ffn
from shoal.model_spec import ModelSpec
from shoal.quant import Format, round_up

Progress = Callable[[int], None]  # bytes of the artifact written since the last call


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked of convert."""

    quant: Format | None = None
    ffn_slices: int | None = None
    tokenizer: Path | None = None  # a folder that replaces the checkpoint's own
    allow_no_tokenizer: bool = False
    force: bool = False


@dataclass(frozen=True, slots=True)
class ConvertPlan:
    """Everything decided before the first byte is written."""

    source: Source
    options: Options
    spec: ModelSpec
    slots: tuple[Slot, ...]
    dense_formats: dict[str, tuple[Format, Format | None]]
    rules: dict[str, TensorRule]
    dense_ffns: dict[str, FfnRule]
    experts: dict[int, tuple[FfnRule, ...]]  # layer -> its experts, in order
    weights: dict[int, Weights]
    texts: dict[str, bytes]
    notes: tuple[str, ...]

    @property
    def pregates(self) -> tuple[PregatePlan, ...]:
        schemes = {layer: weights.scheme for layer, weights in self.weights.items()}
        return plan_pregates(self.spec, schemes)

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that will be written."""
        dense = sum(slot_bytes(slot, *self.dense_formats[slot.name]) for slot in self.slots)
        dense += sum(plan.num_bytes for plan in self.pregates)
        return dense + sum(
            len(rules) * round_up(self.weights[layer].num_bytes, PAGE)
            for layer, rules in self.experts.items()
        )


def make_plan(source: Source, options: Options) -> ConvertPlan:
    """Decide the artifact's tensors, formats and slices.

    Raises: UnsupportedModel for a model, a tensor or a request that cannot be served; names it.
    """
    tensors = source.tensors
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    naming = source.naming.to_huggingface
    spec = source.family.spec(source.config)
    if options.ffn_slices is not None and any(layer.router is not None for layer in spec.layers):
        raise UsageError(
            f"--ffn-slices: {source.path} is no dense model, it has experts of its own"
        )
    is_interleaved = source.naming.rope_interleaved
    uncut = plan_tensors(source.family, spec, shapes, naming, is_interleaved)
    widths = max(layer.ffn_dim for layer in spec.layers)
    own = [tensors[rule.down.tensor].format or Format.Q8_0 for rule in uncut.ffns]
    block = down_format(options.quant, own, widths).block_cols
    spec = slice_ffn(spec, block, options.ffn_slices)
    plan = plan_tensors(source.family, spec, shapes, naming, is_interleaved)
    rules = {rule.name: rule for rule in plan.tensors}
    dense_ffns = {rule.name: rule for rule in plan.ffns if rule.index is None}
    experts: dict[int, list[FfnRule]] = {}
    for rule in plan.ffns:
        if rule.index is not None:
            experts.setdefault(rule.layer, []).append(rule)
    chooser = FormatChooser(options.quant)
    slots = dense_slots(spec)
    dense_formats = {
        slot.name: _dense_formats(chooser, slot, rules, dense_ffns, tensors) for slot in slots
    }
    weights = {
        layer: _weights(chooser, spec, layer, group, tensors) for layer, group in experts.items()
    }
    text_files = source.text_files(options.tokenizer)
    notes = chooser.notes() + tuple(f"{name}: not needed, left out" for name in plan.ignored)
    return ConvertPlan(
        source=source,
        options=options,
        spec=spec,
        slots=slots,
        dense_formats=dense_formats,
        rules=rules,
        dense_ffns=dense_ffns,
        experts={layer: tuple(group) for layer, group in experts.items()},
        weights=weights,
        texts=_texts(text_files, options),
        notes=notes,
    )


def convert(plan: ConvertPlan, out: Path, progress: Progress) -> tuple[Manifest, tuple[Path, ...]]:
    """Write the artifact; return its manifest and what leftovers of killed runs were removed.

    Raises:
        NonFiniteWeights, CorruptArtifact, UnsupportedModel: the checkpoint is at fault.
        CannotWrite, UsageError: the place is.
    """
    needed = plan.num_bytes + sum(map(len, plan.texts.values()))
    with new_artifact(out, force=plan.options.force, needed_bytes=needed) as writer:
        dense = _write_dense(plan, writer, progress)
        layers = tuple(
            _write_experts(plan, layer, writer, progress) for layer in sorted(plan.experts)
        )
        pregates = write_pregates(plan.pregates, lambda name: _values(plan, name), writer, progress)
        files = tuple(_write_text(writer, name, data) for name, data in plan.texts.items())
        manifest = Manifest(
            spec=plan.spec,
            source=_printable(plan.source.path.name),
            notes=plan.notes,
            dense=dense,
            has_dense=True,
            experts=layers,
            files=files,
            pregates=pregates,
        )
        writer.finish(manifest)
    return manifest, writer.removed


def _printable(name: str) -> str:
    # A file may be called anything; the manifest is one line of text.
    return "".join(char if char.isprintable() else "?" for char in name)


def _dense_formats(
    chooser: FormatChooser,
    slot: Slot,
    rules: dict[str, TensorRule],
    ffns: dict[str, FfnRule],
    tensors: Mapping[str, SourceTensor],
) -> tuple[Format, Format | None]:
    if slot.kind is Kind.FFN:
        rule = ffns[slot.name]
        return (
            chooser.ffn(
                "gate and up", (tensors[rule.gate.tensor], tensors[rule.up.tensor]), rule.dim
            ),
            chooser.ffn("down", (tensors[rule.down.tensor],), rule.ffn_dim),
        )
    if slot.name == "rope.inv_freq":
        return Format.F32, None
    return chooser.dense(slot, tensors[rules[slot.name].source.tensor]), None


def _weights(
    chooser: FormatChooser,
    spec: ModelSpec,
    layer: int,
    rules: list[FfnRule],
    tensors: Mapping[str, SourceTensor],
) -> Weights:
    width = spec.layers[layer].ffn_dim
    gate_up = {part.tensor for rule in rules for part in (rule.gate, rule.up)}
    down = {rule.down.tensor for rule in rules}
    return Weights(
        spec.model_dim,
        width,
        chooser.ffn("gate and up", (tensors[name] for name in sorted(gate_up)), spec.model_dim),
        chooser.ffn("down", (tensors[name] for name in sorted(down)), width),
    )


def _texts(files: TextFiles, options: Options) -> dict[str, bytes]:
    if files.tokenizer is None and not options.allow_no_tokenizer:
        raise UnsupportedModel(
            f"no tokenizer: {files.missing_why}: name a folder that has a tokenizer.json with"
            " --tokenizer DIR, or pass --no-tokenizer for a model that takes token ids only"
        )
    named = {
        "tokenizer.json": files.tokenizer,
        "chat_template.jinja": files.chat_template,
        "generation_config.json": encode_generation_config(files.generation_config),
    }
    for name, data in named.items():
        if data is not None and not _is_text(data):
            raise CorruptArtifact(f"the model's {name} is not UTF-8 text")
    return {name: data for name, data in named.items() if data is not None}


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _write_dense(
    plan: ConvertPlan, writer: ArtifactWriter, progress: Progress
) -> tuple[DenseTensor, ...]:
    formats = [plan.dense_formats[slot.name] for slot in plan.slots]
    tensors: list[DenseTensor] = []
    with writer.file(DENSE_FILE, dense_header(plan.slots, formats)) as file:
        file.take_hash()
        for slot, (fmt, down) in zip(plan.slots, formats, strict=True):
            offset = file.offset
            for chunk in _dense_chunks(plan, slot, fmt, down):
                file.write(chunk)
                progress(chunk.nbytes)
            assert file.offset - offset == slot_bytes(slot, fmt, down), slot.name
            tensors.append(DenseTensor(slot, fmt, down, offset, file.take_hash()))
    return tuple(tensors)


def _dense_chunks(plan: ConvertPlan, slot: Slot, fmt: Format, down: Format | None) -> Iterator[U8]:
    tensors = plan.source.tensors
    if slot.name == "rope.inv_freq":
        yield plan.source.family.inv_freq(plan.source.config).astype("<f4").view(np.uint8)
    elif slot.kind is Kind.FFN:
        assert down is not None
        weights = Weights(slot.shape[0], slot.shape[1], fmt, down)
        packed = ops.aligned_empty(weights.num_bytes)
        pack_ffn(plan.dense_ffns[slot.name], weights, tensors, packed)
        yield packed
    else:
        source = plan.rules[slot.name].source
        region = Region(slot.name, tensors[source.tensor], source, fmt)
        if slot.kind is Kind.VECTOR:
            yield region.rows(0, 1).reshape(-1)
        else:
            yield from packed_rows(region)


def _write_experts(
    plan: ConvertPlan, layer: int, writer: ArtifactWriter, progress: Progress
) -> ExpertLayer:
    rules, weights = plan.experts[layer], plan.weights[layer]
    size = round_up(weights.num_bytes, PAGE)
    probe = GridProbe(layer, weights, len(rules))
    packed = ops.aligned_empty(size)
    packed[weights.num_bytes :] = 0
    hashes: list[str] = []
    header = expert_header(range(len(rules)), size)
    with writer.file(expert_file(layer), header) as file:
        file.take_hash()
        for index, rule in enumerate(rules):
            pack_ffn(rule, weights, plan.source.tensors, packed)
            file.write(packed)
            hashes.append(file.take_hash())
            if index in probe.experts:
                probe.add(packed)
            progress(size)
    return ExpertLayer(
        layer=layer,
        weights=weights,
        grid=probe.grid(),
        blake3=tuple(hashes),
        present=((0, len(rules) - 1),),
        offset=len(header),
    )


def _values(plan: ConvertPlan, name: str) -> F32:
    # A router [E, D] or a norm [1, D], as dense.safetensors has it.
    source = plan.rules[name].source
    region = Region(name, plan.source.tensors[source.tensor], source, Format.F32)
    return region.values(0, region.num_rows)


def _write_text(writer: ArtifactWriter, name: str, data: bytes) -> TextFile:
    with writer.file(name) as file:
        file.write(data)
    return TextFile(name, len(data), digest(data), present=True)
