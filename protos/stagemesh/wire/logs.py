"""Logging of the long-running processes: one format, to stderr, as text or as JSON lines."""

from __future__ import annotations

import json as jsonlib
import logging
import time
from datetime import UTC, datetime

from stagemesh.wire.errors import ConfigError

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class _TextFormatter(logging.Formatter):
    """`2026-01-31 12:00:00.123 INFO stage 1: message`, local time."""

    def __init__(self, name: str) -> None:
        super().__init__(f"%(asctime)s.%(msecs)03d %(levelname)s {name}: %(message)s", "%Y-%m-%d %H:%M:%S")
        self.converter = time.localtime


class _JsonFormatter(logging.Formatter):
    """One object a line: time (RFC 3339, UTC), level, name, logger, message and, of an exception, error."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "name": self._name,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return jsonlib.dumps(line, ensure_ascii=False)


class StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """To stderr, and nowhere once it is closed, which `logging` does as the process ends.

    A library's daemon thread that is inside a write when the interpreter goes never leaves it, and Python aborts the
    process because stderr stays locked (_enter_buffered_busy; exit code -6).
    """

    def __init__(self, level: int = logging.NOTSET) -> None:
        super().__init__()
        self.setLevel(level)
        self._ended = False

    def emit(self, record: logging.LogRecord) -> None:
        """The record as a line; nothing after `close`."""
        if not self._ended:
            super().emit(record)

    def close(self) -> None:
        """When it returns, no thread is in `emit`."""
        self.acquire()
        self._ended = True
        self.release()
        super().close()


def level_number(level: str) -> int:
    """Of `logging`, for the name of a level; ConfigError if there is none of that name."""
    number = _LEVELS.get(level.lower())
    if number is None:
        raise ConfigError(f"--log-level: '{level}' is not a level; expected {', '.join(_LEVELS)}")
    return number


def setup_logging(level: str, json: bool, name: str) -> None:
    """Send this process's log to stderr; calling it again replaces the set-up.

    Args:
        level: debug, info, warning or error.
        json: JSON lines instead of text.
        name: Who logs, as people call it: "router", "stage 1", "stage 1 rank 0".

    Raises:
        ConfigError: An unknown level.
    """
    number = level_number(level)
    handler = StderrHandler()
    handler.setFormatter(_JsonFormatter(name) if json else _TextFormatter(name))
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if isinstance(handler, StderrHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(number)
