"""KvArrays: the memory of the KV cache, one pair of arrays a layer.

Room for the longest context is reserved as address space only. The operating system gives pages
when a block is first written, so the process grows with the tokens it holds, nothing is copied
when the cache grows, and a block's address never changes.
"""

import math
import mmap

import numpy as np

from coordinator.array_types import F16, F32
from shoal import ops
from shoal.errors import RequestError
from shoal.model_spec import ModelSpec

KvArray = F16 | F32
KvPair = tuple[KvArray, KvArray]


class KvArrays:
    """K and V of every layer, shapes as `ops.kv_shape` says, float16 or float32."""

    def __init__(
        self, spec: ModelSpec, dtype: type[np.float16] | type[np.float32], num_blocks: int
    ) -> None:
        attention = spec.attention
        k_shape, v_shape = ops.kv_shape(num_blocks, attention.num_kv_heads, attention.head_dim)
        self._layers: list[KvPair] = []
        for _ in range(spec.num_layers):
            self._layers.append((_reserve(k_shape, dtype), _reserve(v_shape, dtype)))

    def layer(self, index: int) -> KvPair:
        """Return (K, V) of that layer, to be read and written by `ops` in place."""
        return self._layers[index]

    def copy_block(self, source: int, target: int) -> None:
        """Copy what a KV block holds in every layer into another one."""
        for k, v in self._layers:
            k[target] = k[source]
            v[target] = v[source]


def _reserve(shape: tuple[int, ...], dtype: type[np.float16] | type[np.float32]) -> KvArray:
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise RequestError(
            f"cannot reserve {num_bytes} bytes of address space for one layer of the KV cache: "
            f"{error}. Choose a smaller --max-context."
        ) from error
    if dtype is np.float16:
        return np.frombuffer(memory, np.float16).reshape(shape)
    return np.frombuffer(memory, np.float32).reshape(shape)
