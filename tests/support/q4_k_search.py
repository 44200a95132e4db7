"""llama.cpp's Q4_K quantisation in NumPy: the yardstick for our own.

Source: ggml-quants.c, make_qkx2_quants and quantize_row_q4_K_ref, with their parameters
(nmax 15, rmin -1, rdelta 0.1, nstep 20, weights av_x + |x|).
"""

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


def _search(x: F64) -> tuple[float, float]:
    """Return (scale, min >= 0) of one sub-block of 32."""
    weights = np.sqrt(np.mean(x**2)) + np.abs(x)
    low, high = min(x.min(), 0.0), x.max()
    if high == low:
        return 0.0, -low
    scale, offset = (high - low) / 15, low
    best = np.sum(weights * (scale * np.clip(np.rint((x - low) / scale), 0, 15) + offset - x) ** 2)
    sum_w, sum_x = weights.sum(), np.sum(weights * x)
    for step in range(21):
        quants = np.clip(np.rint((14 + 0.1 * step) / (high - low) * (x - low)), 0, 15)
        sum_q, sum_qq = np.sum(weights * quants), np.sum(weights * quants**2)
        sum_qx = np.sum(weights * quants * x)
        determinant = sum_w * sum_qq - sum_q**2
        if determinant <= 0:
            continue
        new_scale = (sum_w * sum_qx - sum_x * sum_q) / determinant
        new_offset = (sum_qq * sum_x - sum_q * sum_qx) / determinant
        if new_offset > 0:
            new_offset, new_scale = 0.0, sum_qx / sum_qq
        error = np.sum(weights * (new_scale * quants + new_offset - x) ** 2)
        if error < best:
            best, scale, offset = error, new_scale, new_offset
    return scale, -offset


def _block(x: F64) -> NDArray[np.uint8]:
    fits = [_search(sub) for sub in x.reshape(8, 32)]
    scales, mins = np.array([f[0] for f in fits]), np.array([f[1] for f in fits])
    d, dmin = np.float16(scales.max() / 63), np.float16(mins.max() / 63)
    to_bits = 63 / scales.max() if scales.max() > 0 else 0.0
    to_min_bits = 63 / mins.max() if mins.max() > 0 else 0.0
    scale_bits = np.minimum(np.rint(to_bits * scales), 63).astype(np.uint8)
    min_bits = np.minimum(np.rint(to_min_bits * mins), 63).astype(np.uint8)
    step = float(d) * scale_bits
    shifted = x.reshape(8, 32) + (float(dmin) * min_bits)[:, None]
    quants = np.rint(shifted / np.where(step > 0, step, 1)[:, None])
    quants = np.where(step[:, None] > 0, np.clip(quants, 0, 15), 0).astype(np.uint8)
    packed = np.zeros(12, np.uint8)
    packed[:4], packed[4:8] = scale_bits[:4], min_bits[:4]
    packed[8:] = (scale_bits[4:] & 15) | (min_bits[4:] & 15) << 4
    packed[:4] |= scale_bits[4:] >> 4 << 6
    packed[4:8] |= min_bits[4:] >> 4 << 6
    head = np.array([d, dmin], np.float16).view(np.uint8)
    nibbles = (quants[::2] | quants[1::2] << 4).astype(np.uint8)
    return np.concatenate([head, packed, nibbles.ravel()])


def quantise_like_llama_cpp(values: F32) -> NDArray[np.uint8]:
    """Return GGUF Q4_K rows of values [n, cols]."""
    blocks = values.astype(np.float64).reshape(-1, 256)
    return np.stack([_block(x) for x in blocks]).reshape(values.shape[0], -1)
