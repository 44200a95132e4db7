"""Matrix products and expert FFNs on weights in kernel layout, and what brings weights there.

Typed fronts of the native kernels; docs/formats/kernel-layout.md draws the layout and
docs/numerics.md gives the sequence of float operations of every result. The bits of a result do not
depend on the number of rows or threads or on the instruction set.

Arrays must be C-contiguous and of the dtype stated: a wrong one is a TypeError or ValueError, never
a silent copy. All functions release the GIL. Shape letters: T rows, D model dim, I ffn dim.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal import _kernels
from shoal.errors import NumericError, UsageError
from shoal.quant import (
    ALIGNMENT,
    LANES,
    Format,
    Scheme,
    group_bytes,
    matrix_bytes,
    round_up,
    row_bytes,
)
from shoal.rows import Rows

KNOWN_ISAS = ("scalar", "avx2", "avxvnni", "avx512", "amx")  # slowest first

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]

_PAGE = 4096
_HUGE_PAGE = 2 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight matrix [rows, cols] in kernel layout; data begins at a 64-byte boundary."""

    format: Format
    rows: int
    cols: int
    data: U8

    def __post_init__(self) -> None:
        expected = matrix_bytes(self.format, self.rows, self.cols)
        if self.data.dtype != np.uint8 or self.data.shape != (expected,):
            raise ValueError(
                f"a {self.format.label} matrix [{self.rows}, {self.cols}] is {expected} bytes, "
                f"got {self.data.dtype} {self.data.shape}"
            )
        if self.data.ctypes.data % ALIGNMENT != 0:
            raise ValueError("matrix data must begin at a 64-byte boundary: use aligned_empty")

    @property
    def scheme(self) -> Scheme:
        """The scheme of the rows that this matrix multiplies."""
        return self.format.scheme


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """The shape and formats of one packed expert: (gate, up) groups, then down groups."""

    dim: int
    ffn_dim: int
    gate_up: Format
    down: Format

    @property
    def num_bytes(self) -> int:
        """Bytes of one packed expert, without padding at its end."""
        gate_up = round_up(self.ffn_dim, LANES) // LANES * 2 * group_bytes(self.gate_up, self.dim)
        return gate_up + matrix_bytes(self.down, self.dim, self.ffn_dim)

    @property
    def scheme(self) -> Scheme:
        """The scheme of the rows that an expert takes."""
        return self.gate_up.scheme


def aligned_empty(num_bytes: int, *, huge: bool = False) -> U8:
    """Return uninitialised bytes that begin at a 4096-byte boundary.

    Args:
        num_bytes: >= 0.
        huge: what is at least 2 MiB begins at such a boundary, and the system is asked for huge
            pages where it has them: with prefetching they are worth up to 20 % of a cold expert's
            speed.
    """
    huge = huge and num_bytes >= _HUGE_PAGE
    alignment = _HUGE_PAGE if huge else _PAGE
    memory = np.empty(num_bytes + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    aligned = memory[start : start + num_bytes]
    if huge:
        _kernels.advise_huge_pages(aligned[: num_bytes // _PAGE * _PAGE])
    return aligned


class HugeArena:
    """Memory for arrays that live as long as each other: side by side, so that huge pages hold all.

    An array of its own keeps up to 2 MiB at its end in small pages. The memory is given back with
    the last array of a chunk.
    """

    CHUNK_BYTES = 32 * _HUGE_PAGE

    def __init__(self) -> None:
        self._left = np.empty(0, np.uint8)

    def take(self, num_bytes: int) -> U8:
        """Return uninitialised bytes that begin at a 4096-byte boundary; num_bytes >= 1."""
        size = round_up(num_bytes, _PAGE)
        if size > self._left.size:
            if size > self.CHUNK_BYTES // 2:
                return aligned_empty(num_bytes, huge=True)
            self._left = aligned_empty(self.CHUNK_BYTES, huge=True)
        taken, self._left = self._left[:num_bytes], self._left[size:]
        return taken


def set_threads(n: int) -> None:
    """Use n threads in every kernel, 1 <= n <= 256. Initially: the CPUs this process may use.

    Call it when no other thread is computing.
    """
    _kernels.set_threads(n)


def rest_threads() -> None:
    """Say that no kernel is called for a while: its threads leave their cores to others at once."""
    _kernels.rest_threads()


def num_threads() -> int:
    return _kernels.num_threads()


def isa() -> str:
    """Return the instruction set in use: one of `KNOWN_ISAS`."""
    return _kernels.isa()


def available_isas() -> tuple[str, ...]:
    """Return the instruction sets that this build and CPU have, slowest first."""
    return tuple(_kernels.available_isas())


def set_isa(name: str) -> None:
    """Use that instruction set in every kernel: the same results, another speed.

    Raises:
        UsageError: unknown, or this CPU cannot run it; lists those it can.
    """
    if name not in available_isas():
        known = "not possible here" if name in KNOWN_ISAS else "unknown"
        raise UsageError(
            f"instruction set {name!r}: {known}; this CPU has {', '.join(available_isas())}"
        )
    _kernels.set_isa(name)


def choose_isa_from_environment() -> None:
    """Obey SHOAL_ISA if it is set and not empty.

    Raises:
        UsageError: as set_isa.
    """
    wanted = os.environ.get("SHOAL_ISA", "")
    if wanted:
        try:
            set_isa(wanted)
        except UsageError as error:
            raise UsageError(f"SHOAL_ISA: {error}") from None


def pack_rows(fmt: Format, source: U8, cols: int, out: U8) -> None:
    """Rearrange row-major rows into whole row groups of kernel layout.

    Args:
        source: [n, row bytes]: GGUF blocks, or plain little-endian floats. Call it with multiples
            of 16 rows to stream a matrix; only the last call may have others.
        cols: columns; a last, partial block is whole in source, zero-padded.
        out: ceil(n / 16) * group_bytes(fmt, cols) bytes.
    """
    _kernels.pack_rows(fmt, source, cols, out)


def pack_matrix(fmt: Format, source: U8, rows: int, cols: int) -> Matrix:
    """Return the matrix whose row-major rows are `source`; see pack_rows."""
    if source.shape[0] != rows:
        raise ValueError(f"source has {source.shape[0]} rows, expected {rows}")
    data = aligned_empty(matrix_bytes(fmt, rows, cols))
    pack_rows(fmt, source, cols, data)
    return Matrix(fmt, rows, cols, data)


def pack_expert(layout: ExpertLayout, gate: U8, up: U8, down: U8, out: U8) -> None:
    """Pack row-major gate and up [I, row bytes] and down [D, row bytes] into layout.num_bytes."""
    _kernels.pack_expert(
        layout.dim, layout.ffn_dim, layout.gate_up, layout.down, gate, up, down, out
    )


def unpack_expert(layout: ExpertLayout, packed: U8) -> tuple[F32, F32, F32]:
    """Return the values of one packed expert: gate and up [I, D], down [D, I]."""
    size = group_bytes(layout.gate_up, layout.dim)
    end = round_up(layout.ffn_dim, LANES) // LANES * 2 * size
    pairs = packed[:end].reshape(-1, 2, size)

    def values(fmt: Format, rows: int, cols: int, data: U8) -> F32:
        aligned = aligned_empty(data.size)
        aligned.reshape(data.shape)[:] = data
        return unpack_matrix(Matrix(fmt, rows, cols, aligned))

    return (
        values(layout.gate_up, layout.ffn_dim, layout.dim, pairs[:, 0]),
        values(layout.gate_up, layout.ffn_dim, layout.dim, pairs[:, 1]),
        values(layout.down, layout.dim, layout.ffn_dim, packed[end : layout.num_bytes]),
    )


def unpack_matrix(m: Matrix) -> F32:
    """Return the values of a matrix, [rows, cols]: each rounded to float32 at most once."""
    return embed(m, np.arange(m.rows, dtype=np.int32))


def embed(m: Matrix, ids: I32) -> F32:
    """Return rows `ids` of a matrix, [T, cols]. An id outside [0, m.rows) is a ValueError."""
    out = np.empty((len(ids), m.cols), np.float32)
    _kernels.unpack_rows(m.format, m.rows, m.cols, m.data, ids, out)
    return out


def quantise_q4_k(values: F32) -> U8:
    """Return the Q4_K blocks (GGUF order) of finite values [n, cols], cols a multiple of 256.

    Minimises the squared error; the same bytes on every CPU.
    """
    out = np.empty((values.shape[0], values.shape[1] // 256 * 144), np.uint8)
    _kernels.quantise_q4_k(values, out)
    return out


def quantise_table(fmt: Format, values: F32, importance: F32 | None = None) -> U8:
    """Return the row-major blocks of finite values [n, cols], cols a multiple of 32.

    Minimises the squared error; the same bytes on every CPU. A value beyond what an f16 scale
    reaches becomes the largest that it does.

    Args:
        fmt: Q4_0, Q4_T or Q3_T.
        importance: [cols], >= 0: weighs the squared error of a column; None: all alike.
    """
    out = np.empty((values.shape[0], row_bytes(fmt, values.shape[1])), np.uint8)
    _kernels.quantise_table(fmt, values, importance, out)
    return out


def check_finite(fmt: Format, source: U8) -> bool:
    """Return whether all scales (or weights, for float formats) of row-major rows are finite."""
    return _kernels.check_finite(fmt, source)


def _raise_for(bad: Sequence[int], what: str) -> None:
    if bad:
        shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
        raise NumericError(f"{what} in row {shown}", tuple(bad))


def quantise_rows(scheme: Scheme, x: F32) -> Rows:
    """Return the rows x [T, D] in a scheme; Scheme.F32 keeps x itself, not a copy.

    Raises:
        NumericError: rows with a NaN or an infinity.
    """
    num_rows, dim = x.shape
    if scheme is Scheme.F32:
        _raise_for(_kernels.non_finite_rows(x), "a value that is not finite")
        return Rows(scheme, dim, x, np.empty((num_rows, 0), np.float32))
    num_spans = -(-dim // scheme.span)
    values = np.empty((num_rows, num_spans * scheme.span), np.int8)
    scales = np.empty((num_rows, num_spans), np.float32)
    bad = _kernels.quantise_rows(scheme, x, values, scales)
    if bad:
        _raise_for(bad, "a value that is not finite")
    return Rows(scheme, dim, values, scales)


def matmul(m: Matrix, rows: Rows, bias: F32 | None = None, out: F32 | None = None) -> F32:
    """Return rows @ m.T + bias, [T, m.rows].

    Args:
        rows: T rows of m.cols columns in m.scheme.
        bias: [m.rows]; starts the accumulators.
        out: written and returned if given.
    """
    if rows.dim != m.cols:
        raise ValueError(f"rows of {rows.dim} columns meet a matrix of {m.cols}")
    result = np.empty((rows.num_rows, m.rows), np.float32) if out is None else out
    _kernels.matmul(
        m.format,
        m.rows,
        m.cols,
        m.data,
        rows.scheme,
        rows.values,
        rows.scales,
        bias,
        result,
    )
    return result


def expert_ffn(layout: ExpertLayout, weights: U8, rows: Rows) -> F32:
    """Return down(silu(gate(x)) * up(x)) of one packed expert, [T, D].

    Raises:
        NumericError: rows whose hidden values or outputs are not finite.
    """
    _check_rows(layout, rows)
    out = np.empty((rows.num_rows, layout.dim), np.float32)
    bad = _kernels.expert_ffn(
        layout.dim,
        layout.ffn_dim,
        layout.gate_up,
        layout.down,
        weights,
        rows.scheme,
        rows.values,
        rows.scales,
        out,
    )
    _raise_for(bad, "an expert output that is not finite")
    return out


def expert_sums(
    layout: ExpertLayout,
    weights: Sequence[U8],
    rows: Rows,
    pair_offsets: I32,
    pair_rows: I32,
    pair_weights: F32,
    grid: int,
    out: I64 | None = None,
) -> I64:
    """Run one layer's experts and add up their weighted outputs as integers.

    Args:
        layout: of every expert.
        weights: one packed expert each, layout.num_bytes, 64-byte aligned.
        rows: T rows of layout.dim columns in layout.scheme.
        pair_offsets: [experts + 1], ascending from 0 to P: expert e has the pairs
            [pair_offsets[e], pair_offsets[e + 1]).
        pair_rows: [P], each in [0, T).
        pair_weights: [P], routing weights.
        grid: in -100..100; adds q = rne(weight * y * 2^grid), the product weight * y in float32.
        out: [T, D], added to and returned if given.

    Returns:
        [T, D] int64 sums.

    Raises:
        NumericError: rows with a non-finite hidden value or output or with |q| >= 2^44. All other
            rows of `out` are right; those rows' sums are undefined.
    """
    _check_rows(layout, rows)
    sums = np.zeros((rows.num_rows, layout.dim), np.int64) if out is None else out
    bad = _kernels.expert_sums(
        layout.dim,
        layout.ffn_dim,
        layout.gate_up,
        layout.down,
        weights if isinstance(weights, list) else list(weights),
        rows.scheme,
        rows.values,
        rows.scales,
        pair_offsets,
        pair_rows,
        pair_weights,
        grid,
        sums,
    )
    _raise_for(bad, "an expert output that is not finite or beyond 2^44 quanta")
    return sums


def _check_rows(layout: ExpertLayout, rows: Rows) -> None:
    if rows.dim != layout.dim:
        raise ValueError(f"rows of {rows.dim} columns meet an expert of {layout.dim}")
