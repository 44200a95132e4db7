"""Digests of every op, for shoal.numerics: the bits that this build computes on this CPU."""

from shoal import _kernels


def compute_digests() -> list[tuple[str, str, int]]:
    """Return (op, format, 64-bit digest of its results on fixed inputs) of every op.

    On the current instruction set and pool; a few milliseconds.
    """
    return _kernels.compute_digests()
