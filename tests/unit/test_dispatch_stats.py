"""The figures of dispatch."""

from coordinator.dispatch_stats import MAX_SAMPLES, DispatchStats, percentile


def test_percentiles_are_samples() -> None:
    samples = [float(n) for n in range(1, 101)]
    assert percentile(reversed(samples), 50) == 50.0
    assert percentile(samples, 99) == 99.0
    assert percentile(samples, 100) == 100.0
    assert percentile([7.0], 50) == 7.0
    assert percentile([], 99) == 0.0


def test_a_summary_adds_up_and_a_reset_forgets() -> None:
    stats = DispatchStats()
    for n in range(1, 11):
        stats.record(latency_s=n, compute_s=n / 2, bytes_up=10, bytes_down=100)
    summary = stats.summary()
    assert (summary.num_fanouts, summary.bytes_up, summary.bytes_down) == (10, 100, 1000)
    assert (summary.latency_p50_s, summary.beyond_compute_p50_s) == (5, 2.5)
    stats.reset()
    assert stats.summary().num_fanouts == 0 and stats.summary().latency_p99_s == 0.0


def test_memory_is_bounded() -> None:
    stats = DispatchStats()
    for n in range(MAX_SAMPLES + 100):
        stats.record(float(n), 0.0, 1, 1)
    assert stats.summary().num_fanouts == MAX_SAMPLES + 100
    assert stats.summary().latency_p50_s == 100 + MAX_SAMPLES / 2 - 1
