"""The forward pass gives a row the same bits however it is served."""

from pathlib import Path

import numpy as np
import pytest

from shoal.limits import KV_BLOCK_TOKENS
from support.checkpoints import random_values
from support.forward_passes import F32, ForwardPasses
from support.tiny_model import make_tiny_artifact

NUM_TOKENS = KV_BLOCK_TOKENS + 9  # two KV blocks
CASES = [("qwen3_moe", "f32"), ("olmoe", "q8_0"), ("mixtral", "q4_0"), ("llama", "bf16")]


def some_ids(seed: int, count: int = NUM_TOKENS) -> list[int]:
    return [int(abs(u) * 250) for u in random_values(seed, "ids", (count,)).tolist()]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, quant = request.param
    return make_tiny_artifact(
        tmp_path_factory.mktemp(family), family, quant, hidden_size=64, num_hidden_layers=2
    )


@pytest.fixture(scope="module")
def alone(path: Path) -> F32:
    """Logits of every prefix, each token in a pass of its own."""
    logits = ForwardPasses(path).logits_of_every_prefix(some_ids(1))
    assert np.unique(logits).size > logits.size // 2, "the model is degenerate"
    return logits


@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
def test_every_prefill_chunk_gives_the_same_bits(path: Path, alone: F32, chunk: int) -> None:
    passes = ForwardPasses(path)
    sequence = passes.sequence(some_ids(1))
    while left := sequence.num_tokens - sequence.num_cached:
        logits = passes.run((sequence, min(chunk, left)))
        assert logits[0].tobytes() == alone[sequence.num_cached - 1].tobytes()


def test_sequences_that_share_a_pass_do_not_change_each_other(path: Path, alone: F32) -> None:
    passes = ForwardPasses(path)
    sequence, neighbour = passes.sequence(some_ids(1)), passes.sequence(some_ids(2))
    passes.run((neighbour, 5))
    logits = passes.run((sequence, 20), (neighbour, 30))
    assert logits[0].tobytes() == alone[19].tobytes()
    logits = passes.run((neighbour, 1), (sequence, NUM_TOKENS - 20))
    assert logits[1].tobytes() == alone[-1].tobytes()
    assert logits[0].tobytes() != logits[1].tobytes(), "the neighbour has other tokens"


def test_kv_blocks_that_held_another_sequence_are_as_good_as_new(path: Path, alone: F32) -> None:
    passes = ForwardPasses(path, num_blocks=3)
    other = passes.sequence(some_ids(3, 2 * KV_BLOCK_TOKENS))
    passes.run((other, 2 * KV_BLOCK_TOKENS))
    other.truncate(0)
    sequence = passes.sequence(some_ids(1))
    logits = passes.run((sequence, NUM_TOKENS))
    assert set(sequence.blocks) == {0, 1}, "the freed blocks are used again"
    assert logits[0].tobytes() == alone[-1].tobytes()


def test_a_prefix_whose_kv_was_kept_gives_the_same_bits(path: Path, alone: F32) -> None:
    passes = ForwardPasses(path)
    ids = some_ids(1)
    sequence = passes.sequence([*ids[:40], 7, 7, 7, 7, 7, 7])
    passes.run((sequence, 46))
    sequence.truncate(sequence.common_prefix(ids))
    assert sequence.num_cached >= 40
    sequence.extend(ids[sequence.num_tokens :])
    logits = passes.run((sequence, sequence.num_tokens - sequence.num_cached))
    assert logits[0].tobytes() == alone[-1].tobytes()


def test_blocks_in_any_order_give_the_same_bits(path: Path, alone: F32) -> None:
    passes = ForwardPasses(path, num_blocks=5)
    assert passes.pool.try_allocate(4) == [0, 1, 2, 3]
    passes.pool.free([3])
    sequence = passes.sequence(some_ids(1))
    passes.run((sequence, 10))  # block 3
    passes.pool.free([0, 1, 2])
    logits = passes.run((sequence, NUM_TOKENS - 10))  # block 0
    assert sequence.blocks == (3, 0)
    assert logits[0].tobytes() == alone[-1].tobytes()
