"""What a node's metrics say about the time between two looks (core)."""

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from shoal import metrics

Key = tuple[str, tuple[tuple[str, str], ...]]  # a sample's name and its labels, sorted


@dataclass(frozen=True, slots=True)
class Look:
    """One scrape. at_s: when, on any clock that is the same for all looks at a node."""

    at_s: float
    values: Mapping[Key, float]

    def value(self, name: str, **labels: str) -> float | None:
        """Return one sample's value; None: the node does not export it."""
        return self.values.get((name, tuple(sorted(labels.items()))))

    def chosen(self, name: str, label: str) -> str:
        """Return which label value of a one-of-several metric is 1; "" if none."""
        for (found, labels), value in self.values.items():
            if found == name and value == 1:
                return dict(labels).get(label, "")
        return ""


@dataclass(frozen=True, slots=True)
class NodeFigures:
    """One node over the last interval; None: not known (no earlier look, or not exported)."""

    state: str
    model: str
    isa: str
    num_owned: int
    cached_bytes: float | None
    budget_bytes: float | None
    calls_held: float | None
    calls_per_s: float | None
    rows_per_s: float | None
    hit_rate: float | None
    stall_share: float | None  # seconds that calls waited for reads, per second; above 1: several
    read_bytes_per_s: float | None
    chunk_p99_s: float | None
    queued: float | None
    backend: str
    pacing: str
    prefetch: str
    hottest_c: float | None
    num_unavailable: float | None
    rss_bytes: float | None


def parse_look(text: str, at_s: float) -> Look:
    """Read what /metrics answered. Raises ValueError: it is not Prometheus' text format."""
    try:
        families = list(text_string_to_metric_families(text))
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f"not Prometheus' text format: {error}") from None
    return Look(
        at_s,
        {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
        },
    )


def figures_of(before: Look | None, now: Look) -> NodeFigures:
    """Return what happened between two looks at one node; a restart between them is no rate."""
    hits = _rate(before, now, metrics.CACHE_HITS)
    misses = _rate(before, now, metrics.CACHE_MISSES)
    asked = None if hits is None or misses is None else hits + misses
    return NodeFigures(
        state=_state(now),
        model=_label(now, metrics.NODE_INFO, "model"),
        isa=_label(now, metrics.NODE_INFO, "isa"),
        num_owned=int(now.value(metrics.NODE_OWNED_EXPERTS.name) or 0),
        cached_bytes=now.value(metrics.CACHE_BYTES.name),
        budget_bytes=now.value(metrics.CACHE_BUDGET_BYTES.name),
        calls_held=now.value(metrics.NODE_CALLS_HELD.name),
        calls_per_s=_rate(before, now, metrics.NODE_CALLS),
        rows_per_s=_rate(before, now, metrics.NODE_ROWS),
        hit_rate=hits / asked if hits is not None and asked else None,
        stall_share=_rate(before, now, metrics.CACHE_STALL),
        read_bytes_per_s=_rate(before, now, metrics.READ_BYTES),
        chunk_p99_s=_quantile(before, now, metrics.READ_CHUNK_SECONDS, 0.99),
        queued=now.value(metrics.READ_QUEUED.name),
        backend=now.chosen(metrics.READ_BACKEND.name, "backend"),
        pacing=now.chosen(metrics.PACING_STATE.name, "state"),
        prefetch=now.chosen(metrics.PREFETCH_MODE.name, "mode"),
        hottest_c=max(_all(now, metrics.DRIVE_TEMPERATURE), default=None),
        num_unavailable=now.value(metrics.CACHE_UNAVAILABLE.name),
        rss_bytes=now.value("process_resident_memory_bytes"),  # prometheus_client's own
    )


def _state(now: Look) -> str:
    if now.value(metrics.NODE_DRAINING.name) == 1:
        return "draining"
    ready = now.value(metrics.NODE_READY.name)
    return "not a node" if ready is None else "serving" if ready == 1 else "warming up"


def _label(now: Look, metric: metrics.Metric, label: str) -> str:
    return next((dict(labels)[label] for name, labels in now.values if name == metric.name), "")


def _all(now: Look, metric: metrics.Metric) -> list[float]:
    return [value for (name, _), value in now.values.items() if name == metric.name]


def _rate(before: Look | None, now: Look, metric: metrics.Metric) -> float | None:
    if before is None or now.at_s <= before.at_s:
        return None
    then, value = before.value(f"{metric.name}_total"), now.value(f"{metric.name}_total")
    if then is None or value is None or value < then:
        return None
    return (value - then) / (now.at_s - before.at_s)


def _quantile(before: Look | None, now: Look, metric: metrics.Metric, share: float) -> float | None:
    # The upper bound of the bucket that holds it: no more is known.
    if before is None:
        return None
    name = f"{metric.name}_bucket"
    grown = sorted(
        (float(dict(labels)["le"]), value - before.values.get((name, labels), 0.0))
        for (found, labels), value in now.values.items()
        if found == name
    )
    if not grown or grown[-1][1] <= 0:
        return None
    return next(bound for bound, count in grown if count >= share * grown[-1][1])
