"""What every benchmark shares: the read-bandwidth probe, the table, the result file."""

import ctypes
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.steady import warm_up
from client.examine import cpu_name
from shoal import __version__, ops
from shoal.grpc_settings import prepare_grpc

prepare_grpc("ERROR")  # as the commands do, before anybody imports it

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PROBE_BYTES = 512 * 1024**2  # far beyond every last-level cache

Row = Mapping[str, Any]


class BandwidthProbe:
    """Reads half a gigabyte of hugepages with plain vector loads, on as many threads as asked.

    A thread reads its part as one stream or as four; which is faster depends on the machine and
    on what else it does.
    """

    WAYS = (1, 4)  # streams a thread

    def __init__(self) -> None:
        source, library = (
            ROOT / "bench" / "read_bandwidth.cpp",
            ROOT / "build" / "bench" / "read.so",
        )
        if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
            library.parent.mkdir(parents=True, exist_ok=True)
            # For this machine alone, unlike the kernels: a probe must not be what is slow.
            compiler = [os.environ.get("CXX", "c++"), "-O3", "-march=native", "-std=c++17"]
            flags = ["-pthread", "-shared", "-fPIC", str(source), "-o", str(library)]
            subprocess.run([*compiler, *flags], check=True)
        self._read = ctypes.CDLL(str(library)).read_seconds
        self._read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int]
        self._read.restype = ctypes.c_double
        self._data = ops.aligned_empty(PROBE_BYTES, huge=True)
        self._data[:] = 1

    def read(self, threads: int, streams: int) -> float:
        """Return the seconds of one reading."""
        address = self._data.ctypes.data
        taken: float = self._read(address, PROBE_BYTES, threads, streams)
        return taken

    def gb_per_s(self, threads: int, repeats: int = 3) -> float:
        """Return the best of a few readings of each way, 1e9 bytes a second."""
        taken = [self.read(threads, streams) for _ in range(repeats) for streams in self.WAYS]
        return PROBE_BYTES / min(taken) / 1e9

    def steady_gb_per_s(self, threads: int) -> float:
        """Return what is read while as many cores are steady, in 1e9 bytes a second.

        That is the better way's median over STEADY_S.
        """
        taken: dict[int, list[float]] = {streams: [] for streams in self.WAYS}

        def read() -> None:
            for streams, each in taken.items():
                each.append(self.read(threads, streams))

        warm_up(read)
        return PROBE_BYTES / min(statistics.median(each) for each in taken.values()) / 1e9


def seconds(work: Callable[[], object]) -> float:
    """Return how long `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Return the median, the least and the greatest of some samples."""
    ordered = np.sort(np.array(samples))
    return {
        "median": float(np.median(ordered)),
        "min": float(ordered[0]),
        "max": float(ordered[-1]),
    }


def show(title: str, rows: Sequence[Row], columns: Mapping[str, Callable[[Row], str]]) -> None:
    """Print a table: each column's heading, and how a row shows in it."""
    table = Table(title=title)
    for heading in columns:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    Console(width=max(120, Console().width)).print(table)


def save(name: str, rows: Iterable[Row], **more: Any) -> Path:
    """Write bench/results/<date>-<name>.json with all that makes a number worth believing."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
    )
    now = datetime.now(UTC)
    report = {
        "name": name,
        "date": now.isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or None,
        "uncommitted_changes": bool(changed.stdout.strip()),
        # Relative to the checkout, wherever that lies.
        "command": shlex.join(
            [Path(sys.argv[0]).name, *(arg.removeprefix(f"{ROOT}/") for arg in sys.argv[1:])]
        ),
        "shoal": __version__,
        "cpu": cpu_name(Path("/proc/cpuinfo")),
        "num_cpus": os.cpu_count(),
        "isa": ops.isa(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **more,
        "rows": list(rows),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{now:%Y-%m-%d}-{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")
    return path
