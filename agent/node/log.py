"""The agent's log on stderr: a constant message and fields, as JSON lines or as text.

    log.warning("policy file is wrong", file="a.yaml", error=error)

A message says what happened, in the same words each time; what differs is in the fields. That makes it possible to
search for it, and to count it.
"""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any, TextIO

from agent.errors import WeirError

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")
QUIET = 60.0
"""Seconds for which a warning or an error with the same message is not repeated."""

MOST = 1000
"""Messages whose last time is remembered; there are fewer in the code, unless one is made of data."""


class Log:
    """Messages with fields, to the logger of stdlib's logging that has this name."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, message: str, **fields: Any) -> None:
        """For those who look for a fault in weir."""
        self._write(logging.DEBUG, message, fields)

    def info(self, message: str, **fields: Any) -> None:
        """What the agent did."""
        self._write(logging.INFO, message, fields)

    def warning(self, message: str, **fields: Any) -> None:
        """Something is not as it should be; the agent goes on."""
        self._write(logging.WARNING, message, fields)

    def error(self, message: str, **fields: Any) -> None:
        """Something that has to be done was not done."""
        self._write(logging.ERROR, message, fields)

    def bug(self, message: str, **fields: Any) -> None:
        """An error, with the traceback of the exception that is being handled."""
        self._write(logging.ERROR, message, fields, traceback=True)

    def _write(self, level: int, message: str, fields: Mapping[str, Any], *, traceback: bool = False) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, "%s", message, extra={"fields": _flat(fields)}, exc_info=traceback)


log = Log("weir")


def set_up(form: str, level: str, stream: TextIO | None = None) -> None:
    """Write the log of this process to ``stream``, or stderr: ``form`` is one of FORMATS, ``level`` of LEVELS.

    What libraries log goes the same way, from warnings up. What stderr cannot take at once is left out.
    """
    logging.raiseExceptions = False  # it would print a traceback for each line that finds no room
    handler: logging.Handler = logging.NullHandler()  # stderr was closed: its number may be any file's by now
    if stream or sys.stderr:
        handler = logging.StreamHandler(stream or Unwaiting(sys.stderr.fileno()))
    handler.setFormatter(_Json() if form == "json" else _Text())
    handler.addFilter(Quiet())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    logging.getLogger("weir").setLevel(level.upper())
    root.setLevel(max(logging.WARNING, logging.getLogger("weir").level))


class Unwaiting:
    """Text to a descriptor that may be a full disk, or a pipe that nobody reads: the caller never waits for it.

    Not through sys.stderr, which keeps what it could not write and fails again when the process ends.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._room = select.poll()
        self._room.register(fd, select.POLLOUT)

    def write(self, text: str) -> None:
        """Write what there is room for."""
        left = text.encode(errors="backslashreplace")
        try:
            while left and self._room.poll(0):  # a pipe then has room for PIPE_BUF bytes (pipe(7))
                left = left[os.write(self._fd, left[: select.PIPE_BUF]) :]
        except OSError:
            return

    def flush(self) -> None:
        """Do nothing: all is written or left out."""


class Quiet(logging.Filter):
    """Lets a warning or error through when the same message was not written in the last QUIET seconds.

    The next one that is written says in the field ``left_out`` how many were not.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._seen: dict[tuple[int, str], tuple[float, int]] = {}
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is to be written."""
        if record.levelno < logging.WARNING:
            return True
        key, now = (record.levelno, record.getMessage()), self._clock()
        with self._lock:
            written, left_out = self._seen.get(key, (now - QUIET, 0))
            if now - written < QUIET:
                self._seen[key] = (written, left_out + 1)
                return False
            self._seen.pop(key, None)
            if len(self._seen) >= MOST:
                self._seen.pop(next(iter(self._seen)))
            self._seen[key] = (now, 0)
        if left_out:
            record.__dict__["fields"] = {**_fields(record), "left_out": left_out}
        return True


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = record.__dict__.get("fields", {})
    return fields


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A WeirError's hint becomes a field of its own."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat[name] = value
        if isinstance(value, WeirError):
            flat[name] = value.message
            if value.hint:
                flat["hint"] = value.hint
    return flat


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"time": _time(record), "level": record.levelname.lower(), "message": record.getMessage()}
        line.update({name: value for name, value in _fields(record).items() if name not in line})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        words = [_time(record), record.levelname.lower(), _printable(record.getMessage())]
        words += [f"{name}={_word(value)}" for name, value in _fields(record).items()]
        if record.exc_info:
            words.append(f"\n{self.formatException(record.exc_info)}")
        return " ".join(words)


def _word(value: Any) -> str:
    """A value that ends where it seems to end. Names come from whoever starts containers: none may fake a line."""
    text = str(value)
    plain = text.isprintable() and not set(text) & set(' "=')
    return text if plain and text else json.dumps(text)


def _printable(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)
