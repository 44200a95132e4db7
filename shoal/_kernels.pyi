from collections.abc import Sequence
from typing import Annotated

import numpy
from numpy.typing import NDArray


def pack_rows(format: int, source: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], cols: int, out: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')]) -> None:
    """Row-major rows into whole row groups."""

def pack_expert(dim: int, ffn_dim: int, gate_up: int, down: int, gate: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], up: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], down_rows: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')]) -> None:
    """Row-major gate, up and down into one packed expert."""

def unpack_rows(format: int, rows: int, cols: int, data: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], ids: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')]) -> None:
    """Rows of a packed matrix as float32."""

def check_finite(format: int, source: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)]) -> bool:
    """Whether all scales or float weights of row-major rows are finite."""

def quantise_q4_k(values: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu')]) -> None:
    """Float rows to GGUF Q4_K blocks."""

def quantise_table(format: int, values: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], importance: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None, out: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu')]) -> None:
    """Float rows to blocks of a format with a table of levels."""

def quantise_rows(scheme: int, x: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], quants: Annotated[NDArray[numpy.int8], dict(shape=(None, None), order='C', device='cpu')], scales: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')]) -> list[int]:
    """Returns the rows that are not finite."""

def non_finite_rows(x: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)]) -> list[int]:
    """Returns the rows with a NaN or an infinity."""

def matmul(format: int, rows: int, cols: int, data: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], scheme: int, values: Annotated[NDArray, dict(shape=(None, None), order='C', device='cpu', writable=False)], scales: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], bias: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None, out: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')]) -> None:
    """out = rows * matrix^T + bias."""

def expert_ffn(dim: int, ffn_dim: int, gate_up: int, down: int, weights: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], scheme: int, values: Annotated[NDArray, dict(shape=(None, None), order='C', device='cpu', writable=False)], scales: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')]) -> list[int]:
    """One expert on all rows; returns the rows that are not finite."""

def expert_sums(dim: int, ffn_dim: int, gate_up: int, down: int, weights: Sequence[Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)]], scheme: int, values: Annotated[NDArray, dict(shape=(None, None), order='C', device='cpu', writable=False)], scales: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], offsets: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], pair_rows: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], pair_weights: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], grid: int, sums: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu')]) -> list[int]:
    """Adds weighted integer outputs; returns the rows out of range."""

def set_threads(threads: int) -> None:
    """Threads that kernels use."""

def rest_threads() -> None:
    """
    Say that no kernel is called for a while: threads that wait for work sleep at once.
    """

def num_threads() -> int:
    """Threads that kernels use."""

def usable_cpus() -> int:
    """CPUs of this process, by affinity and cgroup quota."""

def set_isa(name: str) -> None:
    """Switches all kernels to an instruction set."""

def isa() -> str:
    """The instruction set in use."""

def available_isas() -> list[str]:
    """What this CPU and build can run."""

def advise_huge_pages(memory: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')]) -> bool:
    """Asks for 2 MiB pages; false where there are none."""

def rms_norm(x: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu', writable=False)], weight: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], eps: float, out: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu')]) -> None:
    """RMSNorm over the last axis."""

def add(a: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu', writable=False)], b: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu')]) -> None:
    """out = a + b."""

def clamp(x: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu', writable=False)], limit: float, out: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu')]) -> None:
    """out = x cut to [-limit, limit]."""

def rope_table(inv_freq: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], positions: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], factor: float, cos: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')], sin: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')]) -> list[int]:
    """Fill cos and sin [T, r/2]; returns the rows whose angle is too large."""

def rope(x: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu')], cos: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], sin: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)]) -> None:
    """
    Turn the first dimensions of each head of x [T, H, d] in place, rotate-half.
    """

def route_softmax(logits: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], renormalise: bool, experts: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu')], weights: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')]) -> list[int]:
    """
    Softmax and the largest experts of each row; returns the rows that are not finite.
    """

def kv_write(keys: Annotated[NDArray, dict(shape=(None, None, 4, None, 16), order='C', device='cpu')], values: Annotated[NDArray, dict(shape=(None, None, 64, None), order='C', device='cpu')], k: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu', writable=False)], v: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu', writable=False)], slots: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> list[int]:
    """
    Store k and v [T, KVH, d] in the cache; returns the rows that are not finite there.
    """

def attention(q: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu', writable=False)], keys: Annotated[NDArray, dict(shape=(None, None, 4, None, 16), order='C', device='cpu')], values: Annotated[NDArray, dict(shape=(None, None, 64, None), order='C', device='cpu')], block_tables: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu', writable=False)], row_sequence: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], row_position: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], scale: float, window: int, out: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu')]) -> None:
    """
    Grouped-query attention of q [T, H, d] over the paged cache; window 0 for none.
    """

def finish_sums(sums: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu', writable=False)], grid: int, out: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')]) -> None:
    """out = float32(sums) * 2^-grid."""

def sum_widths(sums: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu', writable=False)], widths: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')]) -> int:
    """Bytes a value of each row; returns the bytes of all rows."""

def pack_sums(sums: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu', writable=False)], widths: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], data: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')]) -> None:
    """Write rows of sums, little-endian."""

def unpack_add_sums(widths: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], data: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], rows: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], into: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu')]) -> None:
    """Add packed rows to rows of `into`."""

def pack_bf16(sums: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu', writable=False)], grid: int, data: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')]) -> None:
    """Round sums * 2^-grid to bfloat16, little-endian."""

def unpack_add_bf16(data: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], grid: int, rows: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], into: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu')]) -> None:
    """Add rows of bfloat16 to rows of `into`."""

def all_finite(x: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu', writable=False)]) -> bool:
    """No NaN and no infinity in x."""

def sample(logits: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], history: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], temperature: float, top_k: int, top_p: float, min_p: float, repetition_penalty: float, presence_penalty: float, frequency_penalty: float, bias_ids: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], biases: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], seed: int, choice: int, position: int) -> int:
    """The token drawn from logits [V]."""

def top_logprobs(logits: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], ids: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu')], logprobs: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu')]) -> None:
    """Ids and log-probabilities of the largest logits."""

def logprob_of(logits: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], token: int) -> float:
    """Log-probability of one token."""

def compute_digests() -> list[tuple[str, str, int]]:
    """(op, format, digest) of every op on the current instruction set."""

class Linear:
    """A matrix in kernel layout, and the bias of its products."""

    def __init__(self, format: int, rows: int, cols: int, data: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], bias: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None) -> None: ...

class GroupedQuery:
    """The attention of one layer."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, scale: float, window: int, clip: float, norm_eps: float, norms_heads: bool, q_norm: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None, k_norm: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None, qkv: Sequence[Linear], o: Linear) -> None: ...

class DenseFfn:
    """An FFN in the layout of one expert."""

    def __init__(self, dim: int, ffn_dim: int, gate_up: int, down: int, weights: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> None: ...

class Places:
    """Where the rows of a pass stand."""

    def __init__(self, cos: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], sin: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], slots: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], row_sequence: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], positions: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], block_tables: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu', writable=False)]) -> None: ...

class DecoderLayer:
    """A decoder layer but for its routed experts."""

    def __init__(self, attention_norm: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], attention: GroupedQuery, ffn_norm: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], gate: Linear | None, experts_per_token: int, renormalise: bool, scheme: int, ffn: DenseFfn | None) -> None: ...

    @property
    def num_bytes(self) -> int:
        """Of its matrices."""

def run_layer(layer: DecoderLayer, hidden: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], branch: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)] | None, sums: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu', writable=False)] | None, sums_grid: int, places: Places, keys: Annotated[NDArray, dict(shape=(None, None, 4, None, 16), order='C', device='cpu')], values: Annotated[NDArray, dict(shape=(None, None, 64, None), order='C', device='cpu')], going_on: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)] | None, residual: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')], normed: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')], quants: Annotated[NDArray[numpy.int8], dict(shape=(None, None), order='C', device='cpu')] | None, scales: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')] | None, experts: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu')] | None, weights: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')] | None, ffn: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')] | None) -> tuple[int, list[int]] | None:
    """Run it; returns what stopped it and the rows to blame, or None."""

def run_layers(layers: Sequence[DecoderLayer], tables: Sequence[ExpertTable], num_experts: Sequence[int], grids: Sequence[int], hidden: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], branch: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)] | None, sums: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu', writable=False)] | None, sums_grid: int, places: Places, caches: Sequence[tuple[Annotated[NDArray, dict(shape=(None, None, 4, None, 16), order='C', device='cpu')], Annotated[NDArray, dict(shape=(None, None, 64, None), order='C', device='cpu')]]], residual: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')], expert_sums: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu')], experts: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu')], expert_seconds: Annotated[NDArray[numpy.float64], dict(shape=(None,), order='C', device='cpu')]) -> tuple[int, tuple[int, list[int]] | None]:
    """
    Run layers with their experts; returns how many were done, and what stopped the next and the rows to blame, or None.
    """

def run_layers_on_nodes(layers: Sequence[DecoderLayer], num_experts: Sequence[int], grids: Sequence[int], hidden: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], branch: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)] | None, sums: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu', writable=False)] | None, sums_grid: int, places: Places, caches: Sequence[tuple[Annotated[NDArray, dict(shape=(None, None, 4, None, 16), order='C', device='cpu')], Annotated[NDArray, dict(shape=(None, None, 64, None), order='C', device='cpu')]]], residual: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')], expert_sums: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu')], experts: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu')], expert_seconds: Annotated[NDArray[numpy.float64], dict(shape=(None,), order='C', device='cpu')], wires: RowWires, numbers: Sequence[int], owners: Sequence[Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]], first_id: int, num_ids: int, deadline_ms: int, reply_format: int, takes_bf16: bool, patience_s: float, max_seconds: float, left_values: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')], left_scales: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu')], left_weights: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu')], out: list) -> tuple[int, tuple[int, list[int]] | None]:
    """
    Run layers of one row, their experts on nodes; as run_layers. Appended to `out`, one for each fan-out: (seconds since the run began, what RowWires.run reports). A last one that did not go well: what its row asks is left in the arrays.
    """

def direct_alignment(descriptor: int) -> tuple[int, int] | None:
    """
    Return (offset, address) alignment of direct reads, or None where it is not told.
    """

def set_read_priority(is_prefetch: bool) -> int:
    """
    Give this thread's reads the priority of prefetches or its own; return 0 or an errno.
    """

def populate(memory: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')]) -> int:
    """Have the system back these bytes with pages; return 0 or an errno."""

class Ring:
    """An io_uring that reads. Raises OSError where there is none."""

    def __init__(self, entries: int) -> None: ...

    def submit(self, reads: Sequence[tuple[int, int, bool, bool, bool, int, Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')], int, int]]) -> int:
        """
        Start reads; return how many of the first were taken. Their arrays must live on.
        """

    def wait(self, timeout_s: float) -> list[tuple[int, int]]:
        """Return (id, bytes read or -errno) of what has ended."""

    def wake(self) -> None:
        """End the wait under way, or the next."""

    def entry(self, read: tuple[int, int, bool, bool, bool, int, Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')], int, int]) -> bytes:
        """Return the struct io_uring_sqe that `submit` would make of a read."""

    def abandon(self, memory: object) -> None:
        """Wait for no read any more; what holds their arrays is kept for ever."""

    def register_memory(self, arrays: Sequence[Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')]]) -> int:
        """
        Name memory to be pinned as it is used, in place of what was; return 0 or an errno.
        """

    @property
    def pinned_bytes(self) -> int: ...

    @property
    def pin_error(self) -> int:
        """Why memory could not be pinned: errno, or 0."""

    def register_files(self, descriptors: Sequence[int]) -> int:
        """Make files known in place of those known before; return 0 or an errno."""

def gate_bins(scores: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], parts: int, chosen: int, num_bins: int, spread: float, bins: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu')]) -> None:
    """Bins of how far each expert is inside some row's choice."""

def chain_bins(ratios: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], before: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], frequency: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], num_bins: int, bins: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu')]) -> None:
    """Bins of how likely each expert is after those before."""

def chain_learn(pairs: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')], uses: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu')], before: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], used: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], frequency: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], weight: float, prior: float, refreshes: bool, ratios: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')]) -> None:
    """Count which experts followed which."""

def note_uses(bins: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu')], lately: Annotated[NDArray[numpy.float64], dict(shape=(None,), order='C', device='cpu')], used: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], bits: int, decay: float, scale: float, num_bins: int) -> None:
    """Remember which experts a call used."""

def rank_experts(first: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], weights: Annotated[NDArray[numpy.float64], dict(shape=(None,), order='C', device='cpu')], bias: float, z_width: float, probability: Annotated[NDArray[numpy.float64], dict(shape=(None,), order='C', device='cpu', writable=False)], features: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu', writable=False)], owned: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], ranked: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu')], chances: Annotated[NDArray[numpy.float64], dict(shape=(None,), order='C', device='cpu')]) -> None:
    """Rank owned experts by falling probability."""

def learn_experts(first: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], weights: Annotated[NDArray[numpy.float64], dict(shape=(None,), order='C', device='cpu')], squares: Annotated[NDArray[numpy.float64], dict(shape=(None,), order='C', device='cpu')], bias: float, z_width: float, num_z: int, features: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu', writable=False)], truth: Annotated[NDArray[numpy.bool_], dict(shape=(None,), order='C', device='cpu', writable=False)], step: float, forget: float, z_bins: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu')]) -> None:
    """Move the weights towards what was wanted."""

class CallView:
    """A legal call in the frame that it came in."""

    @property
    def call_id(self) -> int: ...

    @property
    def layer(self) -> int: ...

    @property
    def deadline_ms(self) -> int: ...

    @property
    def scheme(self) -> int: ...

    @property
    def num_rows(self) -> int: ...

    @property
    def dim(self) -> int: ...

    @property
    def num_pairs(self) -> int: ...

    @property
    def reply_format(self) -> int: ...

    def numbers(self) -> tuple[bytes, bool, int]:
        """
        Memory with row_offsets [T + 1], experts [P] as int32, weights [P] and scales as float32, one after the other; whether the values are in it, too, as they are not aligned in the frame; and where they are.
        """

class ReplyView:
    """A reply in the frame that it came in."""

    @property
    def call_id(self) -> int: ...

    @property
    def num_rows(self) -> int: ...

    @property
    def dim(self) -> int: ...

    @property
    def grid(self) -> int: ...

    @property
    def widths(self) -> bytes:
        """A copy."""

    @property
    def sums(self) -> bytes:
        """A copy."""

    @property
    def queue_us(self) -> int: ...

    @property
    def compute_us(self) -> int: ...

    @property
    def load_us(self) -> int: ...

    @property
    def format(self) -> int: ...

def call_frame(call_id: int, layer: int, deadline_ms: int, scheme: int, dim: int, reply_format: int, values: Annotated[NDArray, dict(shape=(None, None), order='C', device='cpu', writable=False)], scales: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], row_offsets: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], experts: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], weights: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> bytes:
    """The bytes of the ClientFrame of a call."""

def reply_frame(call_id: int, sums: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu', writable=False)], grid: int, is_bf16: bool, queue_us: int, compute_us: int, load_us: int) -> bytes:
    """The bytes of the NodeFrame of a reply."""

def read_call(frame: bytes | memoryview) -> CallView | None:
    """The call of a ClientFrame if it is legal, or None."""

def read_reply(frame: bytes | memoryview) -> ReplyView | None:
    """
    The reply of a NodeFrame, or None: it is something else, or in an unusual form.
    """

def add_reply(reply: ReplyView, rows: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], grid: int, into: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu')], takes_bf16: bool) -> bool:
    """
    Add a reply's rows to rows of `into`; False: it is no answer, and nothing was added.
    """

class ExpertTable:
    """The owned experts of a layer, all in memory."""

    def __init__(self, dim: int, ffn_dim: int, gate_up: int, down: int, numbers: Sequence[int], weights: Sequence[Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)]]) -> None: ...

    def sums(self, scheme: int, dim: int, values: Annotated[NDArray, dict(shape=(None, None), order='C', device='cpu', writable=False)], scales: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], row_offsets: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None, experts: Annotated[NDArray[numpy.int32], dict(order='C', device='cpu', writable=False)], weights: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu', writable=False)], grid: int, out: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu')]) -> list[int] | None:
        """
        Write weighted integer outputs, added up; return the rows out of range. None, and nothing is written: it was withdrawn, or the call is not for it.
        """

    def answer(self, call: CallView, grid: int, max_weight_bytes: int, queue_us: int) -> bytes | list[int] | None:
        """
        The frame of a call's reply; or the rows out of range; or None, as `sums`, or the call walks over more weights.
        """

    def withdraw(self, on_idle: object) -> bool:
        """
        Compute no more calls. True: none is under way; else the last one calls on_idle.
        """

    @property
    def num_hits(self) -> int:
        """Experts that calls visited, each once a call."""

class CallServer:
    """Answers plain calls on lent sockets, on a thread."""

    def __init__(self, max_message_size: int, max_weight_bytes: int) -> None: ...

    @property
    def news_fd(self) -> int:
        """Readable while `news` has something."""

    @property
    def num_calls(self) -> int:
        """Calls answered."""

    @property
    def num_rows(self) -> int:
        """Their rows."""

    @property
    def is_answering(self) -> bool:
        """Whether one is computed now."""

    def lend(self, fd: int, stream_id: int, may_receive: int, may_send: int, max_frame_size: int) -> int:
        """Answer what a socket brings; return the loan's id."""

    def take_back(self, id: int) -> tuple[int, int, int, int, int, int, float, bytes, bytes, bytes] | None:
        """
        End a loan; return what `news` tells of one that came back, None: it has told.
        """

    def news(self) -> list[tuple[int, int, int, int, int, int, float, bytes, bytes, bytes]]:
        """
        Sockets that came back, once: (id, why, errno, calls answered, bytes received, bytes sent, seconds since it was heard, unread, unsent, reply).
        """

    def quiet_s(self, id: int) -> float:
        """Seconds since a lent socket was heard."""

    def shut(self) -> None:
        """Answer nothing until `open`; wait for what is computed."""

    def open(self) -> None:
        """Answer again."""

    def serve(self, layers: Sequence[tuple[int, object, int]]) -> None:
        """Answer for these (layer, table, grid), and no others."""

    def close(self) -> None:
        """End the thread. Loans are left as they are."""

def split_row(experts: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu', writable=False)], weights: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], owners: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], grouped: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu')], grouped_weights: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu')]) -> list[tuple[int, int, int]]:
    """
    Group a row's experts by owner; return (owner, begin, end) of each group.
    """

class RowWires:
    """Sockets that rows are sent on, one row after the other."""

    def __init__(self, lanes: Sequence[tuple[int, int]], lane_of_slot: Sequence[int], others: Sequence[int], room: int) -> None:
        """
        lanes: (fd, HTTP/2 stream). lane_of_slot: -1 for none. others: descriptors whose news end collecting. room: bytes for a reply that comes in pieces.
        """

    def run(self, first_id: int, layer: int, deadline_ms: int, scheme: int, dim: int, reply_format: int, values: numpy.ndarray, scales: numpy.ndarray, experts: numpy.ndarray, weights: numpy.ndarray, owners: numpy.ndarray, grid: int, takes_bf16: bool, sums: numpy.ndarray, patience_s: float, out: list) -> None:
        """
        Send a call, of ids from `first_id` on, to each slot that owns any of a row's experts, then `collect` their replies. Appended to `out`: (calls, why it stopped, lane, errno, replies, unread), where a call is (lane, slot, experts, bytes of the ClientFrame, errno, bytes that the socket did not take), in `split_row`'s order; a reply (call id, lane, seconds, queue_us, compute_us, load_us, bytes); unread (lane, bytes). No calls: a slot has no lane, or two have one, and nothing was sent.
        """

    def collect(self, wanted: Sequence[int], grid: int, takes_bf16: bool, sums: numpy.ndarray, patience_s: float, out: list) -> None:
        """
        Add the replies to these calls of the last row to `sums` as they come, for so long at most. Appends to `out` as `run` does, without calls.
        """
