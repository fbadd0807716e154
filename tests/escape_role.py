"""A custom role that tries to get out of its sandbox, one way at a time."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import platform
import resource
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inferpool.worker import KindHandler, Reply, RoleConfig, WorkerLoopState

_X86 = platform.machine() == "x86_64"
# Those without a function in every libc; from 424 on, the same number everywhere.
_CALLS = {
    "bpf": 321 if _X86 else 280,
    "kcmp": 312 if _X86 else 272,
    "keyctl": 250 if _X86 else 219,
    "perf_event_open": 298 if _X86 else 241,
    "tgkill": 234 if _X86 else 131,
    "tkill": 200 if _X86 else 130,
    "userfaultfd": 323 if _X86 else 282,
    "pidfd_send_signal": 424,
    "io_uring_setup": 425,
    "clone3": 435,
    "openat2": 437,
    "pidfd_getfd": 438,
    "setxattrat": 463,
    "removexattrat": 466,
    "file_setattr": 469,
}
# Opens a file to be neither read nor written, but for `ioctl`.
_NEITHER = 3
_libc = ctypes.CDLL(None, use_errno=True)


class Session:
    def close(self) -> None:
        """Nothing is held."""


def make_session(role_config: RoleConfig, abort: Any) -> Session:
    return Session()


def _check(result: int) -> int:
    if result == -1:
        raise OSError(ctypes.get_errno(), "")
    return result


def _call(name: str, *arguments: Any) -> int:
    return _check(_libc.syscall(_CALLS[name], *arguments))


def _write(path: Path) -> None:
    path.write_text("escaped")


def _connect(family: int, kind: int, address: Any) -> None:
    with socket.socket(family, kind) as sock:
        sock.connect(address)
        sock.send(b"escaped")


def _inherited(index: int) -> socket.socket:
    return socket.socket(fileno=os.dup(json.loads(sys.argv[1])["fds"][index]))


def _fork() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def _spawn() -> None:
    os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)


def _execute() -> None:
    """Get as far as the program that would replace this one, which there is not."""
    with contextlib.suppress(FileNotFoundError):
        os.execv("/nonexistent", ["nonexistent"])


def _clone_process() -> None:
    fork = _libc.syscall(56 if _X86 else 220, signal.SIGCHLD, 0, 0, 0, 0)
    if fork == 0:
        os._exit(0)
    os.waitpid(_check(fork), 0)


def _attach(pid: int) -> None:
    _check(_libc.ptrace(16, pid, 0, 0))
    os.waitpid(pid, 0)
    _check(_libc.ptrace(17, pid, 0, 0))


def _read_memory(pid: int, address: int) -> None:
    here = ctypes.create_string_buffer(6)
    local = (ctypes.c_size_t * 2)(ctypes.addressof(here), 6)
    remote = (ctypes.c_size_t * 2)(address, 6)
    _check(_libc.process_vm_readv(pid, local, 1, remote, 1, 0))
    assert here.raw == b"secret"


def _set_attribute(path: str) -> None:
    value = ctypes.create_string_buffer(b"escaped")
    arguments = struct.pack("QII", ctypes.addressof(value), 7, 0)
    _call("setxattrat", -100, path.encode(), 0, b"user.escaped", arguments, len(arguments))


def _open(path: str, flags: int = os.O_RDONLY) -> None:
    os.close(os.open(path, flags))


def _set_flag(path: str) -> None:
    """Have backups pass the file over, as `chattr +d` does."""
    with open(path, "rb") as file:
        flags = fcntl.ioctl(file, 0x80086601, bytes(8))
        fcntl.ioctl(file, 0x40086602, struct.pack("q", 0x40 | struct.unpack("q", flags)[0]))


def _thaw(path: str) -> None:
    with open(path, "rb") as file:
        try:
            fcntl.ioctl(file, 0xC0045878, 0)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise


def _in_thread(attempt: Callable[[], None]) -> None:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            attempt()
        except OSError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for error in caught:
        raise error


def attempts(at: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """What to try, by name; `at` says where: host, secret, model, folder, log_dir, sockets."""
    host, folder = at["host"], Path(at["folder"])
    secret, mine, model = at["secret"], folder / "mine", at["model"]
    inet, stream, datagram = socket.AF_INET, socket.SOCK_STREAM, socket.SOCK_DGRAM
    return {
        "read a file in the home directory": lambda: Path(secret).read_text(),
        "read it from another thread": lambda: _in_thread(lambda: _open(secret)),
        "open it with flags in memory": lambda: os.close(
            _call("openat2", -100, secret.encode(), struct.pack("QQQ", _NEITHER, 0, 0), 24)
        ),
        "read it through /proc/self/root": lambda: _open(f"/proc/self/root{secret}"),
        "list the home directory": lambda: os.listdir(Path(secret).parent),
        "read /etc/passwd": lambda: Path("/etc/passwd").read_text(),
        "write a file": lambda: _write(mine),
        "write beside the log": lambda: _write(Path(at["log_dir"], "other.log")),
        "append to a file": lambda: _open(secret, os.O_WRONLY | os.O_APPEND),
        "truncate a file": lambda: os.truncate(secret, 6),
        "truncate the model": lambda: _open(model, os.O_TRUNC),
        "truncate a file by opening it": lambda: _open(secret, _NEITHER | os.O_TRUNC),
        "open a file for neither reading nor writing": lambda: _open(secret, _NEITHER),
        "change flags of the model": lambda: _set_flag(model),
        "remove a file": lambda: os.remove(folder / "remove"),
        "rename a file": lambda: os.rename(folder / "rename", folder / "renamed"),
        "link a file": lambda: os.link(secret, folder / "link"),
        "make a folder": (folder / "made").mkdir,
        "make a symbolic link": lambda: os.symlink("/", folder / "symbolic"),
        "change a file's mode": lambda: os.chmod(secret, 0o600),
        "change a file's times": lambda: os.utime(secret),
        "set an attribute of a file": lambda: _set_attribute(secret),
        "remove an attribute of a file": lambda: _call(
            "removexattrat", -100, secret.encode(), 0, b"user.escaped"
        ),
        "change a file's flags": lambda: _call(
            "file_setattr", -100, secret.encode(), bytes(24), 24, 0
        ),
        # Root's; to thaw what is not frozen fails, but in another way.
        "freeze a file system": lambda: _thaw(model),
        "rename the machine": lambda: socket.sethostname(socket.gethostname()),
        "watch a file": lambda: _check(_libc.inotify_init1(0)),
        "connect by TCP": lambda: _connect(inet, stream, ("127.0.0.1", at["tcp"])),
        "send by UDP": lambda: _connect(inet, datagram, ("127.0.0.1", at["udp"])),
        "listen by TCP": lambda: socket.create_server(("127.0.0.1", 0)).close(),
        "connect to a local socket": lambda: _connect(socket.AF_UNIX, datagram, at["unix"]),
        "write from an inherited socket": lambda: _inherited(2).sendto(b"escaped", at["unix"]),
        "redirect an inherited socket": lambda: _inherited(2).connect(at["unix"]),
        "send a message from it": lambda: _inherited(2).sendmsg([b"escaped"], [], 0, at["unix"]),
        "make a pair of sockets": lambda: [s.close() for s in socket.socketpair()],
        "fork": _fork,
        "clone a process": _clone_process,
        "start a program": _spawn,
        "become a program": _execute,
        "attach to the host": lambda: _attach(host),
        "read the host's memory": lambda: _read_memory(host, at["address"]),
        "open the host's memory": lambda: _open(f"/proc/{host}/mem", os.O_RDWR),
        "read the host's environment": lambda: _open(f"/proc/{host}/environ"),
        "list the host's descriptors": lambda: os.listdir(f"/proc/{host}/fd"),
        "take a descriptor of the host": lambda: _call("pidfd_getfd", os.pidfd_open(host), 1, 0),
        "signal the host": lambda: os.kill(host, 0),
        "signal the host's group": lambda: os.killpg(os.getpgid(host), 0),
        "signal a thread of the host": lambda: _call("tgkill", host, host, 0),
        "signal it by thread id": lambda: _call("tkill", host, 0),
        "signal it by descriptor": lambda: _call(
            "pidfd_send_signal", os.pidfd_open(host), 0, None, 0
        ),
        # Nothing happens to it: the descriptor does not ask for signals.
        "have the host signalled": lambda: fcntl.fcntl(_inherited(2), fcntl.F_SETOWN, host),
        "have it signalled by type": lambda: fcntl.fcntl(
            _inherited(2), 15, struct.pack("ii", 1, host)
        ),
        "choose the signal": lambda: fcntl.fcntl(_inherited(2), 10, signal.SIGKILL),
        "have it signalled by ioctl": lambda: fcntl.ioctl(
            _inherited(2), 0x8901, struct.pack("i", host)
        ),
        "have it signalled by a socket": lambda: fcntl.ioctl(
            _inherited(2), 0x8902, struct.pack("i", host)
        ),
        "limit the host": lambda: resource.prlimit(host, resource.RLIMIT_NPROC, at["nproc"]),
        "slow the host down": lambda: os.setpriority(os.PRIO_PROCESS, host, 0),
        "compare with the host": lambda: _call("kcmp", os.getpid(), host, 2, 0, 0),
        "set up io_uring": lambda: os.close(_call("io_uring_setup", 1, bytes(120))),
        "load a BPF map": lambda: os.close(_call("bpf", 0, (ctypes.c_uint32 * 18)(2, 4, 4, 1), 72)),
        "count events": lambda: os.close(
            _call("perf_event_open", (ctypes.c_uint32 * 32)(1, 128), 0, -1, -1, 0)
        ),
        "handle page faults": lambda: os.close(_call("userfaultfd", 0)),
        "use the keyring": lambda: _call("keyctl", 0, -3, 1),
        "make System V memory": lambda: _check(_libc.shmget(0, 4096, 0o1600)),
        "make a namespace": lambda: _in_thread(lambda: _check(_libc.unshare(0x20000))),
    }


def escape(reply: Reply, payload: dict[str, Any], state: WorkerLoopState) -> None:
    """Say what became of each try: the error's name, or ``"succeeded"``."""
    outcomes = {}
    for name, attempt in attempts(payload).items():
        try:
            attempt()
        except OSError as error:
            outcomes[name] = errno.errorcode.get(error.errno or 0, repr(error))
        else:
            outcomes[name] = "succeeded"
    reply.send("outcomes", outcomes)


def facts(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """What the process looks like from inside."""
    own = Path("/proc/self")
    reply.send(
        "facts",
        {
            "environment": dict(os.environ),
            "descriptors": sorted(
                os.readlink(own / "fd" / fd).split(":")[0]
                for fd in os.listdir(own / "fd")
                if os.path.lexists(own / "fd" / fd)
            ),
            "threads": [
                dict(
                    line.split(":\t")
                    for line in (task / "status").read_text().splitlines()
                    if line.startswith(("Seccomp:", "NoNewPrivs:"))
                )
                for task in (own / "task").iterdir()
            ],
            "group": os.getpgid(0),
            "pid": os.getpid(),
            "core": resource.getrlimit(resource.RLIMIT_CORE),
            "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        },
    )


def read(reply: Reply, payload: str, state: WorkerLoopState) -> None:
    """The file's text, or the error's name."""
    try:
        reply.send("text", Path(payload).read_text())
    except OSError as error:
        reply.send("error", errno.errorcode[error.errno or 0])


HANDLERS: dict[str, KindHandler] = {"escape": escape, "facts": facts, "read": read}
