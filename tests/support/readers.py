"""Readers for tests: opened where the backend works, their reads collected."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.errors import UsageError
from shoal.experts.readers import Backend, Done, Read, Reader, Source, Tuning, open_reader
from shoal.experts.readers.open_reader import explain
from shoal.ops.reads import Ring

PAGE = 4096


def ring_problem() -> str:
    """Return why there is no io_uring here, or nothing."""
    try:
        Ring(8)
    except OSError as error:
        return explain(error)
    return ""


def random_bytes(num_pages: int) -> bytes:
    """Return content for a file, the same every time."""
    return np.random.default_rng(7).integers(0, 256, num_pages * PAGE, np.uint8).tobytes()


def aligned(num_pages: int) -> NDArray[np.uint8]:
    """Return zeros that begin at a page."""
    memory = np.zeros((num_pages + 1) * PAGE, np.uint8)
    skip = -memory.__array_interface__["data"][0] % PAGE
    return memory[skip : skip + num_pages * PAGE]


def open_here(
    backend: Backend | None, paths: Sequence[Path], tuning: Tuning | None = None
) -> Reader:
    """Open a reader, or skip where the backend does not work."""
    try:
        return open_reader(backend, None, paths, tuning=tuning)
    except UsageError as error:
        pytest.skip(str(error))


def collect(reader: Reader, count: int) -> dict[int, Done]:
    """Wait until that many reads are done."""
    done: dict[int, Done] = {}
    while len(done) < count:
        ended = reader.wait(30.0)
        assert ended, f"nothing ends: {reader.figures()}"
        for one in ended:
            assert one.tag not in done
            done[one.tag] = one
    return done


def read_one(reader: Reader, path: Path, offset: int, num_pages: int) -> tuple[Done, bytes]:
    """Read an extent; return how it ended and the bytes."""
    out = aligned(num_pages)
    reader.submit([Read(0, (Source(path, offset),), out)])
    return collect(reader, 1)[0], out.tobytes()
