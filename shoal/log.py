"""Structured logs: one event a line, for people (`console`) or machines (`json`), on stderr.

Every line about a call carries `call_id`, every line about a stream `stream`, so that both sides'
logs of one failure can be laid beside each other. stdout belongs to results.
"""

import functools
import logging
import sys
from typing import TYPE_CHECKING, Any, TextIO

from shoal.log_options import LogFormat, LogLevel

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger, Processor


class Logger:
    """A component's logger. structlog (0.1 s to import) comes with its first line."""

    def __init__(self, component: str) -> None:
        self._component = component

    def __getattr__(self, name: str) -> Any:
        return getattr(_bound(self._component), name)

    if TYPE_CHECKING:  # what __getattr__ brings

        def debug(self, event: str, **about: Any) -> None: ...
        def info(self, event: str, **about: Any) -> None: ...
        def warning(self, event: str, **about: Any) -> None: ...
        def error(self, event: str, **about: Any) -> None: ...
        def exception(self, event: str, **about: Any) -> None: ...


def configure(log_format: LogFormat, level: LogLevel, stream: TextIO | None = None) -> None:
    """Send this process's log lines of `level` and above to `stream` (default: stderr)."""
    global _output
    _output = (log_format, level, stream)
    _bound.cache_clear()  # a logger made before obeys it too


def get_logger(component: str) -> Logger:
    """Return the logger of a component, whose name every line carries."""
    return Logger(component)


_output: tuple[LogFormat, LogLevel, TextIO | None] = (LogFormat.CONSOLE, LogLevel.INFO, None)


@functools.cache
def _bound(component: str) -> "FilteringBoundLogger":
    import structlog

    log_format, level, stream = _output
    processors: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if log_format is LogFormat.JSON:
        processors.append(structlog.processors.dict_tracebacks)
        processors.append(structlog.processors.JSONRenderer(serializer=_to_json))
    else:
        has_colours = (stream or sys.stderr).isatty()
        processors.append(structlog.dev.ConsoleRenderer(colors=has_colours))
    logger: FilteringBoundLogger = structlog.wrap_logger(
        structlog.PrintLogger(stream or sys.stderr),
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(_NUMBER[level]),
        component=component,
    )
    return logger


_NUMBER = {
    LogLevel.DEBUG: logging.DEBUG,
    LogLevel.INFO: logging.INFO,
    LogLevel.WARNING: logging.WARNING,
    LogLevel.ERROR: logging.ERROR,
}


def _to_json(event: object, **_: object) -> str:
    import orjson

    return orjson.dumps(event, default=str).decode()
