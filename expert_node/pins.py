"""`--pin-experts N|FILE`: which experts are never evicted once they have been read.

N: the N hottest, by --warmup-from at first and by this node's own count later. FILE: a heat map
(the hottest, up to half of the cache), or a list:

    # layers: experts, in spans, the most wanted first
    0-3: 5+17-19
    4: 0
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from expert_node.heat_keeper import read_heat
from shoal.artifact import Artifact
from shoal.errors import UsageError
from shoal.experts.heat import HeatMap, ranked
from shoal.experts.ownership import Ownership, parse_spans
from shoal.experts.store import Key
from shoal.limits import MAX_HEAT_BYTES

HEAT_SHARE = 2  # of the cache, one part in: what is pinned does not adapt to what is asked
_NAME = "--pin-experts"


def pins_of(
    wanted: int | Path | None,
    artifact: Artifact,
    ownership: Ownership,
    heat: HeatMap | None,
    cache_bytes: int | None,
) -> tuple[Key, ...]:
    """Return what to pin, the most wanted first.

    Args:
        heat: what is known of use; None: nothing yet.

    Raises: UsageError: the file is neither a list nor a heat map of this model; OSError.
    """
    match wanted:
        case None:
            return ()
        case int():
            if heat is None:
                return ()
            return tuple(islice((key for key in heat.hottest() if key in ownership), wanted))
        case Path() if is_heat(wanted):
            recorded = read_heat(wanted, artifact.identity, _NAME)
            return tuple(_that_fit(recorded, artifact, ownership, cache_bytes))
        case Path():
            return tuple(_listed(wanted, artifact, ownership))


def is_heat(path: Path) -> bool:
    """Whether a file looks like a heat map: it begins as JSON does."""
    with path.open("rb") as stream:
        return stream.read(16).lstrip().startswith(b"{")


def owned_keys(ownership: Ownership) -> list[Key]:
    """Return every owned expert, layer by layer."""
    return [(layer, i) for layer in ownership.layers for i in ownership.experts(layer)]


def warm_up_order(ownership: Ownership, heat: HeatMap | None) -> list[Key] | None:
    """Return what to read first; None: layer by layer."""
    return None if heat is None else ranked(heat, owned_keys(ownership))


def _that_fit(
    heat: HeatMap, artifact: Artifact, ownership: Ownership, cache_bytes: int | None
) -> Iterator[Key]:
    left = None if cache_bytes is None else cache_bytes // HEAT_SHARE
    for layer, index in heat.hottest():
        if (layer, index) not in ownership:
            continue
        if left is not None:
            left -= artifact.expert_location(layer, index).num_bytes
            if left < 0:
                return
        yield layer, index


def _listed(path: Path, artifact: Artifact, ownership: Ownership) -> Iterator[Key]:
    if path.stat().st_size > MAX_HEAT_BYTES:
        raise UsageError(f"{_NAME} {path}: more than {MAX_HEAT_BYTES} bytes: not a list")
    try:
        lines = path.read_bytes().decode().splitlines()
    except UnicodeDecodeError:
        raise UsageError(f"{_NAME} {path}: no text: write lines such as 0-3: 5+17-19") from None
    for number, line in enumerate(lines, 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        layers, colon, experts = content.partition(":")
        name = f"{_NAME} {path}, line {number}"
        if not colon:
            raise UsageError(f"{name}: {content!r}: write layers: experts, such as 0-3: 5+17-19")
        for layer in parse_spans(layers, name=name, limit=artifact.spec.num_layers):
            router = artifact.spec.layers[layer].router
            if router is None:
                raise UsageError(f"{name}: layer {layer} has no experts")
            for index in parse_spans(experts, name=name, limit=router.num_experts):
                if (layer, index) in ownership:  # one list may serve every node of a model
                    yield layer, index
