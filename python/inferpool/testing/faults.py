"""Ways for a worker to fail: from inside, by a script, and from outside, by a signal."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from inferpool.host.pool import AsyncPool, Pool

__all__ = ["Fault", "signal_worker"]


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Something that goes wrong in a worker.

    ``Fault("signal", "SIGSEGV")`` dies of a signal, ``Fault("exit", 3)`` ends the process,
    ``Fault("raise", "no more ideas")`` raises a ``RuntimeError``. ``Fault("hang")`` never returns
    and never looks at its abort token; ``Fault("hold_gil")`` keeps the GIL while it does.
    """

    action: Literal["signal", "exit", "raise", "hang", "hold_gil"]
    argument: str | int | None = None

    def __post_init__(self) -> None:
        expected = {"signal": str, "exit": int, "raise": str}.get(self.action, type(None))
        if not isinstance(self.argument, expected):
            raise TypeError(f"Fault({self.action!r}) takes {expected.__name__}")
        if self.action == "signal":
            _signal(str(self.argument))

    def happen(self) -> None:
        """Let it go wrong, in this process."""
        if self.action == "raise":
            raise RuntimeError(self.argument)
        if self.action == "exit":
            os._exit(int(self.argument or 0))
        if self.action == "signal":
            os.kill(os.getpid(), _signal(str(self.argument)))
        if self.action == "hold_gil":
            ctypes.PyDLL(None).pause()  # PyDLL keeps the GIL
        while True:
            time.sleep(60)


def signal_worker(pool: Pool | AsyncPool, role: str, name: str) -> int:
    """Send a signal, such as ``"SIGSTOP"``, to a role's worker, and return its process id.

    A worker that is to be stopped has stopped when this returns.

    Raises:
        ValueError: there is no such signal, or the role has no worker now.
    """
    number = _signal(name)
    pid = pool.status()[role].pid
    if pid is None:
        raise ValueError(f"role {role!r} has no worker")
    os.kill(pid, number)
    # The kernel lets running threads go on for a moment, in which one could still answer.
    while number == signal.SIGSTOP and not _has_stopped(pid):
        time.sleep(0.001)
    return pid


def _has_stopped(pid: int) -> bool:
    """Whether no thread of a process runs, see ``proc_pid_stat(5)``."""
    try:
        stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    except (FileNotFoundError, ProcessLookupError):
        return False  # a thread ended meanwhile; the next look finds the others
    return all(stat.rpartition(")")[2].split()[0] in "TtZX" for stat in stats)


def _signal(name: str) -> signal.Signals:
    try:
        return signal.Signals[name]
    except KeyError:
        raise ValueError(f"there is no signal {name!r}") from None
