"""Readers: bytes of expert files into memory, by the fastest way that works on this machine."""

from shoal.experts.readers.open_reader import open_reader
from shoal.experts.readers.queue_reader import Tuning
from shoal.experts.readers.reader import (
    LATENCY_BOUNDS_S,
    Backend,
    Done,
    Read,
    Reader,
    ReaderFigures,
    Source,
)

__all__ = [
    "LATENCY_BOUNDS_S",
    "Backend",
    "Done",
    "Read",
    "Reader",
    "ReaderFigures",
    "Source",
    "Tuning",
    "open_reader",
]
