"""Options declared once for several verbs: what typer sees, what the verb gets."""

from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from coordinator.app import CoordinatorConfig
from coordinator.commands import EngineOptions, chat, run
from shoal.errors import UsageError
from shoal.experts.options import Backend, Io, Mode, Verify
from shoal.option_groups import grouped


@dataclass(frozen=True)
class Sampling:
    heat: Annotated[float, typer.Option(help="how warm")] = 0.5
    seeds: Annotated[list[int] | None, typer.Option("--seed")] = None


def parsed(*arguments: str) -> dict[str, Any]:
    got: dict[str, Any] = {}

    @grouped
    def verb(
        prompt: str, sampling: Sampling = Sampling(), loud: Annotated[bool, typer.Option()] = False
    ) -> None:
        """Say it."""
        got.update(prompt=prompt, sampling=sampling, loud=loud)

    app = typer.Typer()
    app.command()(verb)
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    assert verb.__doc__ == "Say it."
    return got | {"help": result.output}


def test_the_verb_gets_its_groups() -> None:
    got = parsed("hello", "--heat", "0.7", "--seed", "1", "--seed", "2", "--loud")
    assert got["prompt"] == "hello" and got["loud"] is True
    assert got["sampling"] == Sampling(0.7, [1, 2])


def test_defaults_are_the_groups_own() -> None:
    assert parsed("hello")["sampling"] == Sampling(0.5, None)


def test_help_tells_every_option_of_a_group() -> None:
    text = parsed("--help")["help"]
    assert "--heat" in text and "how warm" in text and "--seed" in text


def test_two_options_of_one_name_are_a_bug() -> None:
    with pytest.raises(AssertionError, match="heat"):

        @grouped
        def verb(heat: float, sampling: Sampling = Sampling()) -> None:
            """Never made."""


def test_run_and_chat_take_the_same_options_for_the_same_things() -> None:
    shared = run.__annotations__.keys() & chat.__annotations__.keys()
    assert {"cache", "data_dir", "verify", "io", "prefetch", "moe_shards", "top_p"} <= shared
    assert all(
        run.__annotations__[name] == chat.__annotations__[name] for name in shared - {"max_tokens"}
    )


def test_store_options_reach_the_configuration(tmp_path: Any) -> None:
    options = EngineOptions(
        cache="1.5GiB", data_dir=[tmp_path], verify=Verify.NEVER, io=Io.PREAD, prefetch=Mode.OFF
    )
    config: CoordinatorConfig = options.config("name")
    assert config.store.cache_bytes == 3 << 29
    assert (config.store.data_dirs, config.store.verify) == ((tmp_path,), Verify.NEVER)
    assert (config.store.backend, config.prefetch) == (Backend.PREAD, Mode.OFF)
    assert EngineOptions().config("name").store.cache_bytes is None


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (EngineOptions(cache="8G"), "--cache '8G'"),
        (EngineOptions(data_dir=["/nowhere"]), "--data-dir /nowhere"),  # type: ignore[list-item]
    ],
)
def test_wrong_store_options_are_named(options: EngineOptions, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        options.config("name")
