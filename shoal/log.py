"""Structured logs: one event a line, for people (`console`) or machines (`json`), on stderr.

Every line about a call carries `call_id`, every line about a stream `stream`, so that both sides'
logs of one failure can be laid beside each other. stdout belongs to results.
"""

import logging
import sys
from typing import TextIO

import orjson
import structlog
from structlog.typing import FilteringBoundLogger, Processor

from shoal.log_options import LogFormat, LogLevel


def configure(log_format: LogFormat, level: LogLevel, stream: TextIO | None = None) -> None:
    """Send this process's log lines of `level` and above to `stream` (default: stderr)."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendering: list[Processor]
    if log_format is LogFormat.JSON:
        dumps = structlog.processors.JSONRenderer(serializer=_to_json)
        rendering = [structlog.processors.dict_tracebacks, dumps]
    else:
        rendering = [structlog.dev.ConsoleRenderer(colors=(stream or sys.stderr).isatty())]
    structlog.configure(
        processors=[*shared, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(_NUMBER[level]),
        logger_factory=lambda *_: structlog.PrintLogger(stream or sys.stderr),
        cache_logger_on_first_use=False,  # a logger made before configure() obeys it too
    )


def get_logger(component: str) -> FilteringBoundLogger:
    """Return the logger of a component, whose name every line carries."""
    logger: FilteringBoundLogger = structlog.get_logger(component=component)
    return logger


_NUMBER = {
    LogLevel.DEBUG: logging.DEBUG,
    LogLevel.INFO: logging.INFO,
    LogLevel.WARNING: logging.WARNING,
    LogLevel.ERROR: logging.ERROR,
}


def _to_json(event: object, **_: object) -> str:
    return orjson.dumps(event, default=str).decode()


configure(LogFormat.CONSOLE, LogLevel.INFO)  # until a process says otherwise; never stdout
