"""Starts a worker process and says how it ended."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from inferpool.config import worker_environment

__all__ = ["RoleLogFile", "WorkerProcess"]

_TAIL_BYTES = 4096
_TAIL_LINES = 30


class RoleLogFile:
    """Where a worker's output goes: a file in the log directory, or an anonymous one."""

    def __init__(self, log_dir: Path | None, role: str) -> None:
        if log_dir is None:
            self.path = None
            self._fd = os.memfd_create(f"inferpool-{role}-log")
            # So that lines of Python and of native code never overwrite each other.
            fcntl.fcntl(self._fd, fcntl.F_SETFL, os.O_APPEND)
        else:
            log_dir.mkdir(parents=True, exist_ok=True)
            self.path = (log_dir / f"worker-{role}.log").absolute()
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._fd = os.open(self.path, flags, 0o600)

    def fileno(self) -> int:
        """The descriptor that the worker inherits as its stdout and stderr."""
        return self._fd

    def tail(self) -> str:
        """The last lines, or what can still be read of them."""
        try:
            if self.path is not None:
                # The worker may have rotated the file since it was opened here.
                current = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                os.dup2(current, self._fd, inheritable=False)
                os.close(current)
            size = os.fstat(self._fd).st_size
            end = os.pread(self._fd, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
        except OSError as error:
            return f"(no log: {error})"
        return "\n".join(end.decode(errors="replace").splitlines()[-_TAIL_LINES:])

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)


class WorkerProcess:
    """A child process that runs ``python -m inferpool.worker``."""

    def __init__(self, argument: str, fds: Sequence[int], log: RoleLogFile) -> None:
        """Start the process.

        Args:
            argument: the one command-line argument.
            fds: descriptors that it inherits under the same numbers.
            log: takes its output.

        Raises:
            OSError: the system could not start it.
        """
        # -P: a file in the working directory must not shadow a module of the worker. The host's
        # own sys.path follows in the first message. In a process group of its own the worker
        # does not get the terminal's Ctrl-C, which is meant for the host.
        self._popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "inferpool.worker", argument],
            stdin=subprocess.DEVNULL,
            stdout=log.fileno(),
            stderr=log.fileno(),
            pass_fds=fds,
            process_group=0,
            env=worker_environment(),
        )

    @property
    def pid(self) -> int:
        """Process id; it stays reserved until the process is reaped."""
        return self._popen.pid

    def kill(self) -> None:
        """Send SIGKILL, unless the process has been reaped."""
        self._popen.kill()

    def reap(self, timeout: float) -> str | None:
        """Wait for the end and say what it was, by name; None if the process lives on."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return _describe(self._popen.wait(timeout))
        return None


def _describe(returncode: int) -> str:
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"signal {-returncode}"
