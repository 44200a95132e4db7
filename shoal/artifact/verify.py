"""Verify: read every byte of an artifact and name whatever is not as it was written."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from shoal.artifact.canonical import digest
from shoal.artifact.layout import manifest_dense_header, manifest_expert_header, pregate_header
from shoal.artifact.manifest import DENSE_FILE
from shoal.artifact.pregate import PREGATE_FILE
from shoal.artifact.reader import Artifact, check_hash, check_size
from shoal.errors import CorruptArtifact

Progress = Callable[[int], None]


def total_bytes(artifact: Artifact) -> int:
    """Return how many bytes `find_problems` will read."""
    return sum(artifact.file_sizes().values())


def find_problems(artifact: Artifact, progress: Progress) -> Iterator[str]:
    """Yield a sentence for each file, header, tensor or expert that is damaged.

    The artifact may come from `Artifact.open_unchecked`: sizes are examined here.
    """
    for name, size in artifact.file_sizes().items():
        path = artifact.path / name
        if problem := _problem(partial(check_size, path, size)):
            yield problem
            progress(size)
            continue
        for check, num_bytes in _checks(artifact, name):
            if problem := _problem(check):
                yield problem
            progress(num_bytes)


def _problem(check: Callable[[], None]) -> str | None:
    try:
        check()
    except CorruptArtifact as error:
        return str(error)
    return None


def _checks(artifact: Artifact, name: str) -> Iterator[tuple[Callable[[], None], int]]:
    manifest, path = artifact.manifest, artifact.path / name
    if name == DENSE_FILE:
        yield _header_check(path, manifest_dense_header(manifest))
        for tensor in manifest.dense:
            what = f"tensor {tensor.name}"
            yield _bytes_check(path, tensor.offset, tensor.num_bytes, tensor.blake3, what)
    for layer in manifest.experts:
        if layer.file != name:
            continue
        yield _header_check(path, manifest_expert_header(layer))
        for index in artifact.owned_experts[layer.layer]:
            where = artifact.expert_location(layer.layer, index)
            what = f"expert {index} of layer {layer.layer}"
            yield _bytes_check(path, where.offset, where.num_bytes, where.blake3, what)
    if name == PREGATE_FILE:
        yield _header_check(path, pregate_header(entry.plan for entry in manifest.pregates))
        for entry in manifest.pregates:
            size, what = entry.plan.num_bytes, f"tensor {entry.plan.name}"
            yield _bytes_check(path, entry.offset, size, entry.blake3, what)
    for file in manifest.files:
        if file.name == name:
            yield _bytes_check(path, 0, file.num_bytes, file.blake3, "text")


def _header_check(path: Path, expected: bytes) -> tuple[Callable[[], None], int]:
    return _bytes_check(path, 0, len(expected), digest(expected), "header")


def _bytes_check(
    path: Path, offset: int, num_bytes: int, blake3: str, what: str
) -> tuple[Callable[[], None], int]:
    def check() -> None:
        check_hash(path, offset, num_bytes, blake3, what)

    return check, num_bytes
