"""A row whose values leave the numbers fails its own request, and never its neighbours."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from client.convert.pipeline import Options, convert, make_plan
from client.convert.safetensors_source import SafetensorsSource
from shoal.errors import NumericError
from shoal.quant import parse_format
from support.checkpoints import tiny_config, write_checkpoint
from support.forward_passes import ForwardPasses

BAD_TOKEN = 7
GOOD_IDS = [30, 31, 32, 33, 34]
BAD_IDS = [40, 41, BAD_TOKEN, 42]


def convert_changed(tmp: Path, change: Callable[[dict[str, NDArray[np.float32]]], None]) -> Path:
    checkpoint = tmp / "checkpoint"
    write_checkpoint(checkpoint, tiny_config("qwen3_moe", num_hidden_layers=2), seed=5)
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    out = tmp / "model.shoal"
    plan = make_plan(SafetensorsSource(checkpoint), Options(quant=parse_format("q8_0")))
    convert(plan, out, lambda _: None)
    return out


def test_a_value_beyond_the_cache_type_names_layer_and_row_and_spares_the_others(
    tmp_path: Path,
) -> None:
    def change(tensors: dict[str, NDArray[np.float32]]) -> None:
        # One value of layer 0 reads dimension 0 alone, which only the bad token's embedding has.
        embed = tensors["model.embed_tokens.weight"]
        embed[:, 0] = 0.0
        embed[BAD_TOKEN] = 0.0
        embed[BAD_TOKEN, 0] = 1.0
        v_proj = tensors["model.layers.0.self_attn.v_proj.weight"]
        v_proj[3] = 0.0
        v_proj[3, 0] = 3e4

    path = convert_changed(tmp_path, change)
    passes, alone = ForwardPasses(path), ForwardPasses(path)
    expected = alone.run((alone.sequence(GOOD_IDS), len(GOOD_IDS)))

    good, bad = passes.sequence(GOOD_IDS), passes.sequence(BAD_IDS)
    with pytest.raises(NumericError, match="layer 0: a key or value beyond float16") as raised:
        passes.run((bad, len(BAD_IDS)), (good, len(GOOD_IDS)))
    assert raised.value.rows == (BAD_IDS.index(BAD_TOKEN),)
    assert good.num_cached == 0, "a failed pass counts for nobody"

    logits = passes.run((good, len(GOOD_IDS)))  # the same KV slots, written again
    assert logits.tobytes() == expected.tobytes()


def test_rows_that_fail_in_the_last_layer_are_named_by_their_place_in_the_batch(
    tmp_path: Path,
) -> None:
    def change(tensors: dict[str, NDArray[np.float32]]) -> None:
        tensors["model.layers.1.post_attention_layernorm.weight"][:] = 3e38

    passes = ForwardPasses(convert_changed(tmp_path, change))
    first, second = passes.sequence(GOOD_IDS), passes.sequence(BAD_IDS)
    with pytest.raises(NumericError, match="layer 1: ") as raised:
        passes.run((first, len(GOOD_IDS)), (second, len(BAD_IDS)))
    # Only the rows whose logits are wanted get that far.
    assert raised.value.rows == (len(GOOD_IDS) - 1, len(GOOD_IDS) + len(BAD_IDS) - 1)
