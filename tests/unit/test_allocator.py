"""Freed memory is kept where the C library can: large buffers come back without new pages."""

import resource
import sys

import pytest

from shoal.allocator import keep_freed_memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's setting")
def test_a_buffer_that_comes_and_goes_maps_its_pages_once() -> None:
    if not keep_freed_memory():
        pytest.skip("this C library has no mallopt")
    for _ in range(3):
        bytes(1_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for i in range(100):
        bytearray(b"x" * (1_000_000 + i))
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < 100 * 244, "every buffer was mapped anew"
