"""Disks that fail under a streaming store: an error that names the expert, never a wrong sum.

Faults come from a file system of ours (support.fuse_files), so that every backend meets them.
"""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from shoal.artifact import Artifact
from shoal.artifact.reader import ExpertLocation
from shoal.errors import ArtifactError, CorruptArtifact, ExpertUnavailable, UsageError
from shoal.experts.executor import ExpertExecutor
from shoal.experts.open_store import open_store
from shoal.experts.options import Backend, Verify
from shoal.experts.ownership import Ownership
from shoal.experts.store import ExpertStore, StoreOptions
from support.fuse_files import FuseFiles, fuse_files
from support.streaming import call_of, streaming_store

pytestmark = pytest.mark.processes
LAYER = 1
EXPERTS = [2, 5, 11]
BROKEN = 5
GIVE_UP_S = 60.0  # a thread that never ends is a failure, not a hang of the suite


@pytest.fixture(scope="module")
def expected(path: Path) -> Iterator[Callable[[list[int]], bytes]]:
    """What a call to those experts gives when everything is in memory."""
    artifact = Artifact.open(path)
    with streaming_store(path, None) as store:
        executor = ExpertExecutor(artifact, store)
        yield lambda experts: compute(executor, artifact, experts)


@pytest.fixture
def files(path: Path, tmp_path: Path) -> Iterator[FuseFiles]:
    with fuse_files(path, tmp_path / "mount") as files:
        yield files


@pytest.fixture
def copy(path: Path, tmp_path: Path) -> Path:
    """The artifact on an ordinary file system, to be damaged."""
    return Path(shutil.copytree(path, tmp_path / "copy.shoal"))


def compute(executor: ExpertExecutor, artifact: Artifact, experts: list[int]) -> bytes:
    return executor.compute(call_of(artifact, LAYER, experts)).tobytes()


def place(path: Path, expert: int) -> tuple[str, ExpertLocation]:
    """The expert's file, relative to the artifact, and where it is in it."""
    where = Artifact.open(path).expert_location(LAYER, expert)
    return str(where.path.relative_to(path)), where


def fail(files: FuseFiles, path: Path, expert: int, times: int | None) -> None:
    name, where = place(path, expert)
    files.fail(name, offset=where.offset, num_bytes=where.num_bytes, times=times)


@pytest.mark.parametrize("backend", list(Backend))
def test_an_error_that_passes_is_retried_and_nobody_notices(
    backend: Backend, files: FuseFiles, path: Path, expected: Callable[[list[int]], bytes]
) -> None:
    with streaming_store(files.path, 4, backend=backend) as store:
        executor = ExpertExecutor(artifact := Artifact.open(files.path), store)
        fail(files, path, BROKEN, times=2)
        assert compute(executor, artifact, EXPERTS) == expected(EXPERTS)
        reader = store.figures().reader
        assert reader is not None and reader.num_retries >= 2 and reader.num_errors == 0


@pytest.mark.parametrize("backend", list(Backend))
def test_an_expert_that_cannot_be_read_is_unavailable_and_tried_again(
    backend: Backend, files: FuseFiles, path: Path, expected: Callable[[list[int]], bytes]
) -> None:
    """1. One expert's bytes give EIO for ever. 2. Calls for it fail by name, again and again;
    others are served. 3. The disk recovers. 4. So does the expert, without a restart.
    """
    with streaming_store(files.path, 4, backend=backend) as store:
        executor = ExpertExecutor(artifact := Artifact.open(files.path), store)
        fail(files, path, BROKEN, times=None)
        for _ in range(2):
            with pytest.raises(ExpertUnavailable) as failed:
                compute(executor, artifact, EXPERTS)
            for word in (f"expert {BROKEN}", f"layer {LAYER}", place(path, BROKEN)[0]):
                assert word in str(failed.value)
            others = [2, 11, 7]
            assert compute(executor, artifact, others) == expected(others)
        assert [key for key, _ in store.figures().unavailable] == [(LAYER, BROKEN)]
        files.clear()
        assert compute(executor, artifact, EXPERTS) == expected(EXPERTS)
        assert store.figures().unavailable == ()


@pytest.mark.parametrize("backend", list(Backend))
def test_reads_that_come_short_are_completed(
    backend: Backend, files: FuseFiles, path: Path, expected: Callable[[list[int]], bytes]
) -> None:
    name, where = place(path, BROKEN)
    with streaming_store(files.path, 4, backend=backend) as store:
        executor = ExpertExecutor(artifact := Artifact.open(files.path), store)
        files.shorten(name, 4096, offset=where.offset, num_bytes=where.num_bytes, times=2)
        assert compute(executor, artifact, EXPERTS) == expected(EXPERTS)
        files.shorten(name, 512, offset=place(path, 9)[1].offset, num_bytes=4096, times=1)
        assert compute(executor, artifact, [9, 10]) == expected([9, 10])


@pytest.mark.parametrize("backend", list(Backend))
def test_a_file_truncated_while_serving_fails_calls_and_kills_nobody(
    backend: Backend, copy: Path, path: Path, expected: Callable[[list[int]], bytes]
) -> None:
    """1. Two experts are in memory. 2. Their file is cut before another. 3. What is in memory is
    served, what is not fails by name: no SIGBUS. 4. The bytes are put back, and all is served.
    """
    name, where = place(path, BROKEN)
    with streaming_store(copy, 4, backend=backend) as store:
        executor = ExpertExecutor(artifact := Artifact.open(copy), store)
        assert compute(executor, artifact, [1, 2]) == expected([1, 2])
        os.truncate(copy / name, where.offset + where.num_bytes // 2)
        assert compute(executor, artifact, [1, 2]) == expected([1, 2])
        with pytest.raises((ExpertUnavailable, ArtifactError), match=f"expert {BROKEN} "):
            compute(executor, artifact, [1, BROKEN])
        (copy / name).write_bytes((path / name).read_bytes())
        assert compute(executor, artifact, EXPERTS) == expected(EXPERTS)


@pytest.mark.parametrize("backend", list(Backend))
def test_a_file_replaced_while_serving_never_gives_a_wrong_sum(
    backend: Backend, copy: Path, path: Path, expected: Callable[[list[int]], bytes]
) -> None:
    """1. Part of a file was read. 2. Another file takes its name. 3. Whatever is read later has
    the right bytes, or is refused by its hash.
    """
    name, _ = place(path, BROKEN)
    with streaming_store(copy, 4, backend=backend) as store:
        executor = ExpertExecutor(artifact := Artifact.open(copy), store)
        assert compute(executor, artifact, [1, 2]) == expected([1, 2])
        (copy / "other").write_bytes(bytes(byte ^ 1 for byte in (path / name).read_bytes()))
        (copy / "other").replace(copy / name)
        for experts in (EXPERTS, [1, 2], [12, 13]):
            try:
                assert compute(executor, artifact, experts) == expected(experts)
            except (CorruptArtifact, ExpertUnavailable) as error:
                assert f"layer {LAYER}" in str(error)


@pytest.mark.parametrize("verify", [Verify.FIRST, Verify.ALWAYS])
def test_a_flipped_bit_is_refused_by_name_and_its_repair_is_seen(
    verify: Verify, copy: Path, path: Path, expected: Callable[[list[int]], bytes]
) -> None:
    name, where = place(path, BROKEN)
    with (copy / name).open("r+b") as file:
        file.seek(where.offset + 100)
        byte = file.read(1)[0]
        file.seek(where.offset + 100)
        file.write(bytes([byte ^ 4]))
    with streaming_store(copy, 4, verify=verify) as store:
        executor = ExpertExecutor(artifact := Artifact.open(copy), store)
        with pytest.raises((CorruptArtifact, ExpertUnavailable)) as refused:
            compute(executor, artifact, EXPERTS)
        for word in (f"expert {BROKEN}", f"layer {LAYER}", Path(name).name):
            assert word in str(refused.value)
        assert compute(executor, artifact, [2, 11]) == expected([2, 11])
        assert store.figures().num_corrupt >= 1
        (copy / name).write_bytes((path / name).read_bytes())
        assert compute(executor, artifact, EXPERTS) == expected(EXPERTS)


@pytest.mark.parametrize("backend", [None, Backend.IO_URING])
def test_a_file_system_without_o_direct_is_read_through_the_page_cache(
    backend: Backend | None, files: FuseFiles, expected: Callable[[list[int]], bytes]
) -> None:
    files.refuse_direct()
    with streaming_store(files.path, 4, backend=backend) as store:
        executor = ExpertExecutor(artifact := Artifact.open(files.path), store)
        assert compute(executor, artifact, EXPERTS) == expected(EXPERTS)
        reader = store.figures().reader
        assert reader is not None
        assert reader.backend is Backend.BUFFERED or reader.fallbacks, "it does not say so"


def test_preadv_with_o_direct_is_refused_where_no_file_can_do_it(files: FuseFiles) -> None:
    files.refuse_direct()
    artifact = Artifact.open(files.path)
    options = StoreOptions(4 * artifact.expert_location(0, 0).num_bytes, backend=Backend.PREAD)
    with pytest.raises(UsageError, match=r"--io pread: .*O_DIRECT"):
        open_store(artifact, Ownership(dict(artifact.owned_experts)), options)


def test_an_artifact_on_tmpfs_is_served(path: Path, expected: Callable[[list[int]], bytes]) -> None:
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK):
        pytest.skip("needs a writable /dev/shm")
    folder = shm / f"shoal-test-{os.getpid()}.shoal"
    try:
        shutil.copytree(path, folder)
        with streaming_store(folder, 4) as store:
            executor = ExpertExecutor(artifact := Artifact.open(folder), store)
            assert compute(executor, artifact, EXPERTS) == expected(EXPERTS)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("backend", list(Backend))
def test_eight_calls_that_want_one_cold_expert_are_one_read(
    backend: Backend, files: FuseFiles, path: Path, expected: Callable[[list[int]], bytes]
) -> None:
    """1. Reads of one expert are held. 2. Eight calls want it. 3. The reads go on; all eight have
    their sums; the expert's bytes were read once.
    """
    name, where = place(path, BROKEN)
    with streaming_store(files.path, 4, backend=backend) as store:
        executor = ExpertExecutor(artifact := Artifact.open(files.path), store)
        files.hold(name, offset=where.offset, num_bytes=where.num_bytes)
        files.take_reads()
        with ThreadPoolExecutor(8) as threads:
            calls = [threads.submit(compute, executor, artifact, [BROKEN]) for _ in range(8)]
            wait_for_waiting(store, 8)
            files.release()
            answers = {call.result(GIVE_UP_S) for call in calls}
        assert answers == {expected([BROKEN])}
        read = sum(size for file, _, size in files.take_reads() if file == name)
        assert read == where.num_bytes
        figures = store.figures()
        assert (figures.misses, figures.joined) == (8, 7)


def test_calls_for_what_is_in_memory_do_not_wait_behind_a_miss(
    files: FuseFiles, path: Path, expected: Callable[[list[int]], bytes]
) -> None:
    """1. Two experts are in memory. 2. A call's read is held. 3. Calls for the two are answered,
    one after the other. 4. The held call gets its sums once the read goes on.
    """
    name, where = place(path, BROKEN)
    with streaming_store(files.path, 4) as store:
        executor = ExpertExecutor(artifact := Artifact.open(files.path), store)
        assert compute(executor, artifact, [1, 2]) == expected([1, 2])
        files.hold(name, offset=where.offset, num_bytes=where.num_bytes)
        with ThreadPoolExecutor(1) as threads:
            held = threads.submit(compute, executor, artifact, [BROKEN])
            files.wait_held(1)
            for experts in ([1, 2], [2], [1]):
                assert compute(executor, artifact, experts) == expected(experts)
            assert not held.done()
            files.release()
            assert held.result(GIVE_UP_S) == expected([BROKEN])


def test_calls_that_need_more_than_fits_get_on_with_each_other(
    files: FuseFiles, expected: Callable[[list[int]], bytes]
) -> None:
    """Two experts fit; six calls want different fives at once: none waits for another for ever."""
    wants = [[(first + step) % 16 for step in range(0, 15, 3)] for first in range(6)]
    with streaming_store(files.path, 2) as store:
        executor = ExpertExecutor(artifact := Artifact.open(files.path), store)
        with ThreadPoolExecutor(6) as threads:
            calls = [threads.submit(compute, executor, artifact, sorted(w)) for w in wants]
            for want, call in zip(wants, calls, strict=True):
                assert call.result(GIVE_UP_S) == expected(sorted(want))


@pytest.mark.parametrize("seed", range(3))
def test_seeded_faults_give_right_sums_or_an_error_that_names_its_expert(
    seed: int, files: FuseFiles, path: Path, expected: Callable[[list[int]], bytes]
) -> None:
    """1. Half of the experts get faults: a few errors, errors for ever, short reads. 2. Four
    callers ask for random experts. 3. Each call is right, or names an expert that stays lost.
    4. The faults go; every expert is served.
    """
    rng = np.random.default_rng(seed)
    lost: set[int] = set()
    for expert in rng.permutation(16)[:8].tolist():
        match rng.integers(3):
            case 0:
                fail(files, path, expert, times=int(rng.integers(1, 3)))
            case 1:
                fail(files, path, expert, times=None)
                lost.add(expert)
            case _:
                name, where = place(path, expert)
                size = int(rng.integers(1, where.num_bytes))
                files.shorten(name, size, offset=where.offset, num_bytes=where.num_bytes, times=1)
    wants = [sorted(rng.permutation(16)[:3].tolist()) for _ in range(24)]
    with streaming_store(files.path, 4) as store:
        executor = ExpertExecutor(artifact := Artifact.open(files.path), store)
        with ThreadPoolExecutor(4) as threads:
            calls = [threads.submit(compute, executor, artifact, want) for want in wants]
            for want, call in zip(wants, calls, strict=True):
                if lost.isdisjoint(want):
                    assert call.result(GIVE_UP_S) == expected(want)
                else:
                    with pytest.raises(ExpertUnavailable) as failed:
                        call.result(GIVE_UP_S)
                    assert any(f"expert {e} of" in str(failed.value) for e in lost & set(want))
        files.clear()
        assert compute(executor, artifact, list(range(16))) == expected(list(range(16)))


def wait_for_waiting(store: ExpertStore, count: int) -> None:
    """Return once so many calls wait for reads."""
    pause, deadline = threading.Event(), GIVE_UP_S
    while store.figures().num_waiting < count:
        deadline -= 0.01
        assert deadline > 0, f"{store.figures().num_waiting} of {count} calls wait"
        pause.wait(0.01)
