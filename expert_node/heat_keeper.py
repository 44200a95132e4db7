"""Keeps what a node records on disk: the heat map, and the routing trace beside it.

Written every minute, at a reload and at the end, each file whole or not at all. A disk that is full
costs a warning and a count, never a call: the file that was there stays.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shoal import limits
from shoal.errors import CorruptArtifact, UsageError
from shoal.experts.call import ExpertCall
from shoal.experts.heat import HeatMap, decode_heat, encode_heat
from shoal.experts.recording import Geometry, Recorder
from shoal.experts.routing_trace import encode_trace
from shoal.log import get_logger
from shoal.replaced_file import replace_file

WRITE_INTERVAL_S = 60.0
TRACE_SUFFIX = ".routing"
_log = get_logger("heat")


@dataclass(frozen=True, slots=True)
class HeatFigures:
    """num_calls, num_rows: since the start. num_failures: writes that failed.

    num_dropped: rows that the routing trace lacks: their calls did not fit together to passes.
    """

    num_calls: int
    num_rows: int
    num_failures: int
    num_dropped: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is recorded from now on, and where. before: what another file holds, halved."""

    geometry: Geometry
    path: Path | None
    counts: bool
    before: HeatMap | None


class HeatKeeper:
    """Counts every call, and writes the counts where somebody asked for it. Lives on the loop."""

    def __init__(self, geometry: Geometry, path: Path | None, *, counts: bool = False) -> None:
        """Begin with what the file at `path` holds, halved.

        Args:
            path: None: nothing is written. counts: whether experts are counted all the same: it
                costs a call some microseconds.

        Raises: UsageError: there is something else than a heat map of this model.
        """
        self._path = path
        self._records = counts or path is not None
        self._recorder = Recorder(geometry, _before(path, geometry.identity))
        self._rows_written = self._recorder.num_rows
        self._num_calls = self._num_rows = self._num_failures = 0
        self._dropped_before = 0  # by recorders that were replaced
        self._say_what_is_recorded()

    @property
    def path(self) -> Path | None:
        return self._path

    @property
    def records(self) -> bool:
        """Whether it wants to see each call, and not only how many there were."""
        return self._records

    def on_call(self, stream_id: int, num_rows: int, call: Callable[[], ExpertCall]) -> None:
        """Count a call of that many rows that was taken in; `call` makes it."""
        self._num_calls += 1
        self._num_rows += num_rows
        if self._records:
            self._recorder.on_call(stream_id, call())

    def on_stream_end(self, stream_id: int) -> None:
        """Learn that a stream is over."""
        self._recorder.on_stream_end(stream_id)

    def heat(self) -> HeatMap:
        """Return the counts so far."""
        return self._recorder.heat()

    def figures(self) -> HeatFigures:
        """Return what was counted since the start. From any thread."""
        num_dropped = self._dropped_before + self._recorder.num_dropped
        return HeatFigures(self._num_calls, self._num_rows, self._num_failures, num_dropped)

    def prepare(self, geometry: Geometry, path: Path | None, *, counts: bool = False) -> "Prepared":
        """Read what `rebind` needs, on any thread. Raises as `__init__` does."""
        before = None if path == self._path else _before(path, geometry.identity)
        return Prepared(geometry, path, counts, before)

    def rebind(self, prepared: "Prepared") -> None:
        """Record for other experts, or into another file; what was counted goes on counting."""
        self._records = prepared.counts or prepared.path is not None
        if (prepared.geometry, prepared.path) == (self._recorder.geometry, self._path):
            return
        heat = self._recorder.heat() if prepared.path == self._path else prepared.before
        self._dropped_before += self._recorder.num_dropped
        self._recorder, self._path = Recorder(prepared.geometry, heat), prepared.path
        self._say_what_is_recorded()
        self._rows_written = self._recorder.num_rows

    def _say_what_is_recorded(self) -> None:
        if self._path is not None and self._recorder.geometry.top_k is None:
            _log.info(
                "heat alone is recorded, no routing trace: this node sees a part of each row, or "
                "its layers differ; `shoal run --record-routing` sees them all",
                path=str(self._path),
            )

    async def write(self) -> None:
        """Write both files if something was counted since the last time."""
        recorder, path = self._recorder, self._path
        if path is None or recorder.num_rows == self._rows_written:
            return
        heat, trace, num_rows = recorder.heat(), recorder.trace(), recorder.num_rows

        def write() -> None:
            replace_file(path, encode_heat(heat))
            if trace is not None:
                replace_file(trace_path(path), encode_trace(trace))

        try:
            await asyncio.to_thread(write)
        except OSError as error:
            self._num_failures += 1
            _log.warning(
                "heat not written: calls are served all the same, and it is tried again",
                path=str(path),
                error=error.strerror or str(error),
            )
            return
        self._rows_written = num_rows


def trace_path(path: Path) -> Path:
    """Return where the routing trace lies beside a heat map: heat.json -> heat.routing."""
    return path.with_suffix(TRACE_SUFFIX)


def read_heat(path: Path, identity: str, name: str) -> HeatMap:
    """Read a heat map of this model; `name` is the option that asked for it.

    Raises: UsageError: it is no heat map, or another model's; OSError.
    """
    if path.stat().st_size > limits.MAX_HEAT_BYTES:
        raise UsageError(f"{name} {path}: more than {limits.MAX_HEAT_BYTES} bytes: not a heat map")
    try:
        heat = decode_heat(path.read_bytes(), str(path))
    except CorruptArtifact as error:
        raise UsageError(f"{name}: {error}: record one with --record-heat") from None
    if heat.identity != identity:
        raise UsageError(
            f"{name} {path}: recorded with another model (identity {heat.identity[:12]}, this one "
            f"is {identity[:12]})"
        )
    return heat


def _before(path: Path | None, identity: str) -> HeatMap | None:
    if path is None:
        return None
    if not path.parent.is_dir():
        raise UsageError(f"--record-heat {path}: there is no folder {path.parent}")
    try:
        return read_heat(path, identity, "--record-heat").faded()
    except FileNotFoundError:
        return None
