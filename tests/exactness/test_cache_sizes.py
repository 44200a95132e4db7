"""Tokens and logits do not depend on how many experts fit in memory, or on how they come there."""

from contextlib import closing
from pathlib import Path

import pytest

from shoal.artifact import Artifact
from shoal.errors import UsageError
from shoal.experts.executor import ExpertExecutor
from shoal.experts.local import LocalExperts
from shoal.experts.options import Backend, Mode, Verify
from shoal.experts.ownership import Ownership
from shoal.experts.store import StoreOptions
from support.streaming import continuation, expert_bytes, num_experts, streaming_store
from support.tiny_model import make_tiny_artifact

PROMPT = list(range(3, 27))  # in one pass: asks for more experts than most caches below hold
NUM_TOKENS = 8
MAX_TURNS, ENOUGH_READS = 24, 2
NUM_EXPERTS = 48  # of each model: three layers of sixteen
SIZES = {"2 experts": 2, "3 experts": 3, "10 %": 5, "25 %": 12, "50 %": 24, "100 %": 48}

Said = tuple[list[int], list[bytes]]


@pytest.fixture(scope="module", params=[("qwen3_moe", "q8_0"), ("olmoe", "f32")], ids="-".join)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, quant = request.param
    path = make_tiny_artifact(tmp_path_factory.mktemp("model"), family, quant)
    assert num_experts(Artifact.open(path)) == NUM_EXPERTS
    return path


@pytest.fixture(scope="module")
def expected(path: Path) -> Said:
    tokens, logits = continuation(path, None, PROMPT, NUM_TOKENS)
    assert len(set(logits)) == NUM_TOKENS, "the model does not move: a blunt test"
    return tokens, logits


@pytest.mark.parametrize("backend", list(Backend))
@pytest.mark.parametrize("slots", SIZES.values(), ids=SIZES)
def test_every_cache_size_and_backend_says_the_same_bits(
    slots: int, backend: Backend, path: Path, expected: Said
) -> None:
    with streaming_store(path, slots, backend=backend) as store:
        executor = ExpertExecutor(Artifact.open(path), store)
        assert continuation(path, executor, PROMPT, NUM_TOKENS) == expected
        figures = store.figures()
    assert figures.reader is not None and figures.reader.backend is backend
    assert figures.resident_bytes <= figures.budget_bytes
    assert figures.num_resident <= slots
    assert (figures.evictions > 0) == (slots < NUM_EXPERTS), "the cache was no constraint"


@pytest.mark.parametrize("verify", list(Verify))
def test_every_way_of_checking_says_the_same_bits(
    verify: Verify, path: Path, expected: Said
) -> None:
    with streaming_store(path, 12, verify=verify) as store:
        executor = ExpertExecutor(Artifact.open(path), store)
        assert continuation(path, executor, PROMPT, NUM_TOKENS) == expected
        figures = store.figures()
    loads = figures.misses - figures.joined
    checked = {Verify.ALWAYS: loads, Verify.NEVER: 0}
    assert figures.num_verified == checked.get(verify, figures.num_verified)
    assert figures.num_verified <= NUM_EXPERTS or verify is not Verify.FIRST


@pytest.mark.parametrize(
    ("backend", "slots"), [*((backend, 5) for backend in Backend), (Backend.IO_URING, 24)]
)
@pytest.mark.parametrize("mode", [mode for mode in Mode if mode is not Mode.OFF])
def test_reading_ahead_changes_no_bit(
    mode: Mode, backend: Backend, slots: int, path: Path, expected: Said
) -> None:
    """Again and again, until something was learned (in `auto`: is on trial) and was read ahead."""
    artifact = Artifact.open(path)
    options = StoreOptions(cache_bytes=slots * expert_bytes(artifact), backend=backend)
    ownership = Ownership(dict(artifact.owned_experts))
    try:
        local = LocalExperts(artifact, ownership, options, mode)
    except UsageError as error:
        pytest.skip(str(error))
    with closing(local):
        for _ in range(MAX_TURNS):
            assert continuation(path, local.executor, PROMPT, NUM_TOKENS) == expected
            if local.store.figures().prefetch_issued >= ENOUGH_READS:
                break
        figures = local.store.figures()
    assert figures.prefetch_issued >= ENOUGH_READS, "a blunt test: nothing was read ahead"
    assert figures.reader is not None and figures.reader.backend is backend


@pytest.mark.parametrize("backend", list(Backend))
def test_without_reading_ahead_nothing_is_read_ahead_and_the_bits_are_the_same(
    backend: Backend, path: Path, expected: Said
) -> None:
    artifact = Artifact.open(path)
    options = StoreOptions(cache_bytes=5 * expert_bytes(artifact), backend=backend)
    ownership = Ownership(dict(artifact.owned_experts))
    try:
        local = LocalExperts(artifact, ownership, options, Mode.OFF)
    except UsageError as error:
        pytest.skip(str(error))
    with closing(local):
        assert continuation(path, local.executor, PROMPT, NUM_TOKENS) == expected
        assert local.store.figures().prefetch_issued == 0


def test_a_cache_that_shrinks_and_grows_while_serving_says_the_same_bits(
    path: Path, expected: Said
) -> None:
    one = 2 * Artifact.open(path).expert_location(0, 0).num_bytes
    sizes: list[int | None] = [24 * one, one, 3 * one, None]
    with streaming_store(path, 24) as store:
        executor = ExpertExecutor(Artifact.open(path), store)
        for size in sizes:
            store.resize(size)
            assert continuation(path, executor, PROMPT, NUM_TOKENS) == expected
            assert size is None or store.figures().resident_bytes <= size


@pytest.mark.parametrize("slots", [0, 1])
def test_a_cache_below_two_experts_is_refused(slots: int, path: Path) -> None:
    with pytest.raises(UsageError, match="two") as refused, streaming_store(path, slots):
        pass
    assert "cache" in str(refused.value)
