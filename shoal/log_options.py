"""What a command line says of logs; apart from `shoal.log`, whose library --help can do without."""

from enum import StrEnum


class LogFormat(StrEnum):
    CONSOLE = "console"
    JSON = "json"


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"
