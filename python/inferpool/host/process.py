"""Starts a worker process and says how it ended, and what the system knows of it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from inferpool.config import worker_environment

__all__ = [
    "OomWitness",
    "RoleLogFile",
    "WorkerProcess",
    "call_later",
    "low_descriptors_taken",
    "native_message",
    "oom_counts",
    "resident_bytes",
    "thread_times",
]

_TAIL_BYTES = 4096
_TAIL_LINES = 30
# What a terminal would obey, once the error that quotes it is shown on one.
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")

# What ggml, libc, the C++ runtime, CPython and Rust say before they end a process.
_LAST_WORDS = re.compile(
    r"^.*(?:GGML_ASSERT|GGML_ABORT|ggml_abort|Assertion .* failed|terminate called|"
    r"Fatal Python error|stack smashing|\b(?:free|malloc|realloc|munmap_chunk)\(\): |double free|"
    r"panicked at).*$",
    re.MULTILINE,
)


class RoleLogFile:
    """Where a worker's output goes: a file in the log directory, or an anonymous one."""

    def __init__(self, log_dir: Path | None, role: str) -> None:
        if log_dir is None:
            self.path = None
            self._fd = os.memfd_create(f"inferpool-{role}-log")
            try:
                # So that lines of Python and of native code never overwrite each other.
                fcntl.fcntl(self._fd, fcntl.F_SETFL, os.O_APPEND)
            except OSError:
                os.close(self._fd)
                raise
        else:
            log_dir.mkdir(parents=True, exist_ok=True)
            self.path = log_dir / f"worker-{role}.log"
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._fd = os.open(self.path, flags, 0o600)

    def fileno(self) -> int:
        """The descriptor that the worker inherits as its stdout and stderr."""
        return self._fd

    def tail(self) -> str:
        """The last lines, or what can still be read of them, without control characters."""
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
        text = _CONTROL_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", end.decode(errors="replace"))
        return "\n".join(text.splitlines()[-_TAIL_LINES:])

    def append(self, line: str) -> None:
        """Add a line of the host's, in the form of the worker's. A log that is gone stays so."""
        if self.path is None:
            return  # nobody could read it once the descriptor is closed
        now = time.time()
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        text = f"{stamp},{int(now * 1000) % 1000:03} INFO inferpool.host: {line}\n"
        with contextlib.suppress(OSError):
            # The worker may have rotated the file since it was opened here.
            fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            try:
                os.write(fd, text.encode(errors="replace"))
            finally:
                os.close(fd)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)


@contextlib.contextmanager
def low_descriptors_taken() -> Iterator[None]:
    """Let no descriptor that is opened meanwhile be 0, 1 or 2, which a host may have closed.

    The worker's own streams have these numbers, and native code of the host writes to them.
    """
    with contextlib.ExitStack() as taken:
        while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
            taken.callback(os.close, fd)
        os.close(fd)
        yield


def call_later(seconds: float, act: Callable[[], object]) -> threading.Timer | None:
    """Have a thread call `act` after a while; None if the system has no thread left for that."""
    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), act)
    timer.daemon = True
    try:
        timer.start()
    except RuntimeError:
        return None
    return timer


class WorkerProcess:
    """A child process that runs ``python -m inferpool.worker``."""

    def __init__(
        self,
        argument: str,
        fds: Sequence[int],
        log: RoleLogFile,
        environment: Mapping[str, str],
        folder: Path | None,
    ) -> None:
        """Start the process.

        Args:
            argument: the one command-line argument.
            fds: descriptors that it inherits under the same numbers.
            log: takes its output.
            environment: variables beside, or in place of, the host's.
            folder: its working folder; the host's if there is no such folder.

        Raises:
            OSError: the system could not start it.
        """
        if not sys.executable or getattr(sys, "frozen", False):
            raise OSError(
                f"it runs in a Python interpreter, which sys.executable ({sys.executable!r}) is not"
            )
        # -P: a file in the working directory must not shadow a module of the worker, nor one in
        # a folder that the host's own -E, -s or -I (which is all three) keeps out. The host's own
        # sys.path follows in the first message. In a process group of its own the worker
        # does not get the terminal's Ctrl-C, which is meant for the host.
        flags = ["-E"] * sys.flags.ignore_environment + ["-s"] * sys.flags.no_user_site
        self._popen = subprocess.Popen(
            [sys.executable, *flags, "-P", "-m", "inferpool.worker", argument],
            stdin=subprocess.DEVNULL,
            stdout=log.fileno(),
            stderr=log.fileno(),
            pass_fds=fds,
            process_group=0,
            env=worker_environment(environment),
            cwd=folder if folder is not None and os.access(folder, os.X_OK) else None,
        )
        self._exit: str | None = None

    @property
    def pid(self) -> int:
        """Process id; it stays reserved until the process is reaped."""
        return self._popen.pid

    def kill(self) -> None:
        """Send SIGKILL, unless the process has ended."""
        self._look()
        if self._exit is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def reap(self, timeout: float) -> str | None:
        """Wait for the end and say what it was, by name; None if the process lives on."""
        deadline = time.monotonic() + timeout
        pause = 0.0005
        while True:
            self._look()
            if self._exit is not None:
                self._popen.wait()  # which makes a 0 of a status that is gone
                return self._exit
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            time.sleep(min(pause, left))
            pause = min(2 * pause, 0.05)

    def _look(self) -> None:
        if self._exit is not None:
            return
        try:
            # The status stays, for whoever reaps the process.
            seen = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        except ChildProcessError:  # the kernel is told to keep none, or another wait took it
            self._exit = "unknown, since this program takes the status of any child"
        else:
            self._exit = None if seen is None else _describe(seen)


def _describe(seen: os.waitid_result) -> str:
    if seen.si_code == os.CLD_EXITED:
        return f"exit code {seen.si_status}"
    try:
        return signal.Signals(seen.si_status).name
    except ValueError:
        return f"signal {seen.si_status}"


def native_message(tail: str) -> str | None:
    """The line of a log's tail in which a native library says why it ended the process."""
    found = _LAST_WORDS.search(tail)
    return None if found is None else found.group().strip()


def resident_bytes(pid: int) -> int | None:
    """Memory of a process that is in RAM, mapped model files included; None if it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def thread_times(pid: int) -> dict[int, tuple[bool, float]]:
    """Of each thread of a process by its id: whether it wants a CPU, and seconds of CPU it had."""
    times: dict[int, tuple[bool, float]] = {}
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        ticks = int(fields[11]) + int(fields[12])
        times[int(path.parent.name)] = (fields[0] == "R", ticks / os.sysconf("SC_CLK_TCK"))
    return times


class OomWitness:
    """Tells whether it was the kernel, for want of memory, that killed a worker with SIGKILL.

    The kernel only counts whom it killed in a control group, so each of its kills accounts for one
    worker: one that lives on must not be told by it when something else ends it later.
    """

    _lock = threading.Lock()
    _accounted = 0

    def __init__(self) -> None:
        """Begin to watch, before the worker is started."""
        self._before = _oom_kills()

    def saw_kill(self) -> bool:
        """Whether there was a kill meanwhile that accounts for no other worker."""
        now = _oom_kills()
        if now is None or self._before is None:
            return False
        with OomWitness._lock:
            known = max(self._before, OomWitness._accounted)
            if now <= known:
                return False
            OomWitness._accounted = known + 1
        return True


def _oom_kills() -> int | None:
    """How many processes of this control group the kernel has killed for want of memory.

    None where that cannot be known, as in the root group.
    """
    try:
        groups = Path("/proc/self/cgroup").read_text()
    except OSError:
        return None
    for counts in oom_counts(groups):
        with contextlib.suppress(OSError):
            count = re.search(r"^oom_kill (\d+)$", counts.read_text(), re.MULTILINE)
            return None if count is None else int(count.group(1))
    return None


def oom_counts(groups: str) -> list[Path]:
    """The files that may have the count, by what ``/proc/self/cgroup`` says."""
    # Version 1 if the controller is named, version 2 otherwise.
    if named := re.search(r"^\d+:(?:.*,)?memory(?:,.*)?:/(.*)$", groups, re.MULTILINE):
        mounted, name = Path("/sys/fs/cgroup/memory"), "memory.oom_control"
    elif named := re.search(r"^0::/(.*)$", groups, re.MULTILINE):
        mounted, name = Path("/sys/fs/cgroup"), "memory.events"
    else:
        return []
    # A container may see nothing but its own group, mounted as if it were the root.
    return [mounted / named.group(1) / name, mounted / name]
