"""Writing an artifact: it is there whole or not at all, whatever happens on the way."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from shoal.artifact import DenseTensor, Manifest, dense_slots
from shoal.artifact.canonical import digest
from shoal.artifact.manifest import slot_bytes
from shoal.artifact.writer import ArtifactWriter, new_artifact
from shoal.errors import CannotWrite, UsageError
from shoal.model_spec import AttentionSpec, LayerSpec, ModelSpec, QkNorm
from shoal.quant import Format


def any_manifest() -> Manifest:
    attention = AttentionSpec(1, 1, 2, QkNorm.NONE, False, None, 1.0)
    layers = (LayerSpec(None, None, ffn_dim=16),)
    spec = ModelSpec("llama", 16, 16, 1e-5, 2, 1.0, 8, True, attention, layers)
    dense: list[DenseTensor] = []
    offset = 4096
    for slot in dense_slots(spec):
        down = Format.F32 if slot.kind == "ffn" else None
        dense.append(DenseTensor(slot, Format.F32, down, offset, digest(b"")))
        offset += slot_bytes(slot, Format.F32, down)
    return Manifest(spec, "source", (), tuple(dense), True, (), ())


def write_something(out: Path, content: bytes = b"x" * 5000, *, force: bool = False) -> None:
    with new_artifact(out, force=force, needed_bytes=len(content)) as writer:
        with writer.file("dense.safetensors") as file:
            file.write(content)
        writer.finish(any_manifest())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nothing_is_at_the_final_place_before_the_last_byte_is_written(tmp_path: Path) -> None:
    out = tmp_path / "m.shoal"
    with new_artifact(out, force=False, needed_bytes=1) as writer:
        with writer.file("dense.safetensors") as file:
            file.write(b"x")
        assert not out.exists()
        assert writer.partial.name.startswith(".")
        writer.finish(any_manifest())
        assert not out.exists()
    assert names(tmp_path) == ["m.shoal"]
    assert names(out) == ["dense.safetensors", "manifest.json"]


def test_the_hash_of_each_tensor_is_of_its_own_bytes(tmp_path: Path) -> None:
    with new_artifact(tmp_path / "m.shoal", force=False, needed_bytes=1) as writer:
        with writer.file("dense.safetensors", header=b"header") as file:
            file.take_hash()
            file.write(b"first")
            file.write(np.frombuffer(b" tensor", np.uint8))
            assert file.take_hash() == digest(b"first tensor")
            file.write(b"second")
            assert file.take_hash() == digest(b"second")
            assert file.offset == len(b"headerfirst tensorsecond")
        writer.finish(any_manifest())


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_failed_write_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    with (
        pytest.raises(failure),
        new_artifact(tmp_path / "m.shoal", force=False, needed_bytes=1) as writer,
        writer.file("dense.safetensors") as file,
    ):
        file.write(b"x")
        raise failure
    assert names(tmp_path) == []


def test_an_existing_artifact_is_kept_unless_force_is_given(tmp_path: Path) -> None:
    out = tmp_path / "m.shoal"
    write_something(out, b"old")
    with pytest.raises(UsageError, match="--force"):
        write_something(out, b"new")
    assert (out / "dense.safetensors").read_bytes() == b"old"
    write_something(out, b"new", force=True)
    assert (out / "dense.safetensors").read_bytes() == b"new"
    assert names(tmp_path) == ["m.shoal"]


def test_force_never_replaces_what_is_not_an_artifact(tmp_path: Path) -> None:
    out = tmp_path / "photos"
    out.mkdir()
    (out / "cat.jpg").write_bytes(b"meow")
    with pytest.raises(UsageError, match="not an artifact"):
        write_something(out, force=True)
    assert names(out) == ["cat.jpg"]


def test_a_failed_replacement_keeps_the_old_artifact(tmp_path: Path) -> None:
    out = tmp_path / "m.shoal"
    write_something(out, b"old")
    with pytest.raises(ValueError), new_artifact(out, force=True, needed_bytes=1):
        raise ValueError
    assert (out / "dense.safetensors").read_bytes() == b"old"


def test_too_small_a_disk_is_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(CannotWrite, match="free; nothing was written") as caught:
        write_huge(tmp_path / "m.shoal")
    assert caught.value.exit_code == 3
    assert names(tmp_path) == []


def write_huge(out: Path) -> None:
    with new_artifact(out, force=False, needed_bytes=1 << 60):
        raise AssertionError("the block must not run")


@pytest.fixture
def file_limit() -> Iterator[int]:
    """The largest file this process may write: beyond it, write() fails with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    yield 1 << 20
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_midway_is_a_clear_error_and_leaves_nothing(
    tmp_path: Path, file_limit: int
) -> None:
    with pytest.raises(CannotWrite, match="nothing was left behind") as caught:
        write_something(tmp_path / "m.shoal", b"x" * (file_limit + 1))
    assert caught.value.exit_code == 3
    assert names(tmp_path) == []


def test_a_full_filesystem_is_named_as_such(tmp_path: Path) -> None:
    with (
        pytest.raises(CannotWrite, match="the disk is full"),
        new_artifact(tmp_path / "m.shoal", force=False, needed_bytes=1) as writer,
        writer.file("dense.safetensors") as file,
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        file._stream = full  # the kernel's own ENOSPC
        file.write(b"x" * 4096)
    assert names(tmp_path) == []


_WRITE_AND_WAIT = """
import sys
from pathlib import Path
from shoal.artifact.writer import new_artifact
with new_artifact(Path(sys.argv[1]), force=False, needed_bytes=1) as writer:
    with writer.file("dense.safetensors") as file:
        file.write(b"half of it")
        print("writing", flush=True)
        sys.stdin.read()
"""


@pytest.mark.processes
def test_a_killed_writer_leaves_nothing_that_looks_finished_and_the_next_one_cleans_up(
    tmp_path: Path,
) -> None:
    """
    1. A process is killed in the middle of a file.
    2. There is no m.shoal, only a hidden folder.
    3. While that process lived, a second writer was refused; now one removes the folder.
    """
    out = tmp_path / "m.shoal"
    command = [sys.executable, "-c", _WRITE_AND_WAIT, str(out)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        with pytest.raises(UsageError, match="another process"):
            write_something(out)
        os.kill(process.pid, signal.SIGKILL)
    left = names(tmp_path)
    assert len(left) == 1 and left[0].startswith(".m.shoal.partial-")
    removed = remember_removed(out)
    assert [path.name for path in removed] == left
    assert names(tmp_path) == ["m.shoal"]


def remember_removed(out: Path) -> tuple[Path, ...]:
    with new_artifact(out, force=False, needed_bytes=1) as writer:
        assert isinstance(writer, ArtifactWriter)
        writer.finish(any_manifest())
    return writer.removed
