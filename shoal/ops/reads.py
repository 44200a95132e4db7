"""The native side of shoal.experts: an io_uring, what direct reads ask of files, pages."""

from shoal._kernels import Ring, direct_alignment, populate, set_read_priority

__all__ = ["Ring", "direct_alignment", "populate", "set_read_priority"]
