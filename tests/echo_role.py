"""A custom role for the tests: everything that a handler can do, good and bad."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from inferpool.errors import CallCancelled, ContextLengthExceeded, ModelError
from inferpool.worker import (
    KindHandler,
    Reply,
    RoleConfig,
    WorkerLoopState,
    report_loading,
    runtime,
)


class Session:
    """Says in the log when it is closed."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    def close(self) -> None:
        logging.getLogger("echo").info("session closed")
        if self.options.get("close_raises"):
            raise RuntimeError("close fails")
        time.sleep(self.options.get("close_seconds", 0))


def _wait_before_the_end(frame: Any, event: str, arg: Any) -> None:
    if event == "c_call" and arg.__name__ == "end":
        sys.setprofile(None)
        time.sleep(0.3)


def make_session(role_config: RoleConfig, abort: Any) -> Session:
    options = role_config.options
    if "exit" in options:
        os._exit(options["exit"])
    if "raise" in options:
        raise RuntimeError(options["raise"])
    if "garbage" in options:
        request, _ = runtime._loading.get()
        request.try_send([b"\xc1 is no message"])
        time.sleep(30)
    if "end_late" in options:
        sys.setprofile(_wait_before_the_end)
    began = time.monotonic()
    while time.monotonic() - began < options.get("load_seconds", 0) and not abort.is_set():
        report_loading((time.monotonic() - began) / options["load_seconds"])
        time.sleep(0.005)
    return Session(dict(options))


def echo(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    report_loading(0.5)  # too late, and so without effect
    reply.send("echo", payload)


def count(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """Send 0, 1, ... up to the payload; with None, without end."""
    number = 0
    while payload is None or number < payload:
        reply.send("number", number)
        number += 1


def count_united(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """Count until a union of abort tokens is set; the session remembers when that was."""
    both = reply.abort.union(reply.abort).union(reply.abort)
    number = 0
    while not both.is_set():
        reply.send("number", number)
        number += 1
    cast(Session, state.session).options["stopped_at"] = number


def tagged(reply: Reply, payload: list[int], state: WorkerLoopState) -> None:
    """Send so many items that say whose they are: process, tag of the call, place in the answer."""
    tag, items = payload
    for index in range(items):
        reply.send("tagged", [os.getpid(), tag, index])


def sized(reply: Reply, payload: list[int], state: WorkerLoopState) -> None:
    """Send one bytes object of each size, filled with its index."""
    for index, size in enumerate(payload):
        reply.send("bytes", bytes([index % 256]) * size)


def flood(reply: Reply, payload: int, state: WorkerLoopState) -> None:
    """Send bytes of so much size without end."""
    while True:
        reply.send("bytes", bytes(payload))


def half(reply: Reply, payload: list[str], state: WorkerLoopState) -> None:
    """Stop amid an item that is larger than the ring, make a file, and do what the payload says."""
    then, mark = payload
    time.sleep(0.05)  # whoever spins for the answer has given that up
    assert not reply.try_send("item", b"x" * (16 << 20))
    Path(mark).touch()
    if then == "raise":
        raise RuntimeError("amid an item")
    if then == "send another":
        reply.send("item", b"y")


def nothing(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """End without an item."""


def hold_gil(reply: Reply, payload: float, state: WorkerLoopState) -> None:
    """Keep the GIL for so many seconds: `PyDLL` does not release it."""
    ctypes.PyDLL(None).usleep(int(payload * 1e6))
    reply.send("held", payload)


def wait_for_abort(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """Send one item, then poll the abort token natively until it is set."""
    poll = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(reply.abort.callback)
    reply.send("waiting", None)
    while not poll(reply.abort.data):
        time.sleep(0.001)
    raise CallCancelled("aborted")


def sleep(reply: Reply, payload: float, state: WorkerLoopState) -> None:
    time.sleep(payload)
    reply.send("slept", payload)


class Detailed(Exception):
    def __init__(self) -> None:
        super().__init__("detailed")
        self.details = {"cannot": object()}


def raise_(reply: Reply, payload: str, state: WorkerLoopState) -> None:
    errors: dict[str, Callable[[], BaseException]] = {
        "value": lambda: ValueError("wrong \udcff value"),
        "exit": lambda: SystemExit(3),
        "interrupt": KeyboardInterrupt,
        "detailed": Detailed,
        "model": lambda: ModelError("no more ideas"),
        "context": lambda: ContextLengthExceeded("too long", asked=9, context=8),
        "long": lambda: ValueError("x" * 2_000_000),
    }
    error = errors[payload]
    raise error()


def unencodable(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    reply.send("set", {1, 2})


def die(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """Send what came with the signal's name, then die of that signal."""
    reply.send("last words", payload["words"])
    print("native last words", flush=True)
    os.kill(os.getpid(), getattr(signal, payload["signal"]))
    time.sleep(30)


def be_killed(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def scribble(reply: Reply, payload: str, state: WorkerLoopState) -> None:
    """Do what a worker that was taken over might: write where it must not, and say what is wrong.

    Where things are: docs/transport.md, "The segment".
    """
    maps = Path("/proc/self/maps").read_text().splitlines()
    segment = next(line for line in maps if re.search(r"inferpool\S* \(deleted\)", line))
    start, end = (int(address, 16) for address in segment.split()[0].split("-"))
    tail = ctypes.c_uint64.from_address(start + 4608)
    _, control, bell, _ = json.loads(sys.argv[1])["fds"]
    if payload == "rings":
        socket.socket(fileno=os.dup(bell)).send(b"!" * 4096)
    elif payload == "answers to no question":
        socket.socket(fileno=os.dup(control)).send(struct.pack("<II5Q", 2, 0, 999, 0, 0, 0, 0))
    elif payload == "garbage on the control socket":
        socket.socket(fileno=os.dup(control)).send(b"garbage")
    elif payload == "descriptors without end":
        message = [struct.pack("<II5Q", 4, 0, 999, 0, 0, 0, 0)]
        for _ in range(10):
            with contextlib.suppress(PermissionError):  # refused, from Linux 6.16 on
                socket.send_fds(socket.socket(fileno=os.dup(control)), message, [2] * 200)
        socket.socket(fileno=os.dup(control)).send(*message)
    elif payload == "noise":
        noise = random.Random(0)
        while True:
            at = noise.choice([noise.randrange(4096, 8192), noise.randrange(end - start)])
            ctypes.memset(start + at, noise.randrange(256), 1)
    else:
        record = start + 24576 + (4 << 20) + tail.value % (4 << 20)
        ctypes.memset(record, 0xFF if payload == "ones" else 0, 64)
        steps = {"far ahead": 1 << 40, "misaligned": 1, "backwards": -32}
        tail.value += steps.get(payload, 64)
    time.sleep(60)


def devour(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """Take memory until the kernel ends that; it shall choose this process, not the host."""
    Path("/proc/self/oom_score_adj").write_text("1000")
    held = []
    while True:
        held.append(b"x" * (8 << 20))


def hang_up(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """Close the doorbell, as the kernel does for a process that ends, and live on."""
    bell = json.loads(sys.argv[1])["fds"][2]
    socket.socket(fileno=os.dup(bell)).shutdown(socket.SHUT_RDWR)
    time.sleep(60)


def exit_now(reply: Reply, payload: int, state: WorkerLoopState) -> None:
    os._exit(payload)


def assert_(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """Break an assertion of ggml's, on a thread of its own if the payload says so."""
    from inferpool.engine.backend import init_backend, lib

    init_backend()
    lib._lib.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    if payload:
        threading.Thread(target=lib._lib.ggml_backend_dev_get, args=[9999]).start()
        time.sleep(30)
    lib._lib.ggml_backend_dev_get(9999)


def exit_once(reply: Reply, payload: str, state: WorkerLoopState) -> None:
    """Exit, unless there is such a file already."""
    try:
        Path(payload).touch(exist_ok=False)
    except FileExistsError:
        reply.send("answer", "answer")
    else:
        os._exit(3)


def poll_for(reply: Reply, payload: float, state: WorkerLoopState) -> None:
    """Look at the abort token for so many seconds, and do nothing else."""
    until = time.monotonic() + payload
    while time.monotonic() < until:
        reply.abort.is_set()
        time.sleep(0.01)
    reply.send("polled", payload)


def compute(reply: Reply, payload: dict[str, Any], state: WorkerLoopState) -> None:
    """Use so many seconds of one CPU without a sign of progress."""
    os.sched_setaffinity(0, {payload["cpu"]})
    until = time.thread_time() + payload["seconds"]
    while time.thread_time() < until:
        pass
    reply.send("computed", "answer")


def environment(reply: Reply, payload: str, state: WorkerLoopState) -> None:
    reply.send("environment", os.environ.get(payload))


def facts(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """What the worker process looks like from inside."""
    reply.send(
        "facts",
        {
            "pid": os.getpid(),
            "stdin": os.readlink("/proc/self/fd/0"),
            "stdout": os.readlink("/proc/self/fd/1"),
            "served": state.served,
            "dropped": state.dropped,
            "role": state.role_config.role,
            "options": cast(Session, state.session).options,
            "modules": [name for name in sys.modules if name.startswith("inferpool.host")],
            "numpy": "numpy" in sys.modules,
        },
    )


def inherited(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """What a program sees that is started as by ``os.system``; the 3 is its own."""
    command = ["ls", "/proc/self/fd"]
    done = subprocess.run(command, close_fds=False, capture_output=True, text=True, check=True)
    reply.send("descriptors", done.stdout.split())


def fork(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """Fork a process that comes back from here in some way, and tell its exit status."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        reply.send("status", os.waitstatus_to_exitcode(status))
    elif payload == "exit":
        sys.exit(7)
    elif payload == "raise":
        raise RuntimeError("in the child")


def note_signals(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """Note from now on what is held back while a handler of SIGUSR1 runs, in the session."""
    masks = cast(Session, state.session).options["masks"] = []

    def note(*_: object) -> None:
        masks.append(len(signal.pthread_sigmask(signal.SIG_BLOCK, [])))

    signal.signal(signal.SIGUSR1, note)


def close_streams(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    sys.stdout.close()
    os.close(2)
    reply.send("closed", None)


def print_(reply: Reply, payload: str, state: WorkerLoopState) -> None:
    os.write(2, payload.encode() + b"\n")
    reply.send("printed", None)


def chatter(reply: Reply, payload: int, state: WorkerLoopState) -> None:
    """Write so many bytes to the log, half through logging, half as native prints."""
    for _ in range(payload // 2000):
        os.write(2, b"n" * 999 + b"\n")
        logging.getLogger("echo").info("p" * 999)
    reply.send("size", os.fstat(2).st_size)


async def echo_later(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """What no handler can be."""


LAZY_HANDLERS = {"echo": echo_later}
HANDLERS: dict[str, KindHandler] = {
    "echo": echo,
    "count": count,
    "count_united": count_united,
    "tagged": tagged,
    "sized": sized,
    "flood": flood,
    "half": half,
    "nothing": nothing,
    "hold_gil": hold_gil,
    "wait_for_abort": wait_for_abort,
    "sleep": sleep,
    "raise": raise_,
    "unencodable": unencodable,
    "die": die,
    "be_killed": be_killed,
    "scribble": scribble,
    "devour": devour,
    "exit": exit_now,
    "hang_up": hang_up,
    "exit_once": exit_once,
    "assert": assert_,
    "poll_for": poll_for,
    "compute": compute,
    "environment": environment,
    "facts": facts,
    "fork": fork,
    "inherited": inherited,
    "note_signals": note_signals,
    "close_streams": close_streams,
    "chatter": chatter,
    "print": print_,
}
