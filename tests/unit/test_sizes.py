"""Sizes on the command line, and the memory that a process may use."""

from pathlib import Path

import pytest

from shoal.errors import UsageError
from shoal.memory_limit import NO_LIMIT_V1, memory_limit
from shoal.sizes import format_size, parse_size

GIB = 1024**3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GiB", 8 * GIB),
        ("8gib", 8 * GIB),
        ("8Gi", 8 * GIB),
        ("1.5GB", 1_500_000_000),
        (" 100 MB ", 100_000_000),
        ("4096", 4096),
        ("4096B", 4096),
        ("0", 0),
        ("0.5KiB", 512),
        ("2TiB", 2 * 1024**4),
    ],
)
def test_a_size_is_read(text: str, expected: int) -> None:
    assert parse_size(text, name="--cache") == expected


def test_a_rate_may_say_per_second() -> None:
    assert parse_size("1.5GB/s", name="--max-read-bandwidth", suffix="/s") == 1_500_000_000
    with pytest.raises(UsageError):
        parse_size("1.5GB/s", name="--cache")


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "8 GiB x", "8GiBs", "1,5GB", "٣GB"])
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match="--cache"):
        parse_size(text, name="--cache")


def test_an_ambiguous_unit_is_asked_about() -> None:
    with pytest.raises(UsageError, match=r"8GB \(1000\) or 8GiB \(1024\)"):
        parse_size("8G", name="--cache")


def test_more_than_any_machine_has_is_refused() -> None:
    with pytest.raises(UsageError, match="no machine"):
        parse_size("99999999999TiB", name="--cache")


def test_a_size_is_printed_in_its_largest_unit() -> None:
    assert [format_size(n) for n in (512, 2048, 3 << 20, 3 * GIB // 2)] == [
        "512 bytes",
        "2.00 KiB",
        "3.00 MiB",
        "1.50 GiB",
    ]


def control_group(tmp_path: Path, group: str, files: dict[str, str]) -> tuple[Path, Path]:
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self/cgroup").write_text(group)
    for name, text in files.items():
        (cgroup / name).parent.mkdir(parents=True, exist_ok=True)
        (cgroup / name).write_text(text)
    return proc, cgroup


@pytest.mark.parametrize(
    ("group", "files"),
    [
        ("0::/pods/mine\n", {"pods/mine/memory.max": "3000\n", "pods/memory.max": "max\n"}),
        ("0::/pods/mine\n", {"pods/mine/memory.max": "max\n", "pods/memory.max": "3000\n"}),
        ("0::/\n", {"memory.max": "3000\n"}),
        ("0::/seen/from/outside\n", {"memory.max": "3000\n"}),
        ("5:cpu:/x\n4:memory:/mine\n", {"memory/mine/memory.limit_in_bytes": "3000\n"}),
        (
            "4:memory:/a/b\n0::/\n",
            {
                "memory/a/b/memory.limit_in_bytes": f"{NO_LIMIT_V1 * 2 - 4096}\n",
                "memory/a/memory.limit_in_bytes": "3000\n",
                "memory/memory.limit_in_bytes": "4000\n",
            },
        ),
    ],
)
def test_the_tightest_control_group_limits_memory(
    tmp_path: Path, group: str, files: dict[str, str]
) -> None:
    limit = memory_limit(*control_group(tmp_path, group, files), installed=5000)
    assert limit.num_bytes == 3000
    assert "control group" in limit.source and str(tmp_path) in limit.source


@pytest.mark.parametrize(
    ("group", "files"),
    [
        ("", {}),
        ("0::/x\n", {"x/memory.max": "max\n"}),
        ("0::/x\n", {"x/memory.max": "9000\n"}),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": f"{2**63 - 4096}\n"}),
    ],
)
def test_without_a_tighter_limit_the_machine_limits_memory(
    tmp_path: Path, group: str, files: dict[str, str]
) -> None:
    limit = memory_limit(*control_group(tmp_path, group, files), installed=5000)
    assert (limit.num_bytes, limit.source) == (5000, "this machine's memory")
