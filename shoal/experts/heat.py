"""Heat: how often each expert was used, counted, written and read (core).

A heat map is one JSON object:

    {"format": "shoal-heat-1", "identity": "<64 hex digits>", "rows": 9120,
     "counts": [{"layer": 0, "experts": [17, 0, 3, ...]}, ...]}

`experts` has one number an expert of that layer, those that the node does not own included: rows
that visited it. It says what to warm up first and what to pin.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.artifact.canonical import MalformedJson, canonical_json, parse_object
from shoal.artifact.fields import Fields
from shoal.errors import CorruptArtifact
from shoal.limits import MAX_EXPERTS, MAX_LAYERS

FORMAT = "shoal-heat-1"
MAX_COUNT = 2**53  # what JSON readers keep exact
Key = tuple[int, int]  # (layer, index of the expert in it)


@dataclass(frozen=True, slots=True)
class HeatMap:
    """counts: layer -> [E] int64, uses of each expert. num_rows: rows that were counted."""

    identity: str
    num_rows: int
    counts: Mapping[int, NDArray[np.int64]]

    def hottest(self) -> list[Key]:
        """Return the experts that were used, the hottest first; ties by layer, then index."""
        used = [
            (-int(count), layer, index)
            for layer, counts in self.counts.items()
            for index, count in enumerate(counts.tolist())
            if count
        ]
        return [(layer, index) for _, layer, index in sorted(used)]

    def faded(self) -> "HeatMap":
        """Return it with every count halved: what is long ago weighs less than what is new."""
        halved = {layer: counts // 2 for layer, counts in self.counts.items()}
        return HeatMap(self.identity, self.num_rows // 2, halved)


def ranked(heat: HeatMap | None, owned: Sequence[Key]) -> list[Key]:
    """Return every owned expert: first those with heat, the hottest first, then in given order."""
    if heat is None:
        return list(owned)
    wanted = set(owned)
    first = [key for key in heat.hottest() if key in wanted]
    return first + [key for key in owned if key not in set(first)]


def encode_heat(heat: HeatMap) -> bytes:
    """Return the file's bytes; the same heat gives the same bytes."""
    counts = [
        {"layer": layer, "experts": heat.counts[layer].tolist()} for layer in sorted(heat.counts)
    ]
    fields = {"format": FORMAT, "identity": heat.identity, "rows": heat.num_rows, "counts": counts}
    return canonical_json(fields) + b"\n"


def decode_heat(data: bytes, where: str) -> HeatMap:
    """Read a file's bytes strictly; `where` names it in messages.

    Raises: CorruptArtifact for anything that `encode_heat` does not write.
    """
    try:
        fields = Fields(parse_object(data), where)
    except MalformedJson as error:
        raise CorruptArtifact(f"{where}: not a heat map: {error}") from None
    fields.choice("format", {FORMAT: FORMAT})
    identity, num_rows = fields.hash("identity"), fields.integer("rows", 0, MAX_COUNT)
    counts: dict[int, NDArray[np.int64]] = {}
    for value, place in fields.items("counts", MAX_LAYERS):
        entry = Fields(value, place)
        layer = entry.integer("layer", 0, MAX_LAYERS - 1)
        if layer in counts:
            raise entry.fail("layer", f"layer {layer} comes twice")
        experts = [
            Fields({"count": count}, at).integer("count", 0, MAX_COUNT)
            for count, at in entry.items("experts", MAX_EXPERTS)
        ]
        entry.done()
        counts[layer] = np.array(experts, np.int64)
    fields.done()
    return HeatMap(identity, num_rows, counts)
