"""The native side of shoal.experts.readers: an io_uring, and what direct reads ask of a file."""

from shoal._kernels import Ring, direct_alignment

__all__ = ["Ring", "direct_alignment"]
