"""Log lines: one event a line, for people and for machines."""

import io
import json
from collections.abc import Iterator

import pytest

from shoal import log
from shoal.log_options import LogFormat, LogLevel


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Where lines go; what was there before is there again afterwards."""
    yield io.StringIO()
    log.configure(LogFormat.CONSOLE, LogLevel.INFO)


def fail() -> None:
    raise ZeroDivisionError("by nothing")


def test_a_machine_reads_every_field_of_a_line(stream: io.StringIO) -> None:
    log.configure(LogFormat.JSON, LogLevel.INFO, stream)
    log.get_logger("worker").warning("call failed", call_id=2**63, why='a "b"\nc', path=log)
    (line,) = stream.getvalue().splitlines()
    fields = json.loads(line)
    assert fields.pop("timestamp").endswith("Z")
    assert fields.pop("path").startswith("<module 'shoal.log'")
    assert fields == {
        "level": "warning",
        "event": "call failed",
        "component": "worker",
        "call_id": 2**63,
        "why": 'a "b"\nc',
    }


@pytest.mark.parametrize("level", LogLevel)
def test_lines_below_the_level_are_not_written(stream: io.StringIO, level: LogLevel) -> None:
    log.configure(LogFormat.JSON, level, stream)
    logger = log.get_logger("worker")
    for write in (logger.debug, logger.info, logger.warning, logger.error):
        write("event")
    written = [json.loads(line)["level"] for line in stream.getvalue().splitlines()]
    assert written == list(LogLevel)[list(LogLevel).index(level) :]


def test_a_logger_made_before_obeys_what_is_configured_later(stream: io.StringIO) -> None:
    logger = log.get_logger("worker")
    log.configure(LogFormat.CONSOLE, LogLevel.INFO, stream)
    logger.info("stream ended", name="a")
    (line,) = stream.getvalue().splitlines()
    assert "stream ended" in line and "component=worker" in line and "name=a" in line


@pytest.mark.parametrize("log_format", LogFormat)
def test_an_exception_brings_its_traceback(stream: io.StringIO, log_format: LogFormat) -> None:
    log.configure(log_format, LogLevel.INFO, stream)
    logger = log.get_logger("worker")
    handled = ""
    try:
        fail()
    except ZeroDivisionError as error:
        logger.exception("bug")
        handled = stream.getvalue()
        logger.error("bug", exc_info=error)
    for written in (handled, stream.getvalue()[len(handled) :]):
        assert all(word in written for word in ("fail", "ZeroDivisionError", "by nothing"))
