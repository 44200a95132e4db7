"""What a node tells Prometheus and probes, and what it records for the next start."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shoal import metrics, wire
from shoal.artifact import Artifact
from shoal.experts.heat import decode_heat
from shoal.experts.readers.read_queue import STEADY_DEPTH
from shoal.experts.routing_trace import decode_trace
from shoal.v1 import expert_pb2 as pb
from support.expert_node import (
    NodeDied,
    RunningNode,
    Stream,
    connection,
    describe,
    running_node,
    start_node,
)
from support.streaming import call_of, expert_bytes

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def node(
    path: Path, artifact: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningNode]:
    """A node whose cache holds a quarter of its experts."""
    log = tmp_path_factory.mktemp("node") / "log"
    flags = ("--cache", str(12 * expert_bytes(artifact)), "--metrics-listen", "127.0.0.1:0")
    with running_node(path, log, *flags, "--threads", "1") as running:
        yield running


def get(node: RunningNode, page: str = "/metrics", accept: str = "*/*") -> str:
    url = node.ready["metrics"].removesuffix("/metrics") + page
    with urlopen(Request(url, headers={"Accept": accept}), timeout=30) as response:
        text: str = response.read().decode()
    return text


def samples(node: RunningNode) -> dict[str, float]:
    """name{labels} -> value, labels in order of name."""
    found = {}
    for family in text_string_to_metric_families(get(node)):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def pass_through(node: RunningNode, artifact: Artifact, passes: list[list[int]]) -> None:
    """Send, for each pass, one row to those experts of every layer."""
    with connection(node.target) as channel:
        stream = Stream(channel)
        stream.open(describe(channel))
        calls = [(layer, experts) for experts in passes for layer in artifact.owned_experts]
        for call_id, (layer, experts) in enumerate(calls):
            call = call_of(artifact, layer, experts, call_id)
            stream.send(wire.encode_call(call_id, 60_000, call))
            assert stream.receive().reply.call_id == call_id
        stream.cancel()


def test_every_metric_is_exported_and_no_other(node: RunningNode) -> None:
    families = {f.name: f for f in text_string_to_metric_families(get(node))}
    ours = {name for name in families if not name.startswith("process_")}
    assert ours == {metric.name for metric in metrics.ALL}
    for metric in metrics.ALL:
        assert families[metric.name].type == metric.kind, metric.name
        assert families[metric.name].documentation == metric.help
        labels = {label for s in families[metric.name].samples for label in s.labels} - {"le"}
        assert not labels or labels == set(metric.labels), metric.name
    assert families["process_resident_memory_bytes"].samples[0].value > 1e6


def test_openmetrics_is_spoken_to_who_asks_for_it(node: RunningNode) -> None:
    assert get(node, accept="application/openmetrics-text").endswith("# EOF\n")


def test_figures_follow_what_is_called(node: RunningNode, artifact: Artifact) -> None:
    before = samples(node)
    pass_through(node, artifact, [[0, 1], [0, 1], [2, 3], [4, 5], [6, 7], [8, 9]])
    after = samples(node)

    def grew(name: str) -> float:
        return after[name] - before[name]

    num_layers = len(artifact.owned_experts)
    assert grew("shoal_node_calls_total") == grew("shoal_node_rows_total") == 6 * num_layers
    assert grew("shoal_cache_hits_total") + grew("shoal_cache_misses_total") == 12 * num_layers
    assert grew("shoal_cache_misses_total") >= 10 * num_layers
    assert grew("shoal_read_bytes_total") >= 10 * num_layers * expert_bytes(artifact)
    assert grew("shoal_cache_evictions_total") > 0
    assert after["shoal_cache_bytes"] <= after["shoal_cache_budget_bytes"]
    assert after["shoal_read_seconds_count"] == after["shoal_read_seconds_bucket{le=+Inf}"] > 0
    backends = [name for name in after if name.startswith("shoal_read_backend{")]
    assert len(backends) == 3 and sum(after[name] for name in backends) == 1
    [chosen] = [name.partition("{")[2].rstrip("}") for name in backends if after[name] == 1]
    [info] = [name for name in after if name.startswith("shoal_read_backend_info{")]
    assert info.startswith(f"shoal_read_backend_info{{{chosen},why=")
    assert after["shoal_read_queue_depth"] == STEADY_DEPTH, "nothing is queued"
    assert after["shoal_read_bounce_exhausted"] == after["shoal_read_unbounced_chunks_total"] == 0


def test_probes_are_answered(node: RunningNode) -> None:
    assert (get(node, "/health"), get(node, "/ready")) == ("ok\n", "ready\n")
    with pytest.raises(HTTPError, match="404"):
        get(node, "/nothing")


def test_a_metrics_port_that_is_taken_is_named(
    path: Path, node: RunningNode, tmp_path: Path
) -> None:
    taken = node.ready["metrics"].removeprefix("http://").removesuffix("/metrics")
    with pytest.raises(NodeDied, match="--metrics-listen") as caught:
        start_node(path, tmp_path / "log", "--metrics-listen", taken)
    assert caught.value.status == 4


def test_what_was_used_is_recorded_and_warms_the_next_start(
    path: Path, artifact: Artifact, tmp_path: Path
) -> None:
    """1. a node records; 2. it leaves; 3. another reads its heat, the hottest first, and pins."""
    heat_file = tmp_path / "heat.json"
    router = artifact.spec.layers[0].router
    assert router is not None and router.experts_per_token == 4
    passes = [[3, 14, 0, 1]] * 5 + [[3, 14, 7, 9]] * 2 + [[0, 3, 8, 5]]
    with running_node(path, tmp_path / "one", "--record-heat", str(heat_file)) as node:
        pass_through(node, artifact, passes)
        assert node.terminate() == 0
    heat = decode_heat(heat_file.read_bytes(), "heat")
    num_layers = len(artifact.owned_experts)
    assert heat.num_rows == len(passes) * num_layers
    counted = Counter(index for experts in passes for index in experts)
    assert all(
        counts.tolist() == [counted[i] for i in range(16)] for counts in heat.counts.values()
    )
    assert [index for _, index in heat.hottest()][: 2 * num_layers] == [3] * num_layers + [14] * 3
    trace = decode_trace(heat_file.with_suffix(".routing").read_bytes(), "trace")
    [segment] = trace.segments
    assert segment.experts.tolist() == [[sorted(experts)] * num_layers for experts in passes]
    assert trace.identity == artifact.identity

    size = expert_bytes(artifact)
    flags = ["--warmup-from", str(heat_file), "--cache", str(7 * size), "--pin-experts", "3"]
    flags += ["--metrics-listen", "127.0.0.1:0", "--prefetch", "off"]
    with running_node(path, tmp_path / "two", *flags) as node:
        warm = samples(node)
        assert warm["shoal_cache_experts"] == 7
        assert warm["shoal_cache_pinned_bytes"] == 3 * size
        pass_through(node, artifact, [[3, 14]])
        assert samples(node)["shoal_cache_hits_total"] == 2 * num_layers, "3 and 14 are the hottest"


def test_a_heat_map_of_another_model_is_refused(
    path: Path, artifact: Artifact, tmp_path: Path
) -> None:
    heat_file = tmp_path / "heat.json"
    other = "f" * 64
    text = f'{{"counts":[],"format":"shoal-heat-1","identity":"{other}","rows":0}}'
    heat_file.write_text(text)
    for flag in ("--warmup-from", "--record-heat", "--pin-experts"):
        with pytest.raises(NodeDied, match="another model") as caught:
            start_node(path, tmp_path / "log", flag, str(heat_file))
        assert caught.value.status == 2 and flag in caught.value.stderr
    assert heat_file.read_text() == text, "what it cannot go on from is not overwritten"


def test_a_file_that_cannot_be_written_costs_a_warning_and_no_call(
    path: Path, artifact: Artifact, tmp_path: Path
) -> None:
    """1. a node records into a folder; 2. the folder goes; 3. calls are answered; 4. it leaves."""
    folder = tmp_path / "heat"
    folder.mkdir()
    flags = ("--record-heat", str(folder / "heat.json"))
    with running_node(path, tmp_path / "log", *flags) as node:
        pass_through(node, artifact, [[0, 1]])
        folder.rmdir()
        pass_through(node, artifact, [[0, 1]])
        assert node.terminate() == 0
        assert "heat not written: calls are served all the same" in node.log.read_text()


def test_a_draining_node_is_not_ready(path: Path, artifact: Artifact, tmp_path: Path) -> None:
    """1. calls are in flight; 2. SIGTERM; 3. /ready says no before the node is gone."""
    flags = ("--metrics-listen", "127.0.0.1:0", "--threads", "1")
    with running_node(path, tmp_path / "log", *flags) as node, connection(node.target) as channel:
        stream = Stream(channel)
        stream.open(describe(channel), pb.LANE_BULK)
        assert get(node, "/ready") == "ready\n"
        node.process.terminate()
        assert stream.receive().WhichOneof("frame") == "draining"
        with pytest.raises((HTTPError, OSError)):
            get(node, "/ready")
