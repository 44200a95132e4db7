"""What a node exports to Prometheus: its parts' figures, under the names of `shoal.metrics`.

Nothing counts for the sake of metrics: a scrape asks the parts for the figures that they keep
anyway. The parts know nothing of Prometheus.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from expert_node.heat_keeper import HeatFigures
from expert_node.pace_keeper import PaceView
from expert_node.reload import ReloadFigures
from expert_node.session import NodeFacts
from shoal import __version__, metrics
from shoal.experts.options import Backend, Mode
from shoal.experts.pacing import PacingState
from shoal.experts.prefetch.governor import State
from shoal.experts.prefetch.interface import PrefetchFigures
from shoal.experts.readers import LATENCY_BOUNDS_S, ReaderFigures
from shoal.experts.store import StoreFigures

GOVERNOR_STATES = (*State, "forced")


@dataclass(frozen=True, slots=True)
class NodeView:
    """What the node itself knows at a scrape."""

    facts: NodeFacts
    is_ready: bool
    is_draining: bool
    calls_held: int
    num_calls: int
    num_rows: int
    owned_experts: int
    owned_bytes: int
    memory_limit_bytes: int
    tls_expires_s: float  # Unix time; 0.0: no TLS


@dataclass(frozen=True, slots=True)
class Sources:
    """Whom a scrape asks. All are called on the scrape's thread."""

    node: Callable[[], NodeView]
    store: Callable[[], StoreFigures]
    pace: Callable[[], PaceView]
    prefetch: Callable[[], PrefetchFigures]
    reloads: Callable[[], ReloadFigures]
    heat: Callable[[], HeatFigures]


class NodeCollector(Collector):
    """Turns figures into metric families, at each scrape anew."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry need not ask at registration."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yield every family of `shoal.metrics`."""
        store = self._sources.store()
        yield from _node(self._sources.node())
        yield from _cache(store)
        if store.reader is not None:
            yield from _reader(store.reader)
        yield from _prefetch(store, self._sources.prefetch())
        yield from _pace(self._sources.pace())
        yield from _reloads(self._sources.reloads())
        heat = self._sources.heat()
        yield _one(metrics.TRACE_DROPPED, heat.num_dropped)
        yield _one(metrics.HEAT_FAILURES, heat.num_failures)


def make_registry(sources: Sources) -> CollectorRegistry:
    """Return a registry of a node's figures and of its process's (memory, CPU, files)."""
    registry = CollectorRegistry()
    registry.register(NodeCollector(sources))
    ProcessCollector(registry=registry)
    return registry


def _family(metric: metrics.Metric, samples: Iterable[tuple[Sequence[str], float]]) -> Metric:
    make = CounterMetricFamily if metric.kind is metrics.Kind.COUNTER else GaugeMetricFamily
    family = make(metric.name, metric.help, labels=metric.labels)
    for labels, value in samples:
        family.add_metric(labels, value)
    return family


def _one(metric: metrics.Metric, value: float) -> Metric:
    return _family(metric, [((), value)])


def _which(metric: metrics.Metric, names: Iterable[str], chosen: str) -> Metric:
    return _family(metric, [((name,), float(name == chosen)) for name in names])


def _histogram(metric: metrics.Metric, counts: Sequence[int], sum_s: float) -> Metric:
    family = HistogramMetricFamily(metric.name, metric.help)
    buckets, total = [], 0
    for bound, count in zip((*map(str, LATENCY_BOUNDS_S), "+Inf"), counts, strict=True):
        total += count
        buckets.append((bound, total))
    family.add_metric((), buckets, sum_s)
    return family


def _node(view: NodeView) -> Iterator[Metric]:
    facts = view.facts
    who = (__version__, facts.model_name, facts.identity, facts.numerics)
    yield _family(
        metrics.NODE_INFO, [((*who, facts.quantisation, facts.isa, facts.instance_epoch), 1)]
    )
    yield _one(metrics.NODE_READY, view.is_ready)
    yield _one(metrics.NODE_DRAINING, view.is_draining)
    yield _one(metrics.NODE_CALLS_HELD, view.calls_held)
    yield _one(metrics.NODE_CALLS, view.num_calls)
    yield _one(metrics.NODE_ROWS, view.num_rows)
    yield _one(metrics.NODE_OWNED_EXPERTS, view.owned_experts)
    yield _one(metrics.NODE_OWNED_BYTES, view.owned_bytes)
    yield _one(metrics.NODE_MEMORY_LIMIT, view.memory_limit_bytes)
    yield _one(metrics.NODE_TLS_EXPIRES, view.tls_expires_s)


def _cache(store: StoreFigures) -> Iterator[Metric]:
    yield _one(metrics.CACHE_HITS, store.hits)
    yield _one(metrics.CACHE_MISSES, store.misses)
    yield _one(metrics.CACHE_JOINED, store.joined)
    yield _one(metrics.CACHE_EVICTIONS, store.evictions)
    yield _one(metrics.CACHE_EXPERTS, store.num_resident)
    yield _one(metrics.CACHE_BYTES, store.resident_bytes)
    yield _one(metrics.CACHE_PINNED_BYTES, store.pinned_bytes)
    yield _one(metrics.CACHE_BUDGET_BYTES, store.budget_bytes)
    yield _one(metrics.CACHE_POPULATED, store.populated_bytes)
    yield _one(metrics.CACHE_STALL, store.stall_s)
    yield _one(metrics.CACHE_WAITING, store.num_waiting)
    yield _one(metrics.CACHE_LOADING, store.num_loading)
    yield _one(metrics.CACHE_VERIFIED, store.num_verified)
    yield _one(metrics.CACHE_CORRUPT, store.num_corrupt)
    yield _one(metrics.CACHE_UNAVAILABLE, len(store.unavailable))


def _reader(reader: ReaderFigures) -> Iterator[Metric]:
    yield _which(metrics.READ_BACKEND, Backend, reader.backend)
    yield _family(metrics.READ_WHY, [((reader.backend, reader.reasons), 1)])
    yield _one(metrics.READ_READS, reader.num_reads)
    yield _one(metrics.READ_BYTES, reader.num_bytes)
    yield _one(metrics.READ_PREFETCH_BYTES, reader.prefetch_bytes)
    yield _one(metrics.READ_ERRORS, reader.num_errors)
    yield _one(metrics.READ_RETRIES, reader.num_retries)
    yield _one(metrics.READ_CANCELLED, reader.num_cancelled)
    yield _one(metrics.READ_IN_FLIGHT, reader.in_flight)
    yield _one(metrics.READ_QUEUED, reader.queued)
    yield _one(metrics.READ_DEPTH, reader.depth_now)
    yield _one(metrics.READ_LIMIT, reader.bytes_per_s or 0)
    yield _one(metrics.READ_BUFFERED, reader.num_buffered)
    yield _one(metrics.READ_BOUNCED, reader.num_bounced)
    yield _one(metrics.READ_BOUNCE_BUFFERS, reader.bounce_buffers)
    yield _one(metrics.READ_BOUNCE_EXHAUSTED, reader.is_bounce_exhausted)
    yield _one(metrics.READ_UNBOUNCED, reader.num_unbounced)
    yield _one(metrics.READ_FALLBACK_FILES, len(reader.fallbacks))
    yield _histogram(metrics.READ_CHUNK_SECONDS, reader.chunk_latency, reader.chunk_latency_sum_s)
    yield _histogram(metrics.READ_SECONDS, reader.read_latency, reader.read_latency_sum_s)


def _prefetch(store: StoreFigures, prefetch: PrefetchFigures) -> Iterator[Metric]:
    reads = (store.prefetch_issued, store.prefetch_used, store.prefetch_wasted)
    num_bytes = (
        store.prefetch_issued_bytes,
        store.prefetch_used_bytes,
        store.prefetch_wasted_bytes,
    )
    for metric, values in ((metrics.PREFETCH_READS, reads), (metrics.PREFETCH_BYTES, num_bytes)):
        results = zip(("issued", "used", "wasted"), values, strict=True)
        yield _family(metric, [((result,), value) for result, value in results])
    yield _which(metrics.PREFETCH_MODE, Mode, prefetch.mode)
    phases = (
        ("decode", prefetch.decode_state),
        ("prefill", prefetch.prefill_state),
        ("hints", prefetch.hint_state),
    )
    yield _family(
        metrics.PREFETCH_STATE,
        [
            ((phase, state), float(state == now))
            for phase, now in phases
            for state in GOVERNOR_STATES
        ],
    )
    yield _one(metrics.PREFETCH_HINTED, prefetch.hinted_experts)
    yield _one(metrics.PREFETCH_SWITCHES, prefetch.switches)
    yield _one(metrics.PREFETCH_SAVED, prefetch.stall_saved_s)
    predictors = sorted(prefetch.predictors.items())
    yield _family(metrics.PREFETCH_RECALL, [((name,), f.recall) for name, f in predictors])
    yield _family(metrics.PREFETCH_PRECISION, [((name,), f.precision) for name, f in predictors])


def _pace(view: PaceView) -> Iterator[Metric]:
    yield _family(
        metrics.DRIVE_TEMPERATURE, [((each.drive,), each.celsius) for each in view.temperatures]
    )
    yield _which(metrics.PACING_STATE, PacingState, view.pace.state)
    yield _one(metrics.PACING_PREFETCH, view.pace.allows_prefetch)


def _reloads(reloads: ReloadFigures) -> Iterator[Metric]:
    counts = (("success", reloads.num_succeeded), ("failure", reloads.num_failed))
    yield _family(metrics.RELOADS, [((result,), count) for result, count in counts])
    yield _one(metrics.RELOAD_OK, reloads.was_last_ok)
    yield _one(metrics.RELOAD_TIME, reloads.succeeded_at_s)
