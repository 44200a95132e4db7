"""What a decoded token's time goes to: every native call timed, and the gaps between them.

python -m bench.peer.where MODEL.shoal [--tokens 80] [--threads 2] [--context 0]
"""

import argparse
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.measure import BandwidthProbe, Row, save, show
from bench.peer.phases import FILL_ROWS, Phase
from bench.peer.run_shoal import Engine
from shoal import _kernels, ops
from shoal.artifact import Artifact
from shoal.ops.expert_tables import ExpertTable
from shoal.quant import Format

WEIGHTS = 3  # of matmul's arguments: format, rows, columns, weights
TABLE, METHOD = "experts of a table", "sums"
TABLE_EXPERTS = 6  # of its arguments: itself, scheme, width, rows, scales, offsets, experts
RUN, LAYER = "run_layers", "run_layer"
RUN_LAYERS, RUN_EXPERTS, RUN_SECONDS = 0, 12, 13  # of its arguments
GAPS = "between native calls"


class Diary:
    """Wraps the native functions; sums each one's seconds, and those between calls, by pass.

    expert_bytes: of one expert.
    """

    def __init__(self, expert_bytes: int) -> None:
        self._expert_bytes = expert_bytes
        self.passes: list[dict[str, float]] = []
        self.weight_bytes: dict[str, int] = {}  # of the last pass
        self._bytes: dict[str, int] = defaultdict(int)
        self._now: dict[str, float] = defaultdict(float)
        self._ended_s = 0.0
        for name in dir(_kernels):
            function = getattr(_kernels, name)
            if callable(function) and not isinstance(function, type):
                setattr(_kernels, name, self._timed(name, function))
        setattr(ExpertTable, METHOD, self._timed(TABLE, getattr(ExpertTable, METHOD)))

    def mark(self) -> float:
        """Begin a pass; the former one is kept."""
        now_s = time.perf_counter()
        if self._ended_s:
            self._now[GAPS] += now_s - self._ended_s
        self.passes.append(dict(self._now))
        self._now.clear()
        self.weight_bytes = dict(self._bytes)
        self._bytes.clear()
        self._ended_s = now_s
        return now_s

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            began_s = time.perf_counter()
            if self._ended_s:
                self._now[GAPS] += began_s - self._ended_s
            result = function(*arguments, **named)
            self._ended_s = time.perf_counter()
            spent_s = self._ended_s - began_s
            if name == RUN:
                experts_s = float(arguments[RUN_SECONDS].sum())
                self._now[TABLE] += experts_s
                spent_s -= experts_s
            self._now[self._key(name, arguments)] += spent_s
            return result

        return timed

    def _key(self, name: str, arguments: tuple[Any, ...]) -> str:
        if name == "matmul":
            key = f"{arguments[1]} x {arguments[2]}, {Format(arguments[0]).label}"
            self._bytes[key] += arguments[WEIGHTS].size
            return key
        if name == LAYER:
            self._bytes[LAYER] += arguments[0].num_bytes
        if name == RUN:
            self._bytes[LAYER] += sum(layer.num_bytes for layer in arguments[RUN_LAYERS])
            self._bytes[TABLE] += arguments[RUN_EXPERTS].size * self._expert_bytes
            return LAYER
        if name == "expert_sums":
            self._bytes[name] += sum(weights.size for weights in arguments[4])
        if name == TABLE:
            self._bytes[name] += arguments[TABLE_EXPERTS].size * self._expert_bytes
        return name


def main() -> None:
    """Measure, print the table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=80)
    parser.add_argument("--threads", type=int, default=ops.num_threads())
    parser.add_argument("--context", type=int, default=0)
    parser.add_argument("--name", default="where")
    chosen = parser.parse_args()
    phase = Phase("decode", 1, chosen.context, chosen.threads, chosen.tokens)
    engine = Engine(chosen.model, chosen.context + 2 * FILL_ROWS)
    probe = BandwidthProbe()
    plain_s: list[float] = []

    def mark() -> float:
        plain_s.append(time.perf_counter())
        return plain_s[-1]

    engine.run(phase, mark)
    plain_ms = 1e3 * statistics.median(b - a for a, b in itertools.pairwise(plain_s))
    artifact = Artifact.open(chosen.model)
    diary = Diary(artifact.expert_layer(min(artifact.owned_experts)).expert_bytes)
    engine.run(phase, diary.mark)
    rows = table_of(diary.passes[2:], diary.weight_bytes)
    probe_gb_per_s = probe.gb_per_s(chosen.threads)
    show(
        f"a token at {chosen.context}: {plain_ms:.1f} ms; probe {probe_gb_per_s:.1f} GB/s",
        rows,
        {
            "": lambda r: r["what"],
            "ms (median)": lambda r: f"{r['ms']:.2f}",
            "MB": lambda r: f"{r['weight_bytes'] / 1e6:.0f}" if r["weight_bytes"] else "",
            "GB/s": lambda r: f"{rate(r):.1f}" if r["weight_bytes"] else "",
        },
    )
    more = {"threads": chosen.threads, "context": chosen.context, "token_ms": plain_ms}
    save(f"{chosen.name}-{chosen.model.stem}", rows, probe_gb_per_s=probe_gb_per_s, **more)


def rate(row: Row) -> float:
    """Return a part's weight bytes a second, in GB/s."""
    return float(row["weight_bytes"] / row["ms"] / 1e6)


def table_of(passes: list[dict[str, float]], sizes: dict[str, int]) -> list[Row]:
    """Return the median milliseconds of each part, the largest first."""
    names = sorted({name for each in passes for name in each})
    rows: list[Row] = [
        {
            "what": name,
            "ms": 1e3 * statistics.median(each.get(name, 0.0) for each in passes),
            "weight_bytes": sizes.get(name, 0),
        }
        for name in names
    ]
    return sorted(rows, key=lambda row: -row["ms"])


if __name__ == "__main__":
    main()
