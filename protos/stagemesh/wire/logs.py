"""Logging of the long-running processes: one format, to stderr, as text or as JSON lines."""

from __future__ import annotations

import json as jsonlib
import logging
import sys
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


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """Marks the handler as ours, so that a second set-up replaces it and leaves others alone."""


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
    handler = _Handler(sys.stderr)
    handler.setFormatter(_JsonFormatter(name) if json else _TextFormatter(name))
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if isinstance(handler, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(number)
