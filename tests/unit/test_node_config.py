"""What `shoal node` is told: flags over variables over a TOML file over defaults, all checked."""

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from expert_node import app as node_app
from expert_node.commands import node
from expert_node.config import NodeConfig, node_config
from expert_node.settings import Settings
from shoal.errors import UsageError
from shoal.experts.options import Backend, Mode, Verify
from shoal.log_options import LogLevel
from shoal.tls_files import ServerFiles


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.shoal"
    path.mkdir()
    return path


class Parsed:
    """What the verb made of its arguments, and what it makes of them when asked again."""

    config: NodeConfig
    reread: Any


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Parsed:
    def keep(config: NodeConfig, _announce: Any, reread: Any) -> None:
        Parsed.config, Parsed.reread = config, staticmethod(reread)

    monkeypatch.setattr(node_app, "run", keep)
    return Parsed()


def parse(*arguments: object, env: dict[str, str] | None = None) -> None:
    verb = typer.Typer()
    verb.command()(node)
    result = CliRunner().invoke(verb, [str(a) for a in arguments], env=env)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "node.toml"
    path.write_text(text)
    return path


def test_every_setting_reaches_the_configuration(
    model: Path, tmp_path: Path, parsed: Parsed
) -> None:
    parse(
        *(model, "--cache", "8GiB", "--data-dir", tmp_path, "--data-dir", model),
        *("--verify", "always", "--io", "pread", "--prefetch", "markov", "--warmup-from", "h.json"),
        *("--record-heat", "r.json", "--pin-experts", "7", "--nvme-thermal-limit", "65"),
        *("--max-read-bandwidth", "1.5GB/s", "--metrics-listen", "127.0.0.1:9100"),
        *("--max-queued-calls", "9", "--log-level", "debug"),
    )
    found = parsed.config
    assert (found.cache_bytes, found.data_dirs) == (8 << 30, (tmp_path, model))
    assert (found.verify, found.io, found.prefetch) == (
        Verify.ALWAYS,
        Backend.PREAD,
        Mode.MARKOV,
    )
    assert (found.warmup_from, found.record_heat) == (Path("h.json"), Path("r.json"))
    assert (found.pin_experts, found.thermal_limit_c) == (7, 65.0)
    assert found.max_read_bandwidth == 1_500_000_000
    assert found.metrics_listen is not None and found.metrics_listen.port == 9100
    assert (found.max_queued_calls, found.log_level) == (9, LogLevel.DEBUG)


def test_the_defaults_keep_everything_in_memory(model: Path, parsed: Parsed) -> None:
    parse(model)
    found = parsed.config
    assert (found.cache_bytes, found.io, found.max_read_bandwidth) == (None, None, None)
    assert (found.verify, found.thermal_limit_c) == (Verify.FIRST, 70.0)


def test_tls_comes_from_flags_variables_and_the_file(
    model: Path, tmp_path: Path, parsed: Parsed
) -> None:
    path = written(tmp_path, 'tls-cert = "a.pem"\ntls-key = "a.key"\n')
    parse(model, "--config", path, "--tls-key", "b.key", env={"SHOAL_TLS_CLIENT_CA": "ca.pem"})
    assert parsed.config.tls == ServerFiles(Path("a.pem"), Path("b.key"), Path("ca.pem"))
    parse(model)
    assert parsed.config.tls is None


def test_flags_win_over_variables_and_these_over_the_file(
    model: Path, tmp_path: Path, parsed: Parsed
) -> None:
    path = written(tmp_path, 'cache = "1GiB"\nexperts = "0-3"\nlayers = "0"\nverify = "never"\n')
    env = {"SHOAL_CACHE": "2GiB", "EXPERTS": "1"}
    parse(model, "--config", path, "--cache", "3GiB", env=env)
    found = parsed.config
    assert (found.cache_bytes, found.experts, found.layers) == (3 << 30, "1", "0")
    assert found.verify is Verify.NEVER


def test_a_flag_that_says_the_default_wins_as_well(
    model: Path, tmp_path: Path, parsed: Parsed
) -> None:
    parse(model, "--config", written(tmp_path, "warmup = true\n"), "--no-warmup")
    assert parsed.config.warmup is False


def test_the_file_may_name_everything_even_the_model(
    model: Path, tmp_path: Path, parsed: Parsed
) -> None:
    text = (
        f'model = "{model}"\nlisten = "127.0.0.1:7"\nport = 8\nwarmup = true\n'
        f'data-dir = ["{tmp_path}"]\nnvme_thermal_limit = 60\nlog-level = "error"\n'
    )
    parse(env={"SHOAL_CONFIG": str(written(tmp_path, text))})
    found = parsed.config
    assert (found.model, found.listen.port, found.warmup) == (model, 8, True)
    assert (found.data_dirs, found.thermal_limit_c) == ((tmp_path,), 60.0)
    assert found.log_level is LogLevel.ERROR


def test_the_file_is_read_anew_each_time_and_flags_still_win(
    model: Path, tmp_path: Path, parsed: Parsed
) -> None:
    path = written(tmp_path, 'cache = "1GiB"\nexperts = "0"\n')
    parse(model, "--config", path, "--experts", "5")
    written(tmp_path, 'cache = "2GiB"\nexperts = "1"\nverify = "always"\n')
    again = parsed.reread()
    assert (again.cache_bytes, again.experts, again.verify) == (2 << 30, "5", Verify.ALWAYS)
    written(tmp_path, "")
    assert parsed.reread().cache_bytes is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('cash = "1GiB"', "cash is no setting: did you mean cache?"),
        ("zzz = 1", "zzz is no setting: known are cache, data-dir"),
        ('config = "x"', "config is no setting"),
        ("[node]\ncache = 1", "node is no setting"),
        ("cache = 4096", 'cache = 4096: must be a text, such as "8GiB"'),
        ("warmup = 1", "warmup = 1: must be true or false"),
        ("threads = true", "threads = True: must be a whole number"),
        ("threads = 1.5", "threads = 1.5: must be a whole number"),
        ('nvme-thermal-limit = "70"', "must be a number"),
        ('verify = "sometimes"', "must be one of first, always, never"),
        ("data-dir = [1]", "must be a list of texts"),
        ("data_dir = []\ndata-dir = []", "comes twice"),
        ("cache = ", "no TOML"),
        ('cache = "1GiB"\ncache = "2GiB"', "no TOML"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_name(
    model: Path, tmp_path: Path, text: str, complaint: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        parse(model, "--config", path)
    assert str(path) in str(caught.value) and complaint in str(caught.value)


def test_a_file_that_is_not_there_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.toml"):
        parse(model, "--config", tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--cache", "8G"), "8GB (1000) or 8GiB (1024)"),
        (("--data-dir", "/nowhere/at/all"), "--data-dir /nowhere/at/all: no such folder"),
        (("--nvme-thermal-limit", "7"), "must be in 30..120"),
        (("--nvme-thermal-limit", "nan"), "must be in 30..120"),
        (("--max-read-bandwidth", "5"), "at least 1MiB"),
        (("--pin-experts", "0"), "--pin-experts 0"),
        (("--pin-experts", "-1"), "--pin-experts -1"),
        (("--metrics-listen", "0.0.0.0:1"), "--metrics-listen 0.0.0.0:1 is reachable"),
        (("--metrics-listen", "unix:///x"), "write host:port"),
        (("--metrics-listen", "x"), "--metrics-listen 'x'"),
        (("--max-queued-calls", "0"), "--max-queued-calls 0"),
        (("--drain-timeout", "-1"), "--drain-timeout -1"),
    ],
)
def test_a_value_that_is_wrong_is_refused_by_name(
    model: Path, flags: tuple[str, ...], complaint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        parse(model, *flags)
    assert complaint in str(caught.value)


def test_a_model_is_needed() -> None:
    with pytest.raises(UsageError, match="no model"):
        parse()


def test_every_setting_of_the_verb_is_one_of_the_file(model: Path) -> None:
    given = dict.fromkeys(
        (name for name in node.__annotations__ if name not in ("context", "return")), None
    )
    settings = Settings(node, given, (), None)
    assert settings.read().keys() == given.keys() - {"config"}
    assert node_config({**settings.read(), "model": str(model)}).model == model
