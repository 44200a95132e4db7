"""Every metric that shoal exports: its name, kind, labels and meaning (core).

docs/metrics.md is the same list for people; a test compares the two. Counters are exported with the
suffix `_total`, histograms with `_bucket`, `_sum` and `_count`, as Prometheus does.
"""

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One name; `labels` in the order in which values are given."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()


def _counter(name: str, text: str, *labels: str) -> Metric:
    return Metric(name, Kind.COUNTER, text, labels)


def _gauge(name: str, text: str, *labels: str) -> Metric:
    return Metric(name, Kind.GAUGE, text, labels)


def _histogram(name: str, text: str) -> Metric:
    return Metric(name, Kind.HISTOGRAM, text)


# The node
NODE_INFO = _gauge(
    "shoal_node_info",
    "always 1; the labels say who this node is",
    *("version", "model", "identity", "numerics", "quantisation", "isa", "instance_epoch"),
)
NODE_READY = _gauge("shoal_node_ready", "1 once it serves, after the warm-up if there is one")
NODE_DRAINING = _gauge("shoal_node_draining", "1 while it finishes its calls before it leaves")
NODE_CALLS_HELD = _gauge("shoal_node_calls_held", "expert calls that wait or are computed")
NODE_CALLS = _counter("shoal_node_calls", "expert calls taken in since the start")
NODE_ROWS = _counter("shoal_node_rows", "rows of these calls")
NODE_OWNED_EXPERTS = _gauge("shoal_node_owned_experts", "experts owned, over all layers")
NODE_OWNED_BYTES = _gauge("shoal_node_owned_bytes", "bytes of the experts owned")
NODE_MEMORY_LIMIT = _gauge(
    "shoal_node_memory_limit_bytes",
    "memory this process may use: installed, or its control group's",
)
NODE_TLS_EXPIRES = _gauge(
    "shoal_node_tls_expires_timestamp_seconds",
    "the Unix time at which the certificate that it shows expires; 0 without TLS",
)

# The expert cache
CACHE_HITS = _counter("shoal_cache_hits", "experts that calls found in memory")
CACHE_MISSES = _counter("shoal_cache_misses", "experts that calls had to wait for")
CACHE_JOINED = _counter("shoal_cache_joined", "misses whose read was under way already")
CACHE_EVICTIONS = _counter("shoal_cache_evictions", "experts that made room for others")
CACHE_EXPERTS = _gauge("shoal_cache_experts", "experts in memory")
CACHE_BYTES = _gauge("shoal_cache_bytes", "bytes of the experts in memory")
CACHE_PINNED_BYTES = _gauge("shoal_cache_pinned_bytes", "the part of them that is never evicted")
CACHE_BUDGET_BYTES = _gauge("shoal_cache_budget_bytes", "bytes that experts may take (--cache)")
CACHE_POPULATED = _counter(
    "shoal_cache_populated_bytes", "bytes of its memory that were made ready ahead of use"
)
CACHE_STALL = _counter(
    "shoal_cache_stall_seconds", "time that calls waited for reads with nothing to compute"
)
CACHE_WAITING = _gauge("shoal_cache_calls_waiting", "calls that wait for a read now")
CACHE_LOADING = _gauge("shoal_cache_loading", "experts being read or queued to be")
CACHE_VERIFIED = _counter("shoal_cache_verified", "experts whose hash was compared after a read")
CACHE_CORRUPT = _counter("shoal_cache_corrupt", "experts whose hash was not the manifest's")
CACHE_UNAVAILABLE = _gauge("shoal_cache_unavailable", "experts whose last read failed")

# Reads from drives
READ_BACKEND = _gauge("shoal_read_backend", "1 for the way in which files are read", "backend")
READ_WHY = _gauge(
    "shoal_read_backend_info",
    "always 1; why it is no better way, of the backend and of single files",
    *("backend", "why"),
)
READ_READS = _counter("shoal_read_reads", "experts read, demanded or not")
READ_BYTES = _counter("shoal_read_bytes", "bytes read from drives")
READ_PREFETCH_BYTES = _counter("shoal_read_prefetch_bytes", "the part of them nobody waited for")
READ_ERRORS = _counter("shoal_read_errors", "reads that failed after all retries")
READ_RETRIES = _counter("shoal_read_retries", "chunks that were tried again")
READ_CANCELLED = _counter("shoal_read_cancelled", "reads given up before the drive began them")
READ_IN_FLIGHT = _gauge("shoal_read_in_flight", "chunks at the drives")
READ_QUEUED = _gauge("shoal_read_queued", "chunks that wait for a place there")
READ_DEPTH = _gauge("shoal_read_queue_depth", "chunks that may be at the drives together now")
READ_LIMIT = _gauge("shoal_read_limit_bytes_per_second", "what reads are held to; 0: no limit")
READ_BUFFERED = _counter(
    "shoal_read_buffered_chunks", "chunks read through the page cache for want of O_DIRECT"
)
READ_BOUNCED = _counter("shoal_read_bounced_chunks", "chunks copied for the sake of alignment")
READ_BOUNCE_BUFFERS = _gauge("shoal_read_bounce_buffers", "buffers for such chunks")
READ_BOUNCE_EXHAUSTED = _gauge(
    "shoal_read_bounce_exhausted", "1 while there may be no more of them and all are in use"
)
READ_UNBOUNCED = _counter(
    "shoal_read_unbounced_chunks", "chunks read through the page cache for want of such a buffer"
)
READ_FALLBACK_FILES = _gauge(
    "shoal_read_fallback_files", "files read in a lesser way than the backend's"
)
READ_CHUNK_SECONDS = _histogram(
    "shoal_read_chunk_seconds", "one chunk, from the drive's queue to memory"
)
READ_SECONDS = _histogram("shoal_read_seconds", "one expert, from the wish to the last chunk")

# Pacing
DRIVE_TEMPERATURE = _gauge(
    "shoal_drive_temperature_celsius", "what the drive's sensor says", "drive"
)
PACING_STATE = _gauge(
    "shoal_pacing_state", "1 for what holds reads back: full, slow, warm, hot", "state"
)
PACING_PREFETCH = _gauge("shoal_pacing_allows_prefetch", "0 while only demanded experts are read")

# Prefetch
PREFETCH_READS = _counter(
    "shoal_prefetch_reads", "by what became of them: issued, used, wasted", "result"
)
PREFETCH_BYTES = _counter(
    "shoal_prefetch_bytes", "by what became of them: issued, used, wasted", "result"
)
PREFETCH_MODE = _gauge("shoal_prefetch_mode", "1 for the mode in force (--prefetch)", "mode")
PREFETCH_STATE = _gauge(
    "shoal_prefetch_governor",
    "1 for the governor's state (decode, prefill, hints): learn, trial, on, off, forced",
    "phase",
    "state",
)
PREFETCH_HINTED = _counter(
    "shoal_prefetch_hinted_reads", "of the issued ones, those that a coordinator's hint had named"
)
PREFETCH_SWITCHES = _counter("shoal_prefetch_switches", "times a governor went on or off")
PREFETCH_SAVED = _gauge(
    "shoal_prefetch_stall_saved_seconds", "stall saved, by the governor's comparison"
)
PREFETCH_RECALL = _gauge(
    "shoal_prefetch_recall", "share of called experts that were foreseen", "predictor"
)
PREFETCH_PRECISION = _gauge(
    "shoal_prefetch_precision", "share of admitted guesses that were called", "predictor"
)

# Configuration and recording
RELOADS = _counter("shoal_config_reloads", "by result: success, failure", "result")
RELOAD_OK = _gauge("shoal_config_reload_success", "0 if the last reload was refused")
RELOAD_TIME = _gauge(
    "shoal_config_reload_timestamp_seconds", "of the last one that succeeded; 0: none"
)
TRACE_DROPPED = _counter(
    "shoal_trace_dropped_rows", "rows that the routing trace lacks: calls that made no whole pass"
)
HEAT_FAILURES = _counter(
    "shoal_heat_write_failures", "times that --record-heat could not be written"
)

ALL: tuple[Metric, ...] = tuple(
    value for value in list(globals().values()) if isinstance(value, Metric)
)

assert len({metric.name for metric in ALL}) == len(ALL), "two metrics of one name"
