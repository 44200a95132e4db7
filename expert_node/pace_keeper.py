"""Paces a node's reads: samples drives and reader each second, and tells the store how to read."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from shoal import limits
from shoal.experts.drive_sensors import DriveSensors, Temperature
from shoal.experts.pacing import (
    Pace,
    Pacer,
    PacingLimits,
    PacingState,
    Sample,
    quantile,
)
from shoal.experts.readers import LATENCY_BOUNDS_S, ReaderFigures
from shoal.experts.store import StoreFigures
from shoal.log import get_logger

SAMPLE_INTERVAL_S = 1.0
_log = get_logger("pacing")


class PacedStore(Protocol):
    """What is paced: an `ExpertStore`."""

    def figures(self) -> StoreFigures: ...
    def set_pace(
        self, queue_depth: int | None, bytes_per_s: float | None, *, allows_prefetch: bool
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class PaceView:
    """What held after the last sample."""

    pace: Pace
    temperatures: tuple[Temperature, ...]


class PaceKeeper:
    """The shell of `Pacer`. Thread-safe."""

    def __init__(
        self,
        store: PacedStore,
        sensors: DriveSensors,
        thermal_limit_c: float,
        max_bytes_per_s: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Apply the bandwidth limit at once."""
        self._store, self._sensors, self._clock = store, sensors, clock
        self._limits = PacingLimits(thermal_limit_c, limits.MAX_READ_QUEUE_DEPTH, max_bytes_per_s)
        self._pacer = Pacer(self._limits)
        self._before: ReaderFigures | None = None
        self._lock = threading.Lock()
        self._is_closed = False
        self._told: set[str] = set()  # files whose fallback the log has
        self._has_told_bounce = False
        self._own_depth: int | None = None  # what the store reads with when nobody paces it
        self._applied: tuple[int | None, int | None, bool] | None = None
        full = Pace(PacingState.FULL, self._limits.max_queue_depth, max_bytes_per_s, True)
        self.view = PaceView(full, ())
        self._apply(full)
        if not sensors.drives:
            _log.info("no drive sensor: reads are paced by latency alone")

    def configure(self, thermal_limit_c: float, max_bytes_per_s: int | None) -> None:
        """Take other limits, from now on."""
        with self._lock:
            self._limits = replace(
                self._limits, thermal_limit_c=thermal_limit_c, max_bytes_per_s=max_bytes_per_s
            )
            self._pacer.configure(self._limits)
        self.sample()

    def use_sensors(self, sensors: DriveSensors) -> None:
        """Look at other drives: the artifact has moved."""
        with self._lock:
            self._sensors = sensors

    def close(self) -> None:
        """Leave the store alone from now on."""
        with self._lock:
            self._is_closed = True

    async def run(self) -> None:
        """Sample every second, for ever, away from the event loop: a sensor may take its time."""
        while True:
            await asyncio.sleep(SAMPLE_INTERVAL_S)
            await asyncio.to_thread(self.sample)

    def sample(self) -> None:
        """Look once, and apply what follows."""
        with self._lock:
            if not self._is_closed:
                self._sample()

    def _sample(self) -> None:
        temperatures = tuple(self._sensors.read())
        reader = self._store.figures().reader
        if self._own_depth is None and reader is not None:
            self._own_depth = reader.queue_depth
            self._limits = replace(self._limits, max_queue_depth=reader.queue_depth)
            self._pacer.configure(self._limits)
        pace = self._pacer.on_sample(self._sampled(temperatures, reader))
        before = self.view.pace
        self.view = PaceView(pace, temperatures)
        self._apply(pace)
        self._tell_fallbacks(reader)
        if pace.state is not before.state:
            report = _log.info if pace.state is PacingState.FULL else _log.warning
            report(
                "reads are paced",
                state=pace.state.value,
                why=pace.why or "cool and quick again",
                queue_depth=pace.queue_depth,
                prefetch=pace.allows_prefetch,
            )

    def _tell_fallbacks(self, reader: ReaderFigures | None) -> None:
        if reader is None:
            return
        for file, why in reader.fallbacks.items():
            if file not in self._told:
                self._told.add(file)
                _log.warning("a file is read in a lesser way", file=file, why=why)
        if reader.num_unbounced and not self._has_told_bounce:
            self._has_told_bounce = True
            _log.warning(
                "all buffers for misaligned chunks are in use: more are read by the page cache",
                buffers=reader.bounce_buffers,
                chunks=reader.num_unbounced,
            )

    def _sampled(
        self, temperatures: tuple[Temperature, ...], reader: ReaderFigures | None
    ) -> Sample:
        hottest = max(temperatures, key=lambda each: each.celsius, default=None)
        sample = Sample(
            self._clock(),
            None if hottest is None else hottest.celsius,
            None if hottest is None else hottest.warning_c,
        )
        before, self._before = self._before, reader
        if reader is None or before is None or reader.num_bytes < before.num_bytes:
            return sample  # nothing read yet, or the reader is a new one
        counts = [
            now - then for now, then in zip(reader.chunk_latency, before.chunk_latency, strict=True)
        ]
        return replace(
            sample,
            num_reads=sum(counts),
            num_bytes=reader.num_bytes - before.num_bytes,
            p99_s=quantile(LATENCY_BOUNDS_S, counts, 0.99),
        )

    def _apply(self, pace: Pace) -> None:
        depth = None if pace.queue_depth == self._limits.max_queue_depth else pace.queue_depth
        wanted = (depth, pace.bytes_per_s, pace.allows_prefetch)
        if wanted != self._applied:
            self._applied = wanted
            self._store.set_pace(depth, pace.bytes_per_s, allows_prefetch=pace.allows_prefetch)
