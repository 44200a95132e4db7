"""What `shoal doctor` finds out about reading experts: by which backend, and how fast a model's."""

import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from client.examine import Finding, State
from shoal import paths
from shoal.errors import ShoalError
from shoal.limits import MIB, READ_ALIGNMENT

if TYPE_CHECKING:  # readers need the kernels, whose absence the doctor must survive
    from shoal.experts.readers import Reader

PROBE_S = 1.0
READS_AT_ONCE = 16
MAX_READ_BYTES = 4 * MIB  # of an expert: more tells nothing new
HIT_RATE = 0.75  # of a cache of a quarter of the experts, as others saw it on real text
FIX = {
    "forbidden": "containers: allow io_uring in the seccomp profile (preadv is used meanwhile)",
    "switched off": "as root: sysctl kernel.io_uring_disabled=0 (preadv is used meanwhile)",
    "no direct reads": "a folder on ext4 or xfs reads past the page cache",
}


def reading(folder: Path | None = None) -> Iterator[Finding]:
    """How experts would be read from the folder of models, and why not in a better way."""
    if folder is None:
        home = paths.models_dir()
        folder = next(path for path in (home, *home.parents) if path.exists())
    try:
        from shoal.experts.readers import open_reader
    except (ImportError, ShoalError):
        return  # no kernels, or not those of SHOAL_ISA: `kernels` has said so
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(bytes(MIB))
            file.flush()
            reader = open_reader(None, None, [Path(file.name)])
            figures = reader.figures()
            reader.close()
    except OSError as error:
        fix = f"make {folder} writable to have it examined"
        yield Finding("expert reads", f"{folder}: {error.strerror}", State.WARNING, fix)
        return
    reason = figures.reasons
    value = f"{figures.backend} in {folder}"
    if not reason:
        yield Finding("expert reads", value)
        return
    fix = next(
        (text for sign, text in FIX.items() if sign in reason), "a newer kernel reads faster"
    )
    yield Finding("expert reads", f"{value}: {reason}", State.WARNING, fix)


def model_reads(model: str) -> Iterator[Finding]:
    """Measure random reads of a model's experts, and what they mean for a cache that misses.

    Raises:
        UsageError, ArtifactError: there is no such model, or it cannot be used.
    """
    from shoal.artifact import Artifact
    from shoal.experts.readers import Backend, open_reader

    artifact = Artifact.open(paths.resolve_model(model))
    places = [
        artifact.expert_location(layer, index)
        for layer, experts in artifact.owned_experts.items()
        for index in experts
    ]
    if not places:
        yield Finding("model reads", f"{artifact.path} holds no experts")
        return
    reader = open_reader(None, None, sorted({place.path for place in places}))
    try:
        bytes_per_s = _measure(reader, [(p.path, p.offset, p.num_bytes) for p in places])
    except OSError as error:
        fix = "check the disk, or fetch the model again"
        yield Finding("model reads", str(error), State.PROBLEM, fix)
        return
    finally:
        reader.close()
    through = " through the page cache" if reader.backend is Backend.BUFFERED else ""
    biggest = max(place.num_bytes for place in places)
    milliseconds = biggest / bytes_per_s * 1e3
    yield Finding(
        "model reads",
        f"{bytes_per_s / 1e9:.2f} GB/s by {reader.backend}{through}, random experts of "
        f"{artifact.path}; an expert of {biggest / 1e6:.1f} MB in {milliseconds:.1f} ms",
    )
    per_token = sum(
        layer.router.experts_per_token * artifact.expert_location(index, experts[0]).num_bytes
        for index, layer in enumerate(artifact.spec.layers)
        if layer.router is not None and (experts := artifact.owned_experts.get(index, ()))
    )
    cold = bytes_per_s / per_token
    yield Finding(
        "streaming",
        f"{per_token / 1e6:.0f} MB of experts a token: at most {cold:.3g} tokens/s with every "
        f"expert read, {cold / (1 - HIT_RATE):.3g} with {HIT_RATE:.0%} of them in the cache",
    )


def _measure(reader: "Reader", places: list[tuple[Path, int, int]]) -> float:
    # Bytes a second of random experts, READS_AT_ONCE under way.
    from shoal import ops
    from shoal.experts.readers import Read, Source

    rng = random.Random(0)
    size = min(MAX_READ_BYTES, min(num_bytes for _, _, num_bytes in places))
    arena = ops.aligned_empty(READS_AT_ONCE * size, huge=True)
    arena[:] = 0  # first touches are the system's time, not the drive's

    def read(slot: int) -> Read:
        path, offset, num_bytes = rng.choice(places)
        skip = rng.randrange(0, num_bytes - size + 1, READ_ALIGNMENT)
        return Read(slot, (Source(path, offset + skip),), arena[slot * size : (slot + 1) * size])

    began_s = time.perf_counter()
    reader.submit([read(slot) for slot in range(READS_AT_ONCE)])
    under_way, total = READS_AT_ONCE, 0
    while under_way:
        for done in reader.wait(60.0):
            if done.error is not None:
                raise done.error
            total += done.num_bytes
            if time.perf_counter() - began_s < PROBE_S:
                reader.submit([read(done.tag)])
            else:
                under_way -= 1
    return total / (time.perf_counter() - began_s)
