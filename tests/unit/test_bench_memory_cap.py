"""The benchmarks' memory group, on folders that look like both versions of Linux's."""

from pathlib import Path

import pytest

from bench.memory_cap import MemoryCap, NoMemoryCap, Usage

V2_FILES = {
    "memory.stat": "anon 700\nfile 200\nkernel 9\n",
    "memory.events": "low 0\nhigh 0\nmax 41\noom 1\noom_kill 1\n",
    "memory.peak": "1000\n",
}
V1_FILES = {
    "memory.stat": "rss 1\ntotal_rss 700\ntotal_cache 200\n",
    "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
    "memory.max_usage_in_bytes": "1000\n",
    "memory.failcnt": "41\n",
}


def fill(group: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (group / name).write_text(text)


def empty(group: Path) -> None:
    for file in group.iterdir():  # the kernel's own vanish with the folder
        file.unlink()


def test_a_group_of_version_two_is_limited_and_told_from_its_files(
    tmp_path: Path,
) -> None:
    v2 = tmp_path / "v2"
    v2.mkdir()
    with MemoryCap("group", 5000, v1=tmp_path / "v1", v2=v2) as cap:
        assert (v2 / "cgroup.subtree_control").read_text() == "+memory"
        assert (cap.path / "memory.max").read_text() == "5000"
        assert cap.command(["true"])[-2:] == [str(v2 / "group" / "cgroup.procs"), "true"]
        fill(cap.path, V2_FILES)
        assert cap.usage() == Usage(700, 200, 1000, 41, 1)
        (cap.path / "memory.peak").unlink()  # Linux before 5.19
        assert cap.usage().peak_bytes == 0
        empty(cap.path)
    assert not cap.path.exists()


def test_a_group_of_version_one_is_told_from_its_files(tmp_path: Path) -> None:
    v1 = tmp_path / "v1"
    v1.mkdir()
    (v1 / "memory.limit_in_bytes").write_text("9223372036854771712")
    cap = MemoryCap("group", 5000, v1=v1, v2=tmp_path / "v2")
    assert (cap.path / "memory.limit_in_bytes").read_text() == "5000"
    fill(cap.path, V1_FILES)
    assert cap.usage() == Usage(700, 200, 1000, 41, 1)


def test_where_no_group_can_be_made_it_says_which(tmp_path: Path) -> None:
    with pytest.raises(NoMemoryCap, match="group"):
        MemoryCap("group", 5000, v1=tmp_path / "v1", v2=tmp_path / "v2")
