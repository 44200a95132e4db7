"""docs/streaming.md is written from result files: the newest of each setting, with its spread."""

import json
from pathlib import Path
from typing import Any

from bench.streaming_page import figures, newest, sources

PEER = "llama.cpp, read-ahead 128 KiB"


def rows(subject: str, rates: list[float], percent: float = 25.0) -> list[dict[str, Any]]:
    """The two phases of an engine, as bench_streaming.py sums them up."""
    ordered = sorted(rates)
    spread = {"median": ordered[len(ordered) // 2], "min": ordered[0], "max": ordered[-1]}
    share = {name: rate / 20 for name, rate in spread.items()}
    one = {"median": 181e6, "min": 181e6, "max": 181e6}
    common = {"subject": subject, "routing": "trace", "residency_percent": percent}
    common |= {"tokens_per_s": spread, "bound_tokens_per_s": {"median": 20.0}, "of_bound": share}
    common |= {"missed_bytes_per_token": one}
    return [{**common, "phase": phase} for phase in ("cold", "warm")]


def write(folder: Path, name: str, date: str, *subjects: list[dict[str, Any]], runs: int) -> Path:
    path = folder / f"{name}.json"
    found = [row for subject in subjects for row in subject]
    report = {"date": date, "commit": "ab" * 20, "uncommitted_changes": False, "command": name}
    report |= {"cpu": "X", "num_cpus": 2, "peer": "llama-cpp-python", "rows": found}
    report["samples"] = found * runs
    path.write_text(json.dumps(report))
    return path


def test_the_newest_of_each_setting_counts_and_repeats_show_their_range(tmp_path: Path) -> None:
    old = write(
        tmp_path, "b-old", "2026-01-01", rows("shoal", [1.0]), rows(PEER, [0.5], 50), runs=1
    )
    new = write(
        tmp_path, "a-new", "2026-01-02", rows(PEER, [2.0]), rows("shoal", [9, 8, 12]), runs=3
    )
    found = newest([old, new])
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in figures(found).split("\n")
    ]
    assert [line[0] for line in lines[2:]] == ["25 %", "25 %", "50 %"]
    shoal, peer, alone = lines[2:]
    assert shoal[2:5] == ["shoal", "9.00 (8.00-12.00)", "20.0"]
    assert shoal[5:] == ["45 (40-60) %", "", "181", "4.5", "9.00 (8.00-12.00)", "3"]
    assert peer[2:4] == [PEER, "2.00"] and peer[8] == "1.0"
    assert alone[10] == "1", "of the older file: nobody measured it again"
    named = sources(found)
    assert "a-new.json" in named and "b-old.json" in named
