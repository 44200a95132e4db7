"""What a run of bench_prefetch.py shows about the loss of `auto`, and what it does not."""

import numpy as np
import pytest

from bench.bench_prefetch import Window, _compare, verdict


@pytest.mark.parametrize(
    ("slower", "noise", "words"),
    [
        (0.99, 0.005, "within 2%"),
        (1.01, 0.005, "within 2%"),
        (1.10, 0.02, "it LOSES more than 2%"),
        (1.00, 0.30, "neither within 2% nor beyond is shown"),
    ],
)
def test_the_verdict_goes_by_the_upper_end_of_the_loss(
    slower: float, noise: float, words: str
) -> None:
    rng = np.random.default_rng(1)
    pairs = [
        (Window(1.0, 0.1, 100, 5), Window(slower * float(np.exp(noise * z)), 0.1, 100, 5))
        for z in rng.standard_normal(20)
    ]
    row = _compare("auto", 25.0, pairs)
    assert words in verdict(row)
    assert row["most_lost"] == max(0.0, 1 - row["speedup_low"])
