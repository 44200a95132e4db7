"""What a family page states, and what convert gets of it: where each of our tensors comes from."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.families.config import Config
from shoal.families.rope import inverse_frequencies
from shoal.model_spec import ModelSpec


class Role(StrEnum):
    """How convert stores a tensor."""

    VECTOR = "vector"  # F32 vector: norms, biases
    MATRIX = "matrix"  # kernel layout, in the format that --quant asks for
    EMBEDDING = "embedding"  # kernel layout; Q8_0 under any 4-bit choice: embed and lm_head
    ROUTER = "router"  # kernel layout, always F32


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """A rectangle of one checkpoint tensor, in torch order [rows, cols] (= [out, in]).

    tensor: the checkpoint's own name, to open it by.
    index: which matrix of a fused 3-D tensor [E, rows, cols]; None: it is a matrix or vector.
    rows, cols: half-open ranges; cols is None for a vector.
    rope_heads: not 0: rows of this many heads lie in llama.cpp's interleaved order, and row r of
        ours is row `rope_row_order(num_rows, rope_heads)[r]` of theirs. The slice is then whole.
    """

    tensor: str
    index: int | None
    rows: tuple[int, int]
    cols: tuple[int, int] | None
    rope_heads: int = 0

    @property
    def num_rows(self) -> int:
        return self.rows[1] - self.rows[0]

    @property
    def num_cols(self) -> int:
        assert self.cols is not None, f"{self.tensor} is a vector"
        return self.cols[1] - self.cols[0]


@dataclass(frozen=True, slots=True)
class TensorRule:
    """One of our dense tensors: its name (`layers.0.attention.q`), role and source."""

    name: str
    role: Role
    source: TensorSlice


@dataclass(frozen=True, slots=True)
class FfnRule:
    """One gated FFN: expert `index` of `layer`, or (None) the layer's whole dense FFN.

    gate, up: [ffn_dim, dim]; down: [dim, ffn_dim].
    """

    layer: int
    index: int | None
    gate: TensorSlice
    up: TensorSlice
    down: TensorSlice

    @property
    def name(self) -> str:
        """`layers.3.experts.7`, or `layers.3.ffn.dense`."""
        part = "ffn.dense" if self.index is None else f"experts.{self.index}"
        return f"layers.{self.layer}.{part}"

    @property
    def dim(self) -> int:
        return self.down.num_rows

    @property
    def ffn_dim(self) -> int:
        return self.gate.num_rows


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """Every tensor of the artifact and its source; only `rope.inv_freq` comes from the config."""

    tensors: tuple[TensorRule, ...]
    ffns: tuple[FfnRule, ...]  # by layer, then expert
    ignored: tuple[str, ...]  # checkpoint tensors that inference does not need


@dataclass(frozen=True, slots=True)
class FfnNames:
    """Where a layer's router and experts lie in a checkpoint, below `layers.N.`.

    block: the MoE block, `mlp` or `block_sparse_moe`.
    gate, up, down: the matrices' names inside one expert, `gate_proj` or `w1`.
    """

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


class Family(ABC):
    """One model family: a page that says how its config reads and what its tensors are called.

    Everything else about a model is in its ModelSpec; nothing after convert asks for the family.
    """

    name: str  # config.json's model_type
    architectures: tuple[str, ...]  # config.json's architectures
    expert_names: FfnNames = FfnNames()
    default_rope_theta: float = 10000.0  # where config.json has none

    @abstractmethod
    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """Read config.json (or its equal made of GGUF metadata). Dense FFNs are not sliced yet.

        Raises: UnsupportedModel for a value that is missing, malformed, or not implemented.
        """

    def inv_freq(self, config: Mapping[str, Any]) -> NDArray[np.float32]:
        """Return RoPE's inverse frequencies [rotary_dim / 2], scaled; the same on every CPU."""
        rotary_dim = self.spec(config).rotary_dim
        return inverse_frequencies(Config(config), rotary_dim, self.default_rope_theta)


def rope_row_order(num_rows: int, heads: int) -> NDArray[np.int64]:
    """Return the source row of each of our rows, for a tensor in llama.cpp's interleaved order.

    llama.cpp stores row (head, i, half) where we want (head, half, i).
    Source: permute() of llama.cpp's convert_hf_to_gguf.py.
    """
    assert num_rows % (2 * heads) == 0, (num_rows, heads)
    order = np.arange(num_rows, dtype=np.int64).reshape(heads, num_rows // heads // 2, 2)
    return np.ascontiguousarray(order.swapaxes(1, 2)).reshape(num_rows)
