"""Experts that are read while the first tokens are computed: calls first, nothing hidden."""

import errno
import io
import shutil
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from coordinator.commands import feedback
from coordinator.expert_dispatch import LocalDispatch
from shoal.artifact import Artifact
from shoal.errors import CallCancelled, CorruptArtifact
from shoal.experts.background import BackgroundWarmUp
from shoal.experts.local import MAX_BYTES_AT_ONCE, LocalExperts
from shoal.experts.ownership import Ownership
from shoal.experts.store import WarmUpProgress
from shoal.experts.streaming import StreamingStore
from shoal.experts.warm_up import MAX_BACKGROUND_BYTES
from shoal.router import RoutingPlan
from support.command import end_of, run_json, running_shoal, shoal
from support.held_reader import until
from support.stores import LAYER, expected, flip, held, size_of, take
from support.streaming import call_of
from support.tiny_model import make_tiny_artifact

ENDLESS = ("--prompt-ids", "5,6,7", "--ignore-eos", "--max-tokens", "15000")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough to be read in the background: 48 experts of 1.5 MiB."""
    return make_tiny_artifact(
        tmp_path_factory.mktemp("large"),
        hidden_size=256,
        moe_intermediate_size=512,
        max_position_embeddings=20000,
    )


@pytest.fixture(scope="module")
def artifact(path: Path) -> Artifact:
    return Artifact.open(path)


@pytest.fixture
def copy(path: Path, tmp_path: Path) -> Artifact:
    """The artifact again, to be damaged."""
    return Artifact.open(Path(shutil.copytree(path, tmp_path / "copy.shoal")))


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """Closes what a test opens."""
    with ExitStack() as stack:
        yield stack


def begin(store: StreamingStore) -> BackgroundWarmUp:
    return BackgroundWarmUp(lambda: store.warm_up(lambda _: None, is_background=True))


def local(artifact: Artifact, opened: ExitStack) -> LocalExperts:
    experts = LocalExperts(artifact, Ownership(artifact.owned_experts))
    return opened.enter_context(closing(experts))


def test_few_reads_are_under_way_and_a_calls_own_go_before_them(
    artifact: Artifact, opened: ExitStack
) -> None:
    """1. it reads as much as it may; 2. a call wants another expert: that is no prefetch."""
    store, reader = held(artifact, opened)
    warm_up = begin(store)
    most = -(-MAX_BACKGROUND_BYTES // size_of(artifact))
    reader.await_held(most)
    with ThreadPoolExecutor(1) as thread:
        call = thread.submit(take, store, 2, [15])
        reader.await_held(most + 1)
        assert [read.is_prefetch for read in reader.held] == [True] * most + [False]
        assert store.figures().num_loading == 1, "the call's alone"
        reader.let_all_go()
        assert call.result(30) == expected(artifact, 2, [15])
    warm_up.join()
    warm_up.check()
    assert store.figures().num_resident == 48


def test_a_call_joins_a_read_that_is_under_way_and_waits_for_no_other(
    artifact: Artifact, opened: ExitStack
) -> None:
    store, reader = held(artifact, opened)
    begin(store)
    reader.await_held(2)
    tag = reader.held[1].tag
    with ThreadPoolExecutor(1) as thread:
        call = thread.submit(take, store, 0, [1])
        until(lambda: reader.promoted == [tag])
        reader.let_go(2)
        assert call.result(30) == expected(artifact, 0, [1])
    figures = store.figures()
    assert (figures.misses, figures.joined, figures.prefetch_issued) == (1, 1, 0)
    assert reader.num_held > 0, "the others are still to come"


def test_the_first_call_of_a_layer_after_the_end_makes_its_table(
    artifact: Artifact, opened: ExitStack
) -> None:
    experts = local(artifact, opened)
    warm_up = experts.warm_up_beside(lambda _: None)
    assert warm_up is not None
    warm_up.join()
    for layer in artifact.owned_experts:
        experts.executor.compute(call_of(artifact, layer, [3]))
    assert set(experts.store.tables) == set(artifact.owned_experts)


def test_closing_the_store_ends_it_in_the_middle_and_it_cannot_begin_later(
    artifact: Artifact, opened: ExitStack
) -> None:
    """1. some of its reads end, others do not; 2. the store is closed; 3. it is over."""
    store, reader = held(artifact, opened)
    warm_up = begin(store)
    reader.await_held(3)
    reader.let_go(2)
    until(lambda: store.figures().num_resident == 2)
    store.close()
    warm_up.join()
    with pytest.raises(CallCancelled, match="closed"):
        warm_up.check()
    late = begin(store)
    late.join()
    with pytest.raises(CallCancelled, match="closed"):
        late.check()


def test_damage_that_no_call_met_fails_every_call_from_then_on(
    copy: Artifact, opened: ExitStack
) -> None:
    flip(copy, 2)
    experts = local(copy, opened)
    warm_up = experts.warm_up_beside(lambda _: None)
    assert warm_up is not None
    dispatch = LocalDispatch(experts.executor, warm_up)
    warm_up.join()
    named = f"layer-001.*expert 2 of layer {LAYER}: .*convert the model again"
    with pytest.raises(CorruptArtifact, match=named) as first:
        dispatch.check()
    call = call_of(copy, 0, [0])
    plan = RoutingPlan(call.experts[None], call.weights[None])
    with pytest.raises(CorruptArtifact, match=named) as second:
        dispatch.start(0, call.rows, plan)
    assert first.value is not second.value, "each has a traceback of its own"


def test_what_cannot_be_read_is_left_to_the_call_that_wants_it(
    artifact: Artifact, opened: ExitStack
) -> None:
    store, reader = held(artifact, opened)
    warm_up = begin(store)
    reader.await_held(1)
    reader.fail(errno.EIO)
    reader.let_all_go()
    warm_up.join()
    warm_up.check()
    assert [key for key, _ in store.figures().unavailable] == [(0, 0)]
    assert take(store, 0, [0]) == expected(artifact, 0, [0])


def test_a_small_model_is_read_at_once(tmp_path: Path, opened: ExitStack) -> None:
    artifact = Artifact.open(make_tiny_artifact(tmp_path, quant="q8_0"))
    experts = local(artifact, opened)
    assert experts.store.num_bytes < MAX_BYTES_AT_ONCE
    assert experts.warm_up_beside(lambda _: None) is None
    assert experts.store.figures().num_resident == 48


def test_the_bits_are_those_of_a_model_that_was_read_before(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for count in (3, 90):
        ids = ",".join(str(3 * i) for i in range(count))
        asked = ("--prompt-ids", ids, "--max-tokens", "6", "--ignore-eos", "--top-logprobs", "3")
        beside, before = (run_json(capsys, path, *asked, *way) for way in ((), ("--warmup",)))
        assert beside["logits_digest"] == before["logits_digest"]
        assert beside["token_ids"] == before["token_ids"]
        assert before["dispatch"]["prefill"]["load_s"] == 0.0


@pytest.mark.processes
def test_a_run_on_a_damaged_model_ends_with_its_name_and_the_cure(copy: Artifact) -> None:
    flip(copy, 2)
    ended = shoal("run", copy.path, *ENDLESS)
    assert ended.status == 3
    assert f"expert 2 of layer {LAYER}: its bytes are not those that were written" in ended.err
    assert "layer-001.safetensors" in ended.err and "convert the model again" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.processes
def test_a_chat_on_a_damaged_model_ends_with_its_name(copy: Artifact) -> None:
    flip(copy, 2)
    ended = shoal("chat", copy.path, "--max-tokens", "15000", stdin=b"hello\nand again\n")
    assert ended.status == 3
    assert f"expert 2 of layer {LAYER}" in ended.err


@pytest.mark.processes
def test_an_interrupt_while_experts_are_read_ends_a_run_at_once(path: Path) -> None:
    with running_shoal("run", path, *ENDLESS) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        ended = end_of(process)
    assert ended.status == 130
    assert "Traceback" not in ended.err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def progress(num_experts: int, elapsed_s: float) -> WarmUpProgress:
    return WarmUpProgress(num_experts, 4, num_experts * 10**9, 4 * 10**9, elapsed_s)


def test_progress_leaves_the_line_to_the_text_that_follows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1. nothing for half a second; 2. a line, written anew; 3. a sentence has a line of its own;
    4. once text comes, nothing more.
    """
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    told = feedback()
    told.show_load(progress(1, 0.1))
    assert screen.getvalue() == ""
    told.show_load(progress(2, 0.7))
    told.tell("a sentence")
    told.show_load(progress(3, 0.8))
    told.end_load()
    told.show_load(progress(4, 0.9))
    told.end_load()
    lines = screen.getvalue().split("\n")
    first, third = (f"\rreading experts: {n}.00 of 4.00 GB" for n in (2, 3))
    assert lines == [first, "a sentence", third, ""]


def test_progress_ends_its_line_when_all_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    told = feedback()
    told.show_load(progress(4, 0.9))
    told.end_load()
    assert screen.getvalue() == "\rreading experts: 4.00 of 4.00 GB\n"
