"""`shoal doctor` on machines that the test hands in, and on this one."""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from client import cli, doctor, examine, examine_reads
from client.examine import Finding, State
from shoal.experts.options import Backend
from support.tiny_model import make_tiny_artifact


def test_a_quota_is_read_from_the_control_group(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert examine.cpu_quota(tmp_path) == 1.5


@pytest.mark.parametrize("text", [None, "max 100000\n"])
def test_no_quota_is_no_number(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "cpu.max").write_text(text)
    assert examine.cpu_quota(tmp_path) is None


def test_the_cpu_is_named(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Imaginary 9000\n")
    assert examine.cpu_name(cpuinfo) == "Imaginary 9000"


def test_disabled_huge_pages_come_with_their_fix(tmp_path: Path) -> None:
    mode = tmp_path / "enabled"
    mode.write_text("always madvise [never]\n")
    [finding] = [f for f in examine.memory(tmp_path, mode) if f.name == "huge pages"]
    assert finding.state is State.WARNING
    assert str(mode) in (finding.fix or "")


def test_a_memory_limit_is_told(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{3 * examine.GIB}\n")
    [finding] = examine.memory(tmp_path, tmp_path / "none")
    assert "limit of 3.0 GiB" in finding.value


def test_a_taken_port_is_a_warning() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        [finding] = examine.network(port)
    assert finding.state is State.WARNING
    assert "--listen" in (finding.fix or "")


def test_a_broken_model_is_a_problem_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path))
    broken = tmp_path / "models" / "broken.shoal"
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text("{")
    [finding] = examine.models()
    assert finding.state is State.PROBLEM
    assert str(broken) in (finding.fix or "")


def test_how_experts_are_read_is_told(tmp_path: Path) -> None:
    [finding] = examine_reads.reading(tmp_path)
    assert finding.value.split()[0] in list(Backend)
    assert str(tmp_path) in finding.value


def test_a_folder_that_cannot_be_written_to_is_not_examined() -> None:
    if not Path("/proc").is_dir():
        pytest.skip("no folder that even root cannot write to")
    [finding] = examine_reads.reading(Path("/proc"))
    assert finding.state is State.WARNING


def test_the_reads_of_a_model_are_measured(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "PARTS", {})
    monkeypatch.setattr(examine_reads, "PROBE_S", 0.0)
    model = make_tiny_artifact(tmp_path)
    assert cli.main(["doctor", str(model), "--json"]) == 0
    findings = json.loads(capfd.readouterr().out)["findings"]
    assert [finding["name"] for finding in findings] == ["model reads", "streaming"]
    assert "GB/s by" in findings[0]["value"]
    assert "tokens/s with every expert read" in findings[1]["value"]
    expert = next((model / "experts").iterdir())
    os.truncate(expert, 4096)
    assert cli.main(["doctor", str(model), "--json"]) != 0


def test_every_finding_that_is_not_fine_has_a_fix() -> None:
    with pytest.raises(AssertionError):
        Finding("disk", "full", State.PROBLEM)


def test_json_holds_every_finding(capfd: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["doctor", "--json"])
    report = json.loads(capfd.readouterr().out)
    assert report["ok"] == (status == 0)
    assert {"shoal", "cpu", "kernels", "numerics", "memory", "home", "node port"} <= {
        finding["name"] for finding in report["findings"]
    }


def test_a_problem_fails_the_command_and_shows_the_fix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sick() -> Iterator[Finding]:
        yield Finding("disk", "full", State.PROBLEM, "delete something")

    monkeypatch.setattr(doctor, "PARTS", {"Storage": sick})
    assert cli.main(["doctor"]) == 1
    assert "delete something" in capsys.readouterr().out
