"""Structured logs: one event a line, for people (`console`) or machines (`json`), on stderr.

Every line about a call carries `call_id`, every line about a stream `stream`, so that both sides'
logs of one failure can be laid beside each other. stdout belongs to results.

Why no library: structlog takes 0.1 s to import (its console brings rich), which every node and
every run of a model paid before it did anything; what we used of it is this file.
"""

import contextlib
import logging
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple, TextIO

import orjson

from shoal.log_options import LogFormat, LogLevel

_NUMBER = {
    LogLevel.DEBUG: logging.DEBUG,
    LogLevel.INFO: logging.INFO,
    LogLevel.WARNING: logging.WARNING,
    LogLevel.ERROR: logging.ERROR,
}
_COLOUR = {  # ANSI: bright black, green, yellow, red
    LogLevel.DEBUG: "\x1b[90m",
    LogLevel.INFO: "\x1b[32m",
    LogLevel.WARNING: "\x1b[33m",
    LogLevel.ERROR: "\x1b[31m",
}
_PLAIN = "\x1b[0m"
EVENT_WIDTH = 30  # of the console: keywords of most lines begin in one column


class _Output(NamedTuple):
    """Where lines go, and which. stream None: whatever stderr is by then."""

    log_format: LogFormat
    level: LogLevel
    stream: TextIO | None


_output = _Output(LogFormat.CONSOLE, LogLevel.INFO, None)  # until a process says otherwise


class Logger:
    """Writes a component's lines: an event of a few words, and what it is about as keywords.

    exc_info, where it is taken: an exception whose traceback belongs to the line.
    """

    def __init__(self, component: str) -> None:
        self._component = component

    def debug(self, event: str, exc_info: BaseException | None = None, **about: Any) -> None:
        self._write(LogLevel.DEBUG, event, exc_info, about)

    def info(self, event: str, **about: Any) -> None:
        self._write(LogLevel.INFO, event, None, about)

    def warning(self, event: str, **about: Any) -> None:
        self._write(LogLevel.WARNING, event, None, about)

    def error(self, event: str, exc_info: BaseException | None = None, **about: Any) -> None:
        self._write(LogLevel.ERROR, event, exc_info, about)

    def exception(self, event: str, **about: Any) -> None:
        """Write an error with the exception that is being handled."""
        self._write(LogLevel.ERROR, event, sys.exc_info()[1], about)

    def _write(
        self, level: LogLevel, event: str, error: BaseException | None, about: Mapping[str, Any]
    ) -> None:
        output = _output
        if _NUMBER[level] < _NUMBER[output.level]:
            return
        fields = {"component": self._component, **about}
        stream = sys.stderr if output.stream is None else output.stream
        trace = "" if error is None else "".join(traceback.format_exception(error))
        if output.log_format is LogFormat.JSON:
            line = _json(level, event, fields, trace)
        else:
            line = _console(level, event, fields, trace, has_colours=stream.isatty())
        with contextlib.suppress(OSError):  # nobody reads: no reason to end what we report on
            stream.write(line)  # in one piece: other threads write, too
            stream.flush()


def configure(log_format: LogFormat, level: LogLevel, stream: TextIO | None = None) -> None:
    """Send this process's log lines of `level` and above to `stream` (default: stderr)."""
    global _output
    _output = _Output(log_format, level, stream)


def get_logger(component: str) -> Logger:
    """Return the logger of a component, whose name every line carries."""
    return Logger(component)


def _json(level: LogLevel, event: str, fields: Mapping[str, Any], trace: str) -> str:
    line = {"timestamp": _now(), "level": level, "event": event, **fields}
    if trace:
        line["exception"] = trace
    return orjson.dumps(line, default=str).decode() + "\n"


def _console(
    level: LogLevel, event: str, fields: Mapping[str, Any], trace: str, *, has_colours: bool
) -> str:
    colour, plain = (_COLOUR[level], _PLAIN) if has_colours else ("", "")
    about = " ".join(f"{name}={_shown(value)}" for name, value in fields.items())
    return f"{_now()} {colour}[{level:<7}]{plain} {event:<{EVENT_WIDTH}} {about}\n{trace}"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _shown(value: object) -> str:
    """Return a value as one word: quoted where it has blanks, or bytes that a terminal obeys."""
    text = str(value)
    return text if text.isprintable() and not set(text) & set(" \"'=") and text else repr(text)
