"""What `shoal top` makes of two looks at a node's metrics."""

import pytest

from client.top.columns import COLUMNS, cells_of
from client.top.figures import figures_of, parse_look
from client.top.scrape import watch
from shoal.errors import UsageError

PAGE = """\
# TYPE shoal_node_info gauge
shoal_node_info{{model="tiny",isa="avx2"}} 1
# TYPE shoal_node_ready gauge
shoal_node_ready {ready}
# TYPE shoal_node_draining gauge
shoal_node_draining 0
# TYPE shoal_node_calls counter
shoal_node_calls_total {calls}
# TYPE shoal_cache_hits counter
shoal_cache_hits_total {hits}
# TYPE shoal_cache_misses counter
shoal_cache_misses_total {misses}
# TYPE shoal_read_backend gauge
shoal_read_backend{{backend="pread"}} 0
shoal_read_backend{{backend="io_uring"}} 1
# TYPE shoal_read_chunk_seconds histogram
shoal_read_chunk_seconds_bucket{{le="0.001"}} {fast}
shoal_read_chunk_seconds_bucket{{le="0.004"}} {all}
shoal_read_chunk_seconds_bucket{{le="+Inf"}} {all}
shoal_read_chunk_seconds_count {all}
shoal_read_chunk_seconds_sum 1
"""


def page(calls: int, hits: int = 0, misses: int = 0, fast: int = 0, total: int = 0) -> str:
    return PAGE.format(ready=1, calls=calls, hits=hits, misses=misses, fast=fast, all=total)


def test_rates_are_growth_over_the_time_between_two_looks() -> None:
    before = parse_look(page(100, hits=10, misses=10, fast=500, total=500), 10.0)
    now = parse_look(page(160, hits=40, misses=20, fast=590, total=600), 12.0)
    figures = figures_of(before, now)
    assert (figures.state, figures.model, figures.isa) == ("serving", "tiny", "avx2")
    assert figures.calls_per_s == 30
    assert figures.hit_rate == 0.75
    assert figures.backend == "io_uring"
    assert figures.chunk_p99_s == 0.004  # 90 of the 100 new ones are in the first bucket


def test_a_restart_between_two_looks_is_no_rate() -> None:
    figures = figures_of(parse_look(page(100), 1.0), parse_look(page(5), 2.0))
    assert figures.calls_per_s is None
    assert figures_of(None, parse_look(page(5), 2.0)).calls_per_s is None


def test_an_idle_node_has_no_hit_rate_and_no_percentile() -> None:
    look = parse_look(page(1, hits=5, misses=5, fast=5, total=5), 1.0)
    figures = figures_of(look, parse_look(page(1, hits=5, misses=5, fast=5, total=5), 2.0))
    assert figures.hit_rate is None and figures.chunk_p99_s is None
    assert len(cells_of(figures)) == len(COLUMNS)


def test_a_page_that_is_no_nodes_is_told_apart() -> None:
    assert figures_of(None, parse_look("up 1\n", 1.0)).state == "not a node"
    with pytest.raises(ValueError, match="not Prometheus"):
        parse_look("<html>{{{", 1.0)


@pytest.mark.parametrize("address", ["nodes", "ftp://a:1", "host:", "http://:9", "a:99999999"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="--metrics-listen"):
        watch([address])


def test_an_address_is_taken_as_typed_or_as_a_url() -> None:
    urls = [node.url for node in watch(["a:9100", "http://b:1/", "https://[::1]:7/m"])]
    assert urls == ["http://a:9100/metrics", "http://b:1/metrics", "https://[::1]:7/m"]
