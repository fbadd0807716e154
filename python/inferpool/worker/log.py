"""The worker's standard streams and log.

The host starts a worker with its output already going to the role's log, so that what happens
before the first line of Python is kept too. The log is a file in the log directory, or an
anonymous one that only the host can read. Python's logging writes to the same descriptor as
native prints, so the lines stand in the order in which they happened.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import TextIO

__all__ = ["RoleLog", "configure_worker_logging", "limit_log_size", "redirect_stdio"]

MAX_BYTES = 4 * 1024 * 1024
"""Size at which the log is rotated, or cut when it has no file."""
BACKUPS = 3
"""Rotated files that are kept, as ``.1`` (youngest) to ``.3``."""
KEPT_BYTES = 64 * 1024
"""What remains of a log without a file when it is cut."""

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def redirect_stdio(log_path: str | None) -> None:
    """Point stdin at /dev/null, and stdout and stderr at the role's log.

    Args:
        log_path: the log file; None leaves stdout and stderr where the host pointed them.
    """
    _replace(os.open(os.devnull, os.O_RDONLY), 0)
    if log_path is not None:
        log = os.open(log_path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.dup2(log, 1)
        _replace(log, 2)


def configure_worker_logging(log_path: str | None, level: str) -> RoleLog:
    """Send Python's logging, from `level` up, to the role's log, and return that."""
    log = RoleLog(log_path)
    log.setFormatter(logging.Formatter(_FORMAT))
    logging.basicConfig(level=level, handlers=[log], force=True)
    logging.captureWarnings(capture=True)
    return log


class RoleLog(logging.StreamHandler[TextIO]):
    """Writes records to stderr and keeps the log's size within bounds."""

    def __init__(self, log_path: str | None) -> None:
        super().__init__(sys.stderr)
        self._path = None if log_path is None else Path(log_path)

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, and rotate or cut the log if it has grown too large."""
        super().emit(record)
        self.limit_size()

    def limit_size(self) -> None:
        """Rotate or cut the log if it has grown too large; native prints count too."""
        with self.lock:  # type: ignore[union-attr]  # set by Handler.createLock
            limit_log_size(self._path)


def limit_log_size(path: Path | None) -> None:
    """Rotate the log if it has grown too large; cut it if it has no file, or is not to be moved.

    In a sandbox it is not: the worker may write its log, but nothing else in that folder.
    """
    # A log that can be neither moved nor cut, on a disk that fails, stays as it is; a handler may
    # have closed it, too.
    with contextlib.suppress(OSError, ValueError):
        if os.fstat(2).st_size <= MAX_BYTES:
            return
        sys.stdout.flush()
        if path is None or not _rotate(path):
            _cut()


def _rotate(path: Path) -> bool:
    try:
        for number in range(BACKUPS, 0, -1):
            older = path.with_name(f"{path.name}.{number}")
            newer = path if number == 1 else path.with_name(f"{path.name}.{number - 1}")
            if newer.exists():
                newer.replace(older)
        redirect_stdio(str(path))
    except OSError:
        return False
    return True


def _cut() -> None:
    # The descriptor appends, so the kept end lands at the new start.
    size = os.fstat(2).st_size
    end = os.pread(2, KEPT_BYTES, size - KEPT_BYTES)
    os.ftruncate(2, 0)
    os.write(2, end)


def _replace(source: int, target: int) -> None:
    os.dup2(source, target)
    os.close(source)
