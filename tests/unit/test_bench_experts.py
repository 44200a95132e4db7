"""The bench of one expert layer beside ggml: what is compared, and that our side computes it."""

from pathlib import Path

import numpy as np
import pytest

from bench.bench_kernels import random_expert
from bench.peer.engines import SHOAL
from bench.peer.expert_turns import (
    DIM,
    EXPERTS_FILE,
    EXPERTS_PER_TOKEN,
    ROWS_FILE,
    Turn,
)
from bench.peer.experts import GGML, GGML_REPACKED, Cell, Visits, summary
from bench.peer.run_shoal_experts import Engine, split
from bench.peer.system_tables import experts
from shoal.ops_reference.matrices import Expert, dequantise, expert_ffn
from shoal.quant import Format, Scheme


@pytest.mark.parametrize("fmt", [Format.Q4_0, Format.Q4_K, Format.Q8_0], ids=lambda f: f.label)
def test_a_turn_of_shoal_is_the_mean_of_the_visited_experts(fmt: Format, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    distinct = [random_expert(fmt, rng) for _ in range(3)]
    flat = np.array([np.concatenate([m.ravel() for m in expert]) for expert in distinct])
    x = rng.standard_normal((2, DIM), np.float32)
    np.save(tmp_path / EXPERTS_FILE, flat)
    np.save(tmp_path / ROWS_FILE, x)
    visits = [[0, 1, 2, 3, 4, 5, 6, 7], [9, 1, 8, 4, 7, 3, 6, 0]]
    answer = Engine(fmt, tmp_path, 10).run(Turn(2, 1, visits, 1, wants_result=True))
    values = [Expert(*(dequantise(fmt, m) for m in split(each))) for each in flat]
    row = x[1:].astype(np.float64)
    right = np.mean([expert_ffn(values[i % 3], row, Scheme.F32)[0] for i in visits[1]], axis=0)
    assert answer.seconds > 0
    error = np.sqrt(np.mean((np.array(answer.result) - right) ** 2) / np.mean(right**2))
    assert error < 0.06


def test_no_expert_comes_again_before_the_others() -> None:
    visits = Visits(27, np.random.default_rng(0))
    for _ in range(4):  # 24 of 27 in whole calls
        seen = [expert for call in visits.take(1) + visits.take(2) for expert in call]
        assert len(seen) == 3 * EXPERTS_PER_TOKEN == len(set(seen))


def test_the_better_peer_of_a_cell_is_the_one_compared() -> None:
    taken = {SHOAL: [100.0, 50.0, 100.0], GGML: [300.0] * 3, GGML_REPACKED: [150.0] * 3}
    row = summary(Format.Q4_0, Cell(1, 2), taken, [40.0] * 3)
    assert row["best_peer"] == GGML_REPACKED
    assert (row["ratio"]["median"], row["ratio"]["max"]) == (1.5, 3.0)
    assert row["share_of_probe"]["median"] == pytest.approx(2654208 / 100e-6 / 40e9)
    line = experts([row], "avx2").splitlines()[-1]
    assert line.startswith("| Q4_0, 1 row | 2 | 100 (50-100) | 300 (300-300) | 150 (150-150) |")
    assert line.endswith("| **1.50** (1.50-3.00) | 1.15 | 2.26 | 66% | 40.0 |")


def test_what_a_peer_lacks_is_not_compared() -> None:
    row = summary(Format.Q8_0, Cell(8, 1), {SHOAL: [500.0], GGML: [2000.0]}, [30.0])
    assert row["best_peer"] == GGML
    assert "| 2000 (2000-2000) | n/a | **4.00**" in experts([row], "avx2")
