"""The columns of `shoal top`, the same on screen and on paper (core)."""

from collections.abc import Callable

from client.top.figures import NodeFigures

GIB = 2**30


def _number(value: float | None, pattern: str = "{:.0f}") -> str:
    return "-" if value is None else pattern.format(value)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _cache(node: NodeFigures) -> str:
    if node.cached_bytes is None or node.budget_bytes is None:
        return "-"
    return f"{node.cached_bytes / GIB:.2f} / {node.budget_bytes / GIB:.2f} GiB"


def _drive(node: NodeFigures) -> str:
    heat = "" if node.hottest_c is None else f" {node.hottest_c:.0f} °C"
    return f"{node.backend} {node.pacing}{heat}".strip() or "-"


def _state(node: NodeFigures) -> str:
    missing = node.num_unavailable
    return f"{node.state}, {missing:.0f} unavailable" if missing else node.state


COLUMNS: dict[str, Callable[[NodeFigures], str]] = {
    "state": _state,
    "experts": lambda node: str(node.num_owned),
    "calls/s": lambda node: _number(node.calls_per_s),
    "rows/s": lambda node: _number(node.rows_per_s),
    "held": lambda node: _number(node.calls_held),
    "hits": lambda node: _percent(node.hit_rate),
    "stalled": lambda node: _percent(node.stall_share),
    "cache": _cache,
    "read MB/s": lambda node: _number(
        None if node.read_bytes_per_s is None else node.read_bytes_per_s / 1e6
    ),
    "chunk p99 ms": lambda node: _number(
        None if node.chunk_p99_s is None else node.chunk_p99_s * 1e3, "{:.1f}"
    ),
    "queued": lambda node: _number(node.queued),
    "drive": _drive,
    "prefetch": lambda node: node.prefetch or "-",
    "RSS": lambda node: _number(
        None if node.rss_bytes is None else node.rss_bytes / GIB, "{:.2f} GiB"
    ),
}


def cells_of(figures: NodeFigures) -> list[str]:
    """Return a node's text for each column."""
    return [show(figures) for show in COLUMNS.values()]
