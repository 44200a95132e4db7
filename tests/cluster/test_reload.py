"""A node that reads its configuration again: what changes, what stays, what never fails."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from urllib.request import urlopen

import grpc
import numpy as np
import pytest

from shoal import wire
from shoal.artifact import Artifact
from shoal.artifact.slicing import node_part, write_slice
from shoal.experts.executor import ExpertExecutor
from shoal.v1 import expert_pb2 as pb
from support.expert_node import RunningNode, Stream, connection, describe, reload, running_node
from support.streaming import call_of, expert_bytes, streaming_store
from support.tiny_model import make_tiny_artifact

pytestmark = pytest.mark.processes
LAYER = 1
MAX_LOOKS = 20_000  # at a node that is about to change; each look is a round trip


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_artifact(tmp_path_factory.mktemp("other"), quant="q8_0", seed=1)


@pytest.fixture(scope="module")
def expected(path: Path) -> Iterator[Callable[[list[int], int], np.ndarray]]:
    """What a row that goes to those experts gives in this process."""
    with streaming_store(path, None) as store:
        artifact = Artifact.open(path)
        executor = ExpertExecutor(artifact, store)
        yield lambda experts, seed: executor.compute(call_of(artifact, LAYER, experts, seed))


class Configured:
    """A node with a configuration file."""

    def __init__(self, node: RunningNode, channel: grpc.Channel, file: Path) -> None:
        self.node, self.channel, self.file = node, channel, file

    def write(self, **settings: object) -> None:
        """Put those settings into the file, whole."""
        write_settings(self.file, **settings)

    def reload(self, **settings: object) -> pb.ReloadReply:
        """Write, ask for a reload, and wait for it."""
        self.write(**settings)
        return reload(self.channel)

    def owned(self) -> list[tuple[int, int]]:
        """The ranges of experts that Describe names."""
        return [(o.first_expert, o.last_expert) for o in describe(self.channel).owned]

    def metric(self, name: str) -> float:
        """One sample of /metrics."""
        with urlopen(self.node.ready["metrics"], timeout=30) as response:
            lines = response.read().decode().splitlines()
        [value] = [line.rpartition(" ")[2] for line in lines if line.startswith(name + " ")]
        return float(value)

    def until(self, is_true: Callable[[], bool]) -> None:
        """Look until it is so."""
        for _ in range(MAX_LOOKS):
            if is_true():
                return
        raise AssertionError("it never came to be")


def write_settings(file: Path, **settings: object) -> None:
    lines = [f"{name.replace('_', '-')} = {json.dumps(value)}" for name, value in settings.items()]
    partial = file.with_suffix(".partial")
    partial.write_text("\n".join(lines))
    partial.replace(file)


@pytest.fixture(params=["fast", "grpcio"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def configured(path: Path, tmp_path: Path, transport: str) -> Iterator[Configured]:
    """A node that owns experts 0-3 by its file, on either transport."""
    file = tmp_path / "node.toml"
    write_settings(file, experts="0-3")
    flags = ["--config", str(file), "--transport", transport, "--log-format", "json"]
    flags += ["--threads", "1", "--metrics-listen", "127.0.0.1:0"]
    with (
        running_node(path, tmp_path / "log", *flags) as node,
        connection(node.target) as channel,
    ):
        yield Configured(node, channel, file)


only_fast = pytest.mark.parametrize("transport", ["fast"], indirect=True)


def sums(reply: pb.Reply, artifact: Artifact) -> np.ndarray:
    into = np.zeros((1, artifact.spec.model_dim), np.int64)
    wire.add_reply(reply, np.zeros(1, np.int32), artifact.grid(LAYER), into)
    return into


def test_a_reload_puts_the_file_in_force(configured: Configured, artifact: Artifact) -> None:
    small, before = 3 * expert_bytes(artifact), describe(configured.channel)
    reply = configured.reload(experts="4-9", cache=str(small), verify="always", log_level="debug")
    assert reply.error == ""
    assert sorted(reply.changed)[:3] == [
        f"cache: default -> {small / 1024:.2f} KiB",
        "experts: 0-3 -> 4-9",
        "log-level: info -> debug",
    ]
    assert configured.owned() == [(4, 9)]
    after = describe(configured.channel)
    assert after.instance_epoch == before.instance_epoch, "it is the same process"
    assert after.identity == before.identity and after.ready
    assert configured.metric("shoal_cache_budget_bytes") == small
    large = 6 * expert_bytes(artifact)
    assert configured.reload(experts="4-9", cache=str(large)).error == ""
    assert configured.metric("shoal_cache_budget_bytes") == large
    assert configured.metric('shoal_config_reloads_total{result="success"}') == 2


@only_fast
def test_sighup_is_a_reload(configured: Configured) -> None:
    configured.write(experts="7")
    configured.node.process.send_signal(signal.SIGHUP)
    configured.until(lambda: configured.owned() == [(7, 7)])


WRONG: list[tuple[dict[str, object], str]] = [
    ({"cash": "1GiB"}, "did you mean cache?"),
    ({"cache": "3"}, "two of the largest expert"),
    ({"experts": "0-999"}, "out of range"),
    ({"verify": "perhaps"}, "first, always, never"),
    ({"pin_experts": "/nowhere"}, "/nowhere"),
    ({"nvme_thermal_limit": 9}, "--nvme-thermal-limit"),
    ({"record_heat": "/nowhere/heat.json"}, "there is no folder /nowhere"),
    ({"cache": "9000TiB", "layers": "x"}, "--layers"),
]


@only_fast
def test_a_wrong_file_keeps_the_old_configuration_and_says_why(configured: Configured) -> None:
    for number, (settings, complaint) in enumerate(WRONG):
        reply = configured.reload(**{"experts": "5", "drain_timeout": 1.0} | settings)
        assert complaint in reply.error
        assert not reply.changed
        assert complaint in configured.node.log.read_text()
        assert configured.owned() == [(0, 3)], "nothing of it is in force"
        assert configured.metric("shoal_config_reload_success") == 0
        assert configured.metric('shoal_config_reloads_total{result="failure"}') == number + 1
    assert configured.reload(experts="5").error == ""
    assert configured.metric("shoal_config_reload_success") == 1


@only_fast
def test_what_needs_a_new_start_is_named_and_kept(configured: Configured) -> None:
    reply = configured.reload(
        experts="0-3", insecure=True, data_dir=["/tmp"], warmup=True, io="buffered"
    )
    assert reply.error == ""
    assert set(reply.kept) == {
        "data-dir: none -> /tmp",
        "io: default -> buffered",
        "warmup: False -> True",
        "insecure: False -> True",
    }
    assert configured.metric('shoal_read_backend{backend="buffered"}') == 1, "of what fits whole"
    reply = configured.reload(experts="0-3", threads=2, log_format="console")
    assert not reply.kept and not reply.changed, "flags win also at a reload"


@only_fast
def test_streams_from_before_are_served_as_they_were_promised(
    configured: Configured, artifact: Artifact, expected: Callable[[list[int], int], np.ndarray]
) -> None:
    """1. a stream opens; 2. the node comes to own others; 3. the stream calls the old ones."""
    stream = Stream(configured.channel)
    stream.open(describe(configured.channel))
    assert configured.reload(experts="8-15").error == ""
    assert configured.owned() == [(8, 15)]
    for call_id, experts in enumerate(([0, 3], [9, 15], [1, 2])):
        call = call_of(artifact, LAYER, experts, call_id)
        stream.send(wire.encode_call(call_id, 60_000, call))
        reply = stream.receive().reply
        assert (sums(reply, artifact) == expected(experts, call_id)).all()
    stream.send(wire.encode_call(9, 60_000, call_of(artifact, LAYER, [5], 0)))
    assert stream.receive().failure.code == pb.Failure.NOT_OWNED, "what was never owned is not"
    stream.cancel()


@only_fast
def test_a_slice_takes_the_place_of_another_while_calls_go_on(
    path: Path,
    artifact: Artifact,
    other_model: Path,
    tmp_path: Path,
    transport: str,
    expected: Callable[[list[int], int], np.ndarray],
) -> None:
    """1. a node serves one slice; 2. its file names another of the same model; 3. both answer."""
    slices = [tmp_path / "low.shoal", tmp_path / "high.shoal"]
    for out, experts in zip(slices, (range(8), range(8, 16)), strict=True):
        part = node_part(artifact.manifest, experts, None)
        write_slice(artifact, part, out, lambda _num_bytes: None, force=False)
    file = tmp_path / "node.toml"
    write_settings(file, model=str(slices[0]))
    flags = ("--config", str(file), "--threads", "1", "--metrics-listen", "127.0.0.1:0")
    env = {"MODEL_PATH": ""}
    with (
        running_node(None, tmp_path / "log", *flags, env=env) as node,
        connection(node.target) as channel,
    ):
        configured = Configured(node, channel, file)
        stream = Stream(channel)
        stream.open(describe(channel))
        assert configured.owned() == [(0, 7)]
        assert configured.reload(model=str(slices[1])).error == ""
        assert configured.owned() == [(8, 15)]
        for call_id, experts_called in enumerate(([0, 7], [8, 15])):
            call = call_of(artifact, LAYER, experts_called, call_id)
            stream.send(wire.encode_call(call_id, 60_000, call))
            found = sums(stream.receive().reply, artifact)
            assert (found == expected(experts_called, call_id)).all()
        refused = configured.reload(model=str(other_model))
        assert "another model" in refused.error and "start another node" in refused.error
        assert configured.owned() == [(8, 15)]
        stream.cancel()


@only_fast
def test_no_call_fails_in_a_storm_of_signals(
    configured: Configured, artifact: Artifact, expected: Callable[[list[int], int], np.ndarray]
) -> None:
    """1. calls flow on a stream; 2. each comes with a signal and another file; 3. all are right."""
    stream = Stream(configured.channel)
    stream.open(describe(configured.channel))
    size = expert_bytes(artifact)
    variants = [
        {"experts": "0-3", "cache": str(2 * size)},
        {"experts": "0-9", "cache": str(40 * size), "verify": "always"},
        {"experts": "2-5", "prefetch": "off", "max_read_bandwidth": "1GiB"},
        {"experts": "oops"},
        {"experts": "1", "pin_experts": "2", "log_level": "debug"},
    ]
    num_calls = 150
    for call_id, variant in zip(range(num_calls), (variants[n % 5] for n in count()), strict=False):
        configured.write(**variant)
        configured.node.process.send_signal(signal.SIGHUP)
        call = call_of(artifact, LAYER, [call_id % 4, (call_id + 1) % 4], call_id)
        stream.send(wire.encode_call(call_id, 60_000, call))
    for _ in range(num_calls):
        reply = stream.receive().reply
        experts = [reply.call_id % 4, (reply.call_id + 1) % 4]
        assert (sums(reply, artifact) == expected(experts, reply.call_id)).all()
    assert configured.reload(experts="0-1").error == ""
    assert configured.owned() == [(0, 1)]
    done = configured.metric('shoal_config_reloads_total{result="success"}')
    assert 1 <= done <= num_calls + 1
    stream.cancel()


@only_fast
def test_a_node_may_be_told_to_leave_while_it_reloads(configured: Configured) -> None:
    for number in range(10):
        configured.write(experts=str(number))
        configured.node.process.send_signal(signal.SIGHUP)
    assert configured.node.terminate() == 0


def test_a_node_whose_terminal_is_gone_leaves(path: Path, tmp_path: Path) -> None:
    """1. a node runs in a terminal; 2. somebody closes it; 3. that SIGHUP is no reload."""
    ours, terminal = os.openpty()
    command = [sys.executable, "-m", "expert_node", str(path), "--listen", "127.0.0.1:0"]
    try:
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=terminal,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            )
        os.close(terminal)
        assert process.stdout is not None
        with process.stdout as lines:
            assert lines.readline().startswith(b"ready")
    finally:
        os.close(ours)
    assert process.wait(60) == 0
    assert "the terminal is gone" in (tmp_path / "log").read_text()
