"""What a node serves, and how that changes: checked before, undone after, former ones linger."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from expert_node.config import NodeConfig, parse_listen
from expert_node.pins import pins_of, warm_up_order
from expert_node.served import GRACE, Served, check_memory, owned_by
from shoal.artifact import Artifact
from shoal.artifact.slicing import node_part, write_slice
from shoal.errors import CorruptArtifact, NotOwned, UsageError
from shoal.experts.heat import HeatMap, encode_heat
from shoal.experts.options import Mode, Verify
from shoal.experts.ownership import Ownership
from shoal.memory_limit import MemoryLimit
from support.streaming import expert_bytes
from support.tiny_model import make_tiny_artifact

GIB = 1024**3


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return Artifact.open(make_tiny_artifact(tmp_path_factory.mktemp("model"), quant="q8_0"))


@pytest.fixture
def config(artifact: Artifact) -> NodeConfig:
    return NodeConfig(artifact.path, parse_listen("127.0.0.1:0"), experts="0-3", prefetch=Mode.OFF)


@pytest.fixture
def served(artifact: Artifact, config: NodeConfig) -> Iterator[Served]:
    served = Served(config, artifact, owned_by(artifact, config), None)
    yield served
    served.close()


def change(served: Served, config: NodeConfig, *streams: int, **settings: object) -> list[str]:
    new = dataclasses.replace(config, **settings)  # type: ignore[arg-type]
    return served.carry_out(served.plan(new, None), streams)


def serves(served: Served, index: int) -> bool:
    """Whether a call for that expert of layer 0 is taken, and answered."""
    try:
        served.store.ownership.check(0, [index])
        with served.store.acquire(0, [index]) as got:
            return [len(wave.weights) for wave in got] == [1]
    except NotOwned:
        return False


def test_former_experts_are_served_until_nobody_can_know_of_them(
    served: Served, config: NodeConfig
) -> None:
    """1. streams 1, 2; 2. ownership moves; 3. stream 3 opens in the grace; 4. all end."""
    changed = change(served, config, 1, 2, experts="8-11")
    assert changed == ["owned: experts 0-3 of layers 0-2 -> experts 8-11 of layers 0-2"]
    assert [owned.first_expert for owned in served.facts.owned] == [8]
    served.on_stream(3)
    for stream_id in (1, 2, 3):
        assert served.on_stream_end(stream_id)
        served.settle()
        assert serves(served, 0) and serves(served, 8)
    assert served.on_stream_end(GRACE)
    served.settle()
    assert not serves(served, 0) and serves(served, 8)
    served.on_stream(4)
    assert not served.lingers, "who opens a stream now has heard of the new ranges"


def test_a_stream_that_saw_two_changes_is_served_all_that_it_was_promised(
    served: Served, config: NodeConfig
) -> None:
    change(served, config, 1, experts="4-7")
    change(served, config, 1, 2, experts="8-11")
    served.on_stream_end(GRACE)
    assert all(serves(served, index) for index in (0, 4, 8))
    served.on_stream_end(1)
    served.settle()
    assert [serves(served, index) for index in (0, 4, 8)] == [False, True, True]


def test_a_storm_of_changes_between_two_ranges_does_not_pile_up(
    served: Served, config: NodeConfig
) -> None:
    for number in range(20):
        change(served, config, 1, experts="4-7" if number % 2 else "8-11")
    assert max(map(len, served._lingering.values())) == 3, "0-3, 4-7 and 8-11"
    assert all(serves(served, index) for index in (0, 4, 8))


def test_what_a_replaced_slice_lacks_is_not_read_from_it(
    artifact: Artifact, tmp_path: Path
) -> None:
    """1. a node serves a slice; 2. another takes its place on disk; 3. a stream is still on."""
    path = tmp_path / "slice.shoal"
    for_all = NodeConfig(path, parse_listen("127.0.0.1:0"), verify=Verify.NEVER)

    def write(experts: range) -> Artifact:
        part = node_part(artifact.manifest, experts, None)
        write_slice(artifact, part, path, lambda _num_bytes: None, force=True)
        return Artifact.open(path)

    opened = write(range(8))
    served = Served(for_all, opened, owned_by(opened, for_all), None)
    write(range(4, 12))
    with closing(served):
        assert change(served, for_all, 1) != []
        served.settle()
        assert [serves(served, index) for index in (0, 3, 4, 11)] == [False, False, True, True]


def test_a_change_that_fails_midway_is_undone(
    served: Served, config: NodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = served.plan(dataclasses.replace(config, experts="8-11"), None)

    def no_memory(_num_bytes: int | None) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(served.store, "resize", no_memory)
        with pytest.raises(MemoryError):
            served.carry_out(plan, [1])
    assert str(served.ownership) == "experts 0-3 of layers 0-2"
    assert serves(served, 0)
    assert change(served, config, experts="1") != []


def test_the_first_error_of_a_change_is_told_also_where_undoing_it_fails(
    served: Served, config: NodeConfig, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: Exception) -> Callable[..., None]:
        def failing(*_: object) -> None:
            raise error

        return failing

    with monkeypatch.context() as patch:
        patch.setattr(served.store, "resize", fail(MemoryError("no room")))
        patch.setattr(served.store, "rebind", fail(OSError("gone")))
        with pytest.raises(MemoryError):
            change(served, config, cache_bytes=3 * expert_bytes(artifact))
    assert serves(served, 0)
    assert change(served, config, experts="1") != []


def test_a_node_of_one_expert_needs_no_cache_of_two(artifact: Artifact, config: NodeConfig) -> None:
    one = expert_bytes(artifact)
    config = dataclasses.replace(config, experts="0", layers="1", cache_bytes=one)
    with closing(Served(config, artifact, owned_by(artifact, config), None)) as served:
        with served.store.acquire(1, [0]) as got:
            assert [len(wave.weights) for wave in got] == [1]
        with pytest.raises(UsageError, match=r"two of the largest expert.*--cache"):
            served.plan(dataclasses.replace(config, experts="0-1"), None)


def test_a_file_that_was_written_anew_is_read_anew(
    served: Served, config: NodeConfig, artifact: Artifact
) -> None:
    assert change(served, config) == []
    file = artifact.path / "experts/layer-001.safetensors"
    data = file.read_bytes()
    partial = file.with_suffix(".partial")
    partial.write_bytes(data)
    partial.replace(file)
    assert change(served, config) == [f"artifact: read again from {artifact.path}"]
    assert serves(served, 2)


def test_a_copy_in_a_data_directory_that_was_replaced_is_opened_anew(
    artifact: Artifact, config: NodeConfig, tmp_path: Path
) -> None:
    """1. a layer is served from a copy; 2. a damaged file takes its name; 3. a reload sees it."""
    copy = (
        shutil.copytree(artifact.path / "experts", tmp_path / "experts") / "layer-001.safetensors"
    )
    config = dataclasses.replace(config, data_dirs=(tmp_path,))
    served = Served(config, artifact, owned_by(artifact, config), None)
    with closing(served):
        assert change(served, config) == []
        damaged = bytes(byte ^ 1 for byte in copy.read_bytes())
        (tmp_path / "other").write_bytes(damaged)
        (tmp_path / "other").replace(copy)
        assert change(served, config) == [f"artifact: read again from {artifact.path}, {tmp_path}"]
        with served.store.acquire(1, [2]) as got, pytest.raises(CorruptArtifact, match="expert 2 "):
            list(got)
        copy.write_bytes(b"short")
        with pytest.raises(CorruptArtifact, match="5 bytes"):
            served.plan(config, None)


def test_the_budget_follows_what_is_owned_unless_a_cache_is_named(
    served: Served, config: NodeConfig, artifact: Artifact
) -> None:
    size = expert_bytes(artifact)
    assert served.store.figures().budget_bytes == 4 * 3 * size
    change(served, config, experts="0-7")
    assert served.store.figures().budget_bytes == 8 * 3 * size
    change(served, config, experts="0-7", cache_bytes=5 * size, verify=Verify.ALWAYS)
    assert served.store.figures().budget_bytes == 5 * size
    change(served, config, experts="0-7")
    assert served.store.figures().budget_bytes == 8 * 3 * size


def test_a_prefetcher_comes_and_goes_with_the_need_for_it(
    served: Served, config: NodeConfig, artifact: Artifact
) -> None:
    small = 3 * expert_bytes(artifact)
    assert served.prefetcher is None
    change(served, config, prefetch=Mode.MARKOV)
    assert served.prefetcher is None, "all experts fit"
    change(served, config, prefetch=Mode.MARKOV, cache_bytes=small)
    first = served.prefetcher
    assert first is not None and served.prefetch_figures().mode is Mode.MARKOV
    change(served, config, prefetch=Mode.MARKOV, cache_bytes=small, verify=Verify.NEVER)
    assert served.prefetcher is first
    change(served, config, prefetch=Mode.OFF, cache_bytes=small)
    assert served.prefetcher is None and served.prefetch_figures().mode is Mode.OFF


def test_experts_that_cannot_fit_are_refused_with_the_numbers(artifact: Artifact) -> None:
    ownership = Ownership(artifact.owned_experts)
    tight = MemoryLimit(150 << 20, "the control group's limit (/x/memory.max)")
    with pytest.raises(UsageError) as caught:
        check_memory(artifact, ownership, None, tight)
    for words in ("48 experts take 768.00 KiB", "/x/memory.max) is 150.00 MiB", "--cache"):
        assert words in str(caught.value)
    with pytest.raises(UsageError, match="--cache takes"):
        check_memory(artifact, ownership, 1 << 18, tight)
    roomy = MemoryLimit(2 * GIB, "this machine's memory")
    assert check_memory(artifact, ownership, 8 * GIB, roomy) is roomy, (
        "a cache is no larger than all"
    )


def heat(artifact: Artifact, **counts: int) -> HeatMap:
    layers = {layer: np.zeros(16, np.int64) for layer in artifact.owned_experts}
    for name, count in counts.items():
        layer, _, index = name[1:].partition("_")
        layers[int(layer)][int(index)] = count
    return HeatMap(artifact.identity, 9, layers)


def test_a_number_pins_the_hottest_that_are_owned(artifact: Artifact) -> None:
    known = heat(artifact, e0_5=3, e1_2=9, e2_9=7, e0_1=5)
    ownership = Ownership({0: range(16), 1: range(16)})
    assert pins_of(2, artifact, ownership, known, None) == ((1, 2), (0, 1))
    assert pins_of(2, artifact, ownership, None, None) == ()
    assert pins_of(None, artifact, ownership, known, None) == ()
    order = warm_up_order(ownership, known)
    assert order is not None and order[:3] == [(1, 2), (0, 1), (0, 5)] and len(order) == 32


def test_a_list_pins_what_it_names_and_this_node_owns(artifact: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "pins.txt"
    path.write_text("# the shared ones\n1: 5+2\n0-1: 7-8  # both\n\n2: 0\n")
    ownership = Ownership({0: range(16), 1: range(8)})
    expected = ((1, 2), (1, 5), (0, 7), (0, 8), (1, 7))
    assert pins_of(path, artifact, ownership, None, None) == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("0 5\n", "line 1: '0 5'"),
        ("0: 5\n9: 1\n", "line 2"),
        ("0: 16\n", "0-15"),
        ("0:\n", "line 1"),
        ("\xff", "line 1"),
    ],
)
def test_a_list_that_is_wrong_is_refused_at_its_line(
    artifact: Artifact, tmp_path: Path, text: str, complaint: str
) -> None:
    path = tmp_path / "pins.txt"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        pins_of(path, artifact, Ownership(artifact.owned_experts), None, None)
    assert str(path) in str(caught.value) and complaint in str(caught.value)


def test_recorded_heat_pins_up_to_half_of_the_cache(artifact: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "heat.json"
    path.write_bytes(encode_heat(heat(artifact, e0_5=3, e1_2=9, e2_9=7, e0_1=5)))
    ownership = Ownership(artifact.owned_experts)
    cache = 5 * expert_bytes(artifact)
    assert pins_of(path, artifact, ownership, None, cache) == ((1, 2), (2, 9))
    assert len(pins_of(path, artifact, ownership, None, None)) == 4
