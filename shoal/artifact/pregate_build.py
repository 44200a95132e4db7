"""Makes pre-gate matrices from routers and norms: at convert, and where an artifact lacks them.

Element by element in IEEE operations, then our own quantiser: the same bytes on every CPU.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from shoal import ops
from shoal.artifact.layout import pregate_header
from shoal.artifact.pregate import PREGATE_FILE, PregateEntry, PregatePlan, place
from shoal.artifact.writer import ArtifactWriter
from shoal.quant import Format, round_up

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

# A column whose norm weight is that much below the largest: int8 rows hold nothing of it, and the
# quotient would blow up what is left. 127 steps to the largest value, and a little.
_LEAST_NORM = np.float32(2.0**-10)
# Below this a block's scale is zero in float16 anyway; its reciprocal would be infinite.
_TINY = np.float32(2.0**-24)
# What float16 scales hold. Only wild weights come near it, and then any guess is as good.
_LARGEST = np.float32(65504)


def write_pregates(
    plans: Sequence[PregatePlan],
    values: Callable[[str], F32],
    writer: ArtifactWriter,
    progress: Callable[[int], None],
) -> tuple[PregateEntry, ...]:
    """Make and write pregate.safetensors; write nothing where there is no plan.

    Args:
        values: as `build_pregate` takes it.
        progress: told the bytes of each matrix.
    """
    if not plans:
        return ()
    entries: list[PregateEntry] = []
    header = pregate_header(plans)
    with writer.file(PREGATE_FILE, header) as file:
        file.take_hash()
        for plan, offset in place(plans, len(header)):
            file.write(build_pregate(plan, values))
            entries.append(PregateEntry(plan, offset, file.take_hash()))
            progress(plan.num_bytes)
    return tuple(entries)


def build_pregate(plan: PregatePlan, values: Callable[[str], F32]) -> U8:
    """Return a pre-gate matrix in kernel layout, plan.num_bytes.

    Args:
        values: reads a dense tensor by our name: a router [E, D], or a norm of D values.
    """
    router = values(f"layers.{plan.target}.router")
    assert router.shape == (plan.num_experts, plan.dim), router.shape
    mine = values(f"layers.{plan.layer}.ffn.norm").reshape(-1)
    theirs = values(f"layers.{plan.target}.ffn.norm").reshape(-1)
    is_used = np.abs(mine) >= np.abs(mine).max() * _LEAST_NORM
    with np.errstate(over="ignore"):
        quotient = theirs / np.where(is_used & (mine != 0), mine, 1)
        ratio = np.where(is_used, np.clip(quotient, -_LARGEST, _LARGEST), 0).astype(np.float32)
        scores = np.clip(router * ratio, -_LARGEST, _LARGEST).astype(np.float32)
    parts: list[U8] = []
    for _ in range(plan.parts):
        encoded, rounded = _encode(plan.format, scores)
        parts.append(encoded)
        scores = scores - rounded
    return ops.pack_matrix(plan.format, np.concatenate(parts), plan.rows, plan.dim).data


def _encode(fmt: Format, values: F32) -> tuple[U8, F32]:
    # Returns row-major rows and the values that they stand for.
    num_rows, cols = values.shape
    padded = np.pad(values, ((0, 0), (0, round_up(cols, fmt.block_cols) - cols)))
    match fmt:
        case Format.BF16:
            bits = padded.view(np.uint32)
            half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
            encoded: U8 = ((bits + half) >> np.uint32(16)).astype("<u2").view(np.uint8)
        case Format.Q8_0:
            encoded = _q8_0(padded)
        case _:
            assert fmt is Format.Q4_K, fmt
            encoded = ops.quantise_q4_k(padded)
    encoded = np.ascontiguousarray(encoded).reshape(num_rows, -1)
    rounded = ops.unpack_matrix(ops.pack_matrix(fmt, encoded, num_rows, cols))
    return encoded, rounded


def _q8_0(values: F32) -> U8:
    blocks = values.reshape(-1, Format.Q8_0.block_cols)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    scales = np.where(largest < _TINY, 0, np.minimum(largest / np.float32(127), 65504))
    scales = scales.astype("<f2")
    divisors = np.where(scales == 0, 1, scales).astype(np.float32)
    quants = np.clip(np.rint(blocks / divisors), -127, 127)
    quants = np.where(scales == 0, 0, quants).astype(np.int8)
    return np.concatenate([scales.view(np.uint8), quants.view(np.uint8)], axis=1)
