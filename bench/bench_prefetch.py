"""Does guessing the next layer's experts pay? Recall offline, and A-B-A on real reads.

python bench/bench_prefetch.py [MODEL.shoal] [--texts bench/traces/texts.jsonl] [--tokens 3000]
    [--online-tokens 600] [--residency 25 50] [--ffn-dim 8192] [--skip-online] [--skip-offline]

Offline: the texts are read once, in process; each predictor guesses every call from those before
it, learning as it goes. recall@k: of the k experts that the router chose, how many are among the
predictor's first k. precision: of those it gives more than one half, how many came.

Online: experts are widened (bench/widen_experts.py: the same tokens and routing; four experts of
5 MB, so that a layer's call reads what eight of Qwen3-30B-A3B in Q4_K are, 21 MB) and read with
O_DIRECT through a cache of a share of them. Demand-only (A) and prefetching (B) have a cache each
and read the same text, in short windows that take turns: A B, B A, A B, ... A pair is measured
within two seconds, so what else the machine does meanwhile falls on both. The first windows, which
fill the caches, are not counted.

What is to be shown: `auto`, learning and trials included, loses at most MAX_LOSS to demand-only: it
passes if the upper end of the 95 % interval of its loss is within. An interval that is wider shows
neither, and the last lines say so.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.disk_probe import disk_speed
from bench.measure import ROOT, Row, save, show
from bench.prefetch_reading import Reader, SeenCall, record_calls, token_ids
from bench.widen_experts import widen
from coordinator.expert_dispatch import LocalDispatch
from shoal import ops
from shoal.artifact import Artifact
from shoal.artifact.pregate import PregatePlan
from shoal.artifact.pregate_build import build_pregate
from shoal.experts.executor import ExpertExecutor
from shoal.experts.open_store import open_store
from shoal.experts.options import Mode
from shoal.experts.ownership import Ownership
from shoal.experts.prefetch.guesser import FUSED, PREDICTORS, Guesser, RoutedLayer
from shoal.experts.prefetch.open_prefetcher import open_prefetcher
from shoal.experts.prefetch.pregate import Pregate
from shoal.experts.store import StoreOptions
from shoal.paths import default_model
from shoal.quant import Format
from shoal.rows import Rows

F64 = NDArray[np.float64]
WINDOW_TOKENS = 20
FIRST_WINDOWS = 2  # not counted
MAX_LOSS = 0.02  # of the tokens a second
PROMPT_ROWS = (4, 17, 32, 64, 128)
FORMS = ((Format.BF16, 1), (Format.Q8_0, 1), (Format.Q4_K, 1), (Format.Q4_K, 2))


def routed_layers(artifact: Artifact) -> list[RoutedLayer]:
    """Return the layers of a whole model that have routers."""
    return [
        RoutedLayer(
            index,
            layer.router.num_experts,
            layer.router.experts_per_token,
            tuple(range(layer.router.num_experts)),
        )
        for index, layer in enumerate(artifact.spec.layers)
        if layer.router is not None
    ]


def gates_of(artifact: Artifact) -> dict[int, Pregate]:
    """Return the artifact's pre-gates by source layer."""
    count = routed_layers(artifact)[0].experts_per_token
    return {
        entry.plan.layer: Pregate(artifact.read_pregate(entry), entry.plan.parts, count)
        for entry in artifact.manifest.pregates
    }


def offline(artifact: Artifact, calls: Sequence[SeenCall]) -> list[Row]:
    """Return recall and precision of each predictor, of each target layer and of all."""
    layers = routed_layers(artifact)
    gates = gates_of(artifact)
    rows: list[Row] = []
    for name, predictors in [*((name, (name,)) for name in PREDICTORS), (FUSED, PREDICTORS)]:
        guesser = Guesser(layers, gates, predictors)
        spent_s = 0.0
        for call in calls:
            began_s = time.perf_counter()
            guesser.settle(0, call.layer, 1, call.experts)
            guesser.guess(0, call.layer, call.rows)
            spent_s += time.perf_counter() - began_s
        for layer in (None, *(layer.layer for layer in layers)):
            figures = guesser.figures(layer)[FUSED]
            rows.append(
                {
                    "predictor": name,
                    "layer": "all" if layer is None else layer,
                    "recall": figures.recall,
                    "precision": figures.precision,
                    "would_read_per_wanted": figures.admitted / max(1, figures.wanted),
                    "us_per_call": 1e6 * spent_s / len(calls),
                }
            )
    return rows


def prompts(artifact: Artifact, calls: Sequence[SeenCall]) -> list[Row]:
    """Return how many experts a chunk of a prompt touches, and how sure the first guesses are.

    gates: all predictors; sweep: no pre-gate, so that guesses come in the order of the file.
    first8: of the first eight guesses (about what a gap has room for), how many came true.
    """
    layers = routed_layers(artifact)
    rows: list[Row] = []
    for size in PROMPT_ROWS:
        chunks = chunked(calls, len(layers), size)
        row: dict[str, object] = {"rows": size, "calls": len(chunks)}
        touched = [call.experts.size / layers[0].num_experts for call in chunks]
        row["touched"] = float(np.mean(touched))
        for name, predictors in (("gates", PREDICTORS), ("sweep", ("locality",))):
            guesser = Guesser(layers, gates_of(artifact), predictors)
            right = made = 0
            for call in chunks:
                guess = guesser.settle(0, call.layer, size, call.experts)
                if guess is not None and call.layer > 0:
                    right += int(np.isin(guess.experts[:8], call.experts).sum())
                    made += 8
                guesser.guess(0, call.layer, call.rows)
            row[f"{name}_first8"] = right / made
        rows.append(row)
    return rows


def chunked(calls: Sequence[SeenCall], num_layers: int, size: int) -> list[SeenCall]:
    """Return the calls of chunks of `size` tokens, from those of single ones."""
    found: list[SeenCall] = []
    per_chunk = num_layers * size
    for first in range(0, len(calls) - per_chunk + 1, per_chunk):
        for place in range(num_layers):
            group = calls[first + place : first + per_chunk : num_layers]
            rows = [call.rows for call in group]
            values: Any = np.concatenate([each.values for each in rows])  # of either dtype
            scales = np.concatenate([each.scales for each in rows])
            together = Rows(rows[0].scheme, rows[0].dim, values, scales)
            experts = np.unique(np.concatenate([call.experts for call in group]))
            found.append(SeenCall(group[0].layer, together, experts))
    return found


def format_loss(artifact: Artifact, calls: Sequence[SeenCall]) -> list[Row]:
    """Return what each stored form of the matrices loses, on the rows of its own scheme.

    kept: how often its first k are those of the exact matrix on exact rows. recall: how often they
    are what the router then chose.
    """
    followed = list(itertools.pairwise(calls))
    rows: list[Row] = []
    for fmt, parts in FORMS:
        kept = right = total = 0
        for entry in artifact.manifest.pregates:
            plan = replace(entry.plan, format=fmt, parts=parts)
            exact = exact_matrix(artifact, plan)
            data = build_pregate(plan, artifact.dense_values)
            gate = Pregate(ops.Matrix(fmt, plan.rows, plan.dim, data), parts, 1)
            for call, following in followed:
                if (call.layer, following.layer) != (plan.layer, plan.target):
                    continue
                values = plain_rows(call.rows)
                found = gate.scores(ops.quantise_rows(fmt.scheme, values))[0]
                kept += _common(found, exact @ values[0].astype(np.float64), following.experts.size)
                first = np.argsort(-found)[: following.experts.size]
                right += int(np.isin(first, following.experts).sum())
                total += following.experts.size
        form = f"{fmt.label} x{parts}" if parts > 1 else fmt.label
        rows.append({"form": form, "scheme": fmt.scheme.name.lower(), "kept": kept / total})
        rows[-1] = {**rows[-1], "recall": right / total, "choices": total}
    return rows


def exact_matrix(artifact: Artifact, plan: PregatePlan) -> F64:
    """Return [E, D], as docs/formats/artifact.md defines it."""
    router = artifact.dense_values(f"layers.{plan.target}.router").astype(np.float64)
    mine, theirs = (
        artifact.dense_values(f"layers.{index}.ffn.norm").astype(np.float64)
        for index in (plan.layer, plan.target)
    )
    exact: F64 = router * (theirs / mine)
    return exact


def plain_rows(rows: Rows) -> NDArray[np.float32]:
    """Return what rows stand for, [T, D] float32."""
    values = np.asarray(rows.values, np.float32)
    if rows.scheme.span > 1:
        values = values * np.repeat(rows.scales, rows.scheme.span, axis=1)
    return np.ascontiguousarray(values[:, : rows.dim])


def _common(found: NDArray[np.float32], exact: F64, count: int) -> int:
    return len({*np.argsort(-found)[:count].tolist()} & {*np.argsort(-exact)[:count].tolist()})


@dataclass(frozen=True, slots=True)
class Window:
    """What some tokens took."""

    seconds: float
    stall_s: float
    read_bytes: int
    misses: int


class Side:
    """One of the two that take turns: a store, a reader of the texts, a prefetcher or none."""

    def __init__(
        self,
        artifact: Artifact,
        texts: Sequence[Sequence[int]],
        cache_bytes: int,
        mode: Mode,
        is_governed: bool,
    ) -> None:
        owned = Ownership(dict(artifact.owned_experts))
        self.store = open_store(artifact, owned, StoreOptions(cache_bytes=cache_bytes))
        self.prefetcher = open_prefetcher(
            mode, artifact, owned, self.store, is_governed=is_governed
        )
        executor = ExpertExecutor(artifact, self.store, prefetcher=self.prefetcher)
        self._close = executor.close
        self.reader = Reader(artifact, LocalDispatch(executor))
        self._steps = self.reader.read(texts)
        self.windows: list[Window] = []

    def run_window(self) -> None:
        """Read on by a window."""
        before, began_s = self.store.figures(), time.perf_counter()
        for _ in range(WINDOW_TOKENS):
            next(self._steps)
        seconds, after = time.perf_counter() - began_s, self.store.figures()
        self.windows.append(
            Window(
                seconds,
                after.stall_s - before.stall_s,
                after.num_bytes - before.num_bytes,
                after.misses - before.misses,
            )
        )

    def figures(self) -> dict[str, object]:
        """Return what the prefetcher did."""
        issued, used, wasted = self.store.prefetch_bytes()
        more: dict[str, object] = {"issued": issued, "used": used, "wasted": wasted}
        if self.prefetcher is not None:
            figures = self.prefetcher.figures()
            more |= {"state": figures.decode_state, "saved_s": figures.stall_saved_s}
            more |= {"recall": figures.predictors[FUSED].recall}
        return more

    def close(self) -> None:
        """Let go of the cache."""
        self._close()


def online(
    artifact: Artifact, texts: Sequence[Sequence[int]], percent: float, subjects: Sequence[str]
) -> list[Row]:
    """Measure each subject against demand-only, window by window."""
    total = sum(entry.num_experts * entry.expert_bytes for entry in artifact.manifest.experts)
    rows: list[Row] = []
    digests: set[str] = set()
    for subject in subjects:
        mode = Mode.AUTO if subject == FUSED else Mode(subject)
        probe = disk_speed(artifact.path / artifact.manifest.experts[0].file, 1.0)
        cache_bytes = int(total * percent / 100)
        with ExitStack() as stack:
            a, b = (
                stack.enter_context(closing(Side(artifact, texts, cache_bytes, which, governed)))
                for which, governed in ((Mode.OFF, False), (mode, subject != FUSED))
            )
            for number in range(sum(map(len, texts)) // WINDOW_TOKENS):
                for side in (a, b) if number % 2 == 0 else (b, a):
                    side.run_window()
            pairs = list(zip(a.windows, b.windows, strict=True))[FIRST_WINDOWS:]
            digests |= {a.reader.digest, b.reader.digest}
            more = b.figures() | {"disk_gb_per_s": probe.gb_per_s}
        rows.append(_compare(subject, percent, pairs) | more)
        print(f"{percent:g} % {subject}: {rows[-1]['speedup']:.3f}", file=sys.stderr)
    assert len(digests) == 1, "prefetching changed a logit"
    return rows


def _compare(
    subject: str, percent: float, pairs: Sequence[tuple[Window, Window]]
) -> dict[str, Any]:
    ratios = np.array([b.seconds / a.seconds for a, b in pairs])
    logs = np.log(ratios)
    error = float(logs.std(ddof=1) / len(logs) ** 0.5)

    def rate(of: Callable[[tuple[Window, Window]], Window], what: str) -> float:
        total: float = sum(getattr(of(pair), what) for pair in pairs)
        return total / (len(pairs) * WINDOW_TOKENS)

    row: dict[str, Any] = {"subject": subject, "residency": percent, "windows": len(pairs)}
    for label, of in (("a", lambda pair: pair[0]), ("b", lambda pair: pair[1])):
        row[f"{label}_tok_s"] = 1 / rate(of, "seconds")
        row[f"{label}_stall_ms"] = 1e3 * rate(of, "stall_s")
        row[f"{label}_mb"] = rate(of, "read_bytes") / 1e6
        row[f"{label}_misses"] = rate(of, "misses")
    row["speedup"] = float(np.exp(-logs.mean()))
    row["speedup_low"] = float(np.exp(-logs.mean() - 2 * error))
    row["speedup_high"] = float(np.exp(-logs.mean() + 2 * error))
    row["most_lost"] = max(0.0, 1 - row["speedup_low"])
    return row


def verdict(row: Row) -> str:
    """Say what a subject's figures show of its loss."""
    most = f"loses at most {row['most_lost']:.1%} (95 %)"
    if row["speedup_high"] < 1 - MAX_LOSS:
        return f"{most}: it LOSES more than {MAX_LOSS:.0%}"
    if row["most_lost"] <= MAX_LOSS:
        return f"{most}: within {MAX_LOSS:.0%}"
    return f"{most}: neither within {MAX_LOSS:.0%} nor beyond is shown: too noisy or too short"


def print_offline(rows: Sequence[Row]) -> None:
    show(
        "offline: guesses of the next layer's experts",
        rows,
        {
            "predictor": lambda row: row["predictor"],
            "layer": lambda row: str(row["layer"]),
            "recall@k": lambda row: f"{row['recall']:.3f}",
            "precision": lambda row: f"{row['precision']:.3f}",
            "taken / wanted": lambda row: f"{row['would_read_per_wanted']:.3f}",
            "us a call": lambda row: f"{row['us_per_call']:.0f}",
        },
    )


def print_forms(rows: Sequence[Row]) -> None:
    show(
        "forms of the pre-gate matrix",
        rows,
        {
            "form": lambda row: row["form"],
            "rows": lambda row: row["scheme"],
            "first k kept": lambda row: f"{row['kept']:.4f}",
            "recall@k": lambda row: f"{row['recall']:.4f}",
            "choices": lambda row: f"{row['choices']:,}",
        },
    )


def print_prompts(rows: Sequence[Row]) -> None:
    show(
        "prompts: chunks of several rows",
        rows,
        {
            "rows": lambda row: str(row["rows"]),
            "experts touched": lambda row: f"{row['touched']:.3f}",
            "first 8 right, gates": lambda row: f"{row['gates_first8']:.3f}",
            "first 8 right, sweep": lambda row: f"{row['sweep_first8']:.3f}",
            "calls": lambda row: str(row["calls"]),
        },
    )


def print_online(rows: Sequence[Row]) -> None:
    show(
        "online: demand-only (A) and prefetching (B), window by window",
        rows,
        {
            "subject": lambda row: row["subject"],
            "residency": lambda row: f"{row['residency']:.0f} %",
            "A tok/s": lambda row: f"{row['a_tok_s']:.2f}",
            "B tok/s": lambda row: f"{row['b_tok_s']:.2f}",
            "speedup (95 %)": lambda row: (
                f"{row['speedup']:.3f} ({row['speedup_low']:.3f}-{row['speedup_high']:.3f})"
            ),
            "stall ms A, B": lambda row: f"{row['a_stall_ms']:.1f}, {row['b_stall_ms']:.1f}",
            "MB a token A, B": lambda row: f"{row['a_mb']:.1f}, {row['b_mb']:.1f}",
            "used / issued": lambda row: f"{row['used'] / max(1, row['issued']):.2f}",
            "governor": lambda row: str(row.get("state", "")),
        },
    )


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=default_model())
    parser.add_argument("--texts", type=Path, default=ROOT / "bench" / "traces" / "texts.jsonl")
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--online-tokens", type=int, default=600)
    parser.add_argument("--residency", type=float, nargs="+", default=[25, 50])
    parser.add_argument("--subjects", nargs="+", default=[*PREDICTORS, FUSED, Mode.AUTO.value])
    parser.add_argument("--ffn-dim", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip-offline", action="store_true")
    parser.add_argument("--name", default="prefetch", help="of the result file")
    parser.add_argument("--skip-online", action="store_true")
    chosen = parser.parse_args()
    ops.set_threads(chosen.threads)
    artifact = Artifact.open(chosen.model)
    found: dict[str, list[Row]] = {"online": []}
    if not chosen.skip_offline:
        calls = record_calls(artifact, token_ids(artifact, chosen.texts, chosen.tokens))
        found["offline"] = offline(artifact, calls)
        found["format_loss"] = format_loss(artifact, calls)
        print_offline(found["offline"])
        found["prompts"] = prompts(artifact, calls)
        print_forms(found["format_loss"])
        print_prompts(found["prompts"])
    if not chosen.skip_online:
        name = f"{artifact.name}-{artifact.identity[:8]}-ffn-{chosen.ffn_dim}.shoal"
        out = ROOT / "build" / "bench" / name
        widen(artifact, out, chosen.ffn_dim)
        wide = Artifact.open(out)
        texts = token_ids(wide, chosen.texts, chosen.online_tokens)
        for percent in chosen.residency:
            found["online"] += online(wide, texts, percent, chosen.subjects)
        print_online(found["online"])
        for row in found["online"]:
            if row["subject"] == Mode.AUTO.value:
                print(f"auto at {row['residency']:g} %: {verdict(row)}")
    rows = found.pop("online")
    save(chosen.name, rows, model=artifact.name, identity=artifact.identity, **found)


if __name__ == "__main__":
    main()
