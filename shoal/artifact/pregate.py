"""Pre-gate matrices: which there are, their shapes and their place in the manifest (core).

Layer l's rows score the experts of the next layer that has a router, `target`, with

    router(target) · diag(ffn.norm(target) / ffn.norm(l))

so that a node can guess which experts the next call will want. Advice only: the matrices decide
when bytes are read, never a token. Hence they are no part of the identity, and may be absent.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from shoal.artifact.canonical import JsonObject
from shoal.artifact.fields import Fields
from shoal.limits import MAX_LAYERS
from shoal.model_spec import ModelSpec, RouterKind
from shoal.quant import Format, Scheme, matrix_bytes

PREGATE_FILE = "pregate.safetensors"

# The format that a scheme's rows can meet and that loses least (docs/prefetch.md has the recall).
# Q4_K alone loses some; the second matrix holds what the first one rounded off.
_FORMATS = {
    Scheme.F32: (Format.BF16, 1),
    Scheme.INT8_32: (Format.Q8_0, 1),
    Scheme.INT8_256: (Format.Q4_K, 2),
}


@dataclass(frozen=True, slots=True)
class PregatePlan:
    """A matrix to make: rows of `layer` score `num_experts` experts of `target`.

    parts: matrices [num_experts, dim] below one another; a score is the sum of its parts.
    """

    layer: int
    target: int
    num_experts: int
    dim: int
    format: Format
    parts: int

    @property
    def name(self) -> str:
        return f"layers.{self.layer}.pregate"

    @property
    def rows(self) -> int:
        """Rows of the stored matrix: all parts."""
        return self.parts * self.num_experts

    @property
    def num_bytes(self) -> int:
        return matrix_bytes(self.format, self.rows, self.dim)


@dataclass(frozen=True, slots=True)
class PregateEntry:
    """A stored matrix. `offset` counts from the start of the file."""

    plan: PregatePlan
    offset: int
    blake3: str


def plan_pregates(spec: ModelSpec, schemes: Mapping[int, Scheme]) -> tuple[PregatePlan, ...]:
    """Return the matrices of a model, by layer; none where every expert is always chosen.

    Args:
        schemes: layer -> scheme of the rows that its experts take.
    """
    routed = [
        (index, layer.router.num_experts)
        for index, layer in enumerate(spec.layers)
        if layer.router is not None and layer.router.kind is not RouterKind.ALL
    ]
    return tuple(
        PregatePlan(layer, target, num_experts, spec.model_dim, *_FORMATS[schemes[layer]])
        for (layer, _), (target, num_experts) in itertools.pairwise(routed)
    )


def place(plans: Sequence[PregatePlan], start: int) -> Iterator[tuple[PregatePlan, int]]:
    """Yield each plan with its offset in a file whose first tensor is at `start`."""
    for plan in plans:
        yield plan, start
        start += plan.num_bytes


def pregate_to_json(entry: PregateEntry) -> JsonObject:
    plan = entry.plan
    return {
        "layer": plan.layer,
        "target": plan.target,
        "format": plan.format.label,
        "parts": plan.parts,
        "shape": [plan.num_experts, plan.dim],
        "offset": entry.offset,
        "bytes": plan.num_bytes,
        "blake3": entry.blake3,
    }


def pregates_from_json(
    fields: Fields, spec: ModelSpec, schemes: Mapping[int, Scheme]
) -> tuple[PregateEntry, ...]:
    """Read the manifest's `pregate` list, if it has one. Raises CorruptArtifact."""
    if not fields.has("pregate"):
        return ()
    plans = plan_pregates(spec, schemes)
    entries: list[PregateEntry] = []
    for value, where in fields.items("pregate", MAX_LAYERS):
        item = Fields(value, where)
        if len(entries) == len(plans):
            raise item.fail("layer", "no layer is left that scores another's experts")
        offset, blake3 = item.integer("offset", 0, 2**62), item.hash("blake3")
        entry = PregateEntry(plans[len(entries)], offset, blake3)
        for key, expected in pregate_to_json(entry).items():
            if key not in ("offset", "blake3") and item.take(key) != expected:
                raise item.fail(key, f"expected {expected}")
        item.done()
        if entries and offset != entries[-1].offset + entries[-1].plan.num_bytes:
            raise item.fail("offset", f"{offset} leaves a hole or overlaps")
        entries.append(entry)
    if len(entries) != len(plans) or not entries:
        raise fields.fail("pregate", f"{len(entries)} matrices, expected {len(plans)}")
    return tuple(entries)
