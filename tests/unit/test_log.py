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


def test_people_read_one_line_whatever_a_value_holds(stream: io.StringIO) -> None:
    log.configure(LogFormat.CONSOLE, LogLevel.INFO, stream)
    log.get_logger("worker").info("stream ended", name="a", why="two\nlines\x1b[2J", none="")
    (line,) = stream.getvalue().splitlines()
    assert line.endswith(
        "[info   ] stream ended                   "
        r"component=worker name=a why='two\nlines\x1b[2J' none=''"
    )


@pytest.mark.parametrize("level", LogLevel)
def test_lines_below_the_level_are_not_written(stream: io.StringIO, level: LogLevel) -> None:
    log.configure(LogFormat.JSON, level, stream)
    logger = log.get_logger("worker")
    for write in (logger.debug, logger.info, logger.warning, logger.error):
        write("event")
    written = [json.loads(line)["level"] for line in stream.getvalue().splitlines()]
    assert written == list(LogLevel)[list(LogLevel).index(level) :]


@pytest.mark.parametrize("log_format", LogFormat)
def test_an_exception_brings_its_traceback(stream: io.StringIO, log_format: LogFormat) -> None:
    log.configure(log_format, LogLevel.INFO, stream)
    logger = log.get_logger("worker")
    try:
        fail()
    except ZeroDivisionError as error:
        logger.exception("bug")
        handled = stream.getvalue()
        logger.error("bug", exc_info=error)
    for written in (handled, stream.getvalue()[len(handled) :]):
        assert "in fail" in written and "ZeroDivisionError: by nothing" in written


def test_a_reader_that_left_ends_nothing() -> None:
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    log.configure(LogFormat.CONSOLE, LogLevel.INFO, Gone())
    try:
        log.get_logger("worker").error("event")
    finally:
        log.configure(LogFormat.CONSOLE, LogLevel.INFO)
