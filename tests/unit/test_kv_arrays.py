"""KvArrays: room for the longest context costs nothing until tokens are in it."""

import dataclasses

import numpy as np
import psutil

from coordinator.kv_arrays import KvArrays
from shoal.limits import KV_BLOCK_TOKENS
from shoal.model_spec import AttentionSpec, LayerSpec, ModelSpec, QkNorm

MIB = 2**20
ATTENTION = AttentionSpec(
    num_heads=8,
    num_kv_heads=4,
    head_dim=128,
    qk_norm=QkNorm.NONE,
    qkv_bias=False,
    clip_qkv=None,
    scale=1.0,
)
SPEC = ModelSpec(
    family="test",
    model_dim=64,
    vocab_size=10,
    norm_eps=1e-5,
    rotary_dim=128,
    rope_attention_factor=1.0,
    max_context=40960,
    tie_embeddings=True,
    attention=ATTENTION,
    layers=(LayerSpec(window=None, router=None, ffn_dim=1),) * 8,
)


def test_memory_grows_with_the_blocks_that_are_written() -> None:
    num_blocks = SPEC.max_context // KV_BLOCK_TOKENS
    block_bytes = 2 * 4 * 128 * KV_BLOCK_TOKENS * 2 * len(SPEC.layers)
    process = psutil.Process()
    before = process.memory_info().rss
    kv = KvArrays(SPEC, np.float16, num_blocks)
    reserved = process.memory_info().rss - before
    assert num_blocks * block_bytes > 600 * MIB
    assert reserved < 4 * MIB

    for layer in range(len(SPEC.layers)):
        for array in kv.layer(layer):
            array[:10] = 1.0
    grown = process.memory_info().rss - before
    assert 10 * block_bytes <= grown < 10 * block_bytes + 4 * MIB * 2 * len(SPEC.layers)


def test_arrays_are_zero_writable_and_of_the_asked_type() -> None:
    for dtype in (np.float16, np.float32):
        kv = KvArrays(dataclasses.replace(SPEC, layers=SPEC.layers[:1]), dtype, 2)
        for array in kv.layer(0):
            assert array.dtype == dtype
            assert array.shape[0] == 2
            assert not array.any()
            assert array.flags.writeable and array.flags.c_contiguous
