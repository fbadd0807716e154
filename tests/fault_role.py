"""A custom role that goes wrong on demand, in every way and in every phase of its life.

Options and payloads are ``{"fault": name, "phase": phase, "mark": path}``; the file ``mark``
appears when the phase has been reached.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inferpool.errors import CallCancelled
from inferpool.worker import KindHandler, Reply, RoleConfig, WorkerLoopState

LARGE = 16 << 20
"""Bytes of a reply that is larger than the ring."""


def _overflow_the_stack() -> None:
    # glibc compiles what is in parentheses by recursion. Python's own has limits of its own.
    regex = ctypes.create_string_buffer(256)
    ctypes.CDLL(None).regcomp(regex, b"(" * (1 << 20), 1)


def _allocate() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), limit[1]))
    held = []
    try:
        while True:
            held.append(bytearray(16 << 20))
    finally:
        held.clear()
        resource.setrlimit(resource.RLIMIT_AS, limit)


def _raise(error: BaseException) -> None:
    raise error


FAULTS: dict[str, Callable[[], object]] = {
    "_exit(0)": lambda: os._exit(0),
    "exit(0) from C": lambda: ctypes.CDLL(None).exit(0),
    "abort()": os.abort,
    "null pointer": lambda: ctypes.string_at(0),
    "stack overflow": _overflow_the_stack,
    "allocation until RLIMIT_AS": _allocate,
    "hang without the GIL": lambda: ctypes.CDLL(None).sleep(1000),
    "hang with the GIL": lambda: ctypes.PyDLL(None).sleep(1000),
    "Exception": lambda: _raise(Exception("fault")),
    "KeyboardInterrupt": lambda: _raise(KeyboardInterrupt()),
    "SystemExit": lambda: _raise(SystemExit(0)),
}


def _mark(where: dict[str, Any]) -> None:
    if "mark" in where:
        Path(where["mark"]).touch()


class Session:
    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    def close(self) -> None:
        if self.options.get("phase") == "closing":
            _mark(self.options)
            if "fault" in self.options:
                FAULTS[self.options["fault"]]()
            time.sleep(self.options.get("seconds", 0))


def make_session(role_config: RoleConfig, abort: Any) -> Session:
    options = dict(role_config.options)
    # Once: the next worker shall be a good one.
    if options.get("phase") == "loading" and not os.path.exists(options["mark"]):
        _mark(options)
        if "fault" in options:
            FAULTS[options["fault"]]()
        until = time.monotonic() + options.get("seconds", 0)
        while time.monotonic() < until and not abort.is_set():
            time.sleep(0.005)
    return Session(options)


def echo(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    reply.send("echo", payload)


def request(reply: Reply, payload: dict[str, Any], state: WorkerLoopState) -> None:
    """Go wrong, or wait to be wronged."""
    _mark(payload)
    if payload.get("fault") == "unencodable reply":
        reply.send("set", {1})
    elif "fault" in payload:
        FAULTS[payload["fault"]]()
    else:
        time.sleep(payload["seconds"])
    reply.send("answer", "answer")


def stream(reply: Reply, payload: dict[str, Any], state: WorkerLoopState) -> None:
    """Three items, what `request` does, and one more item."""
    for number in range(3):
        reply.send("number", number)
    request(reply, payload, state)


def large(reply: Reply, payload: dict[str, Any], state: WorkerLoopState) -> None:
    """A reply larger than the ring, while a thread goes wrong."""
    _start_thread(payload)
    reply.send("bytes", b"x" * LARGE)


def idle(reply: Reply, payload: dict[str, Any], state: WorkerLoopState) -> None:
    """Go wrong after the answer."""
    reply.send("answer", None)
    _start_thread(payload)


def _start_thread(payload: dict[str, Any]) -> None:
    def run() -> None:
        time.sleep(0.3)
        _mark(payload)
        if "fault" in payload:
            FAULTS[payload["fault"]]()

    threading.Thread(target=run, daemon=True).start()


def count(reply: Reply, payload: None, state: WorkerLoopState) -> None:
    number = 0
    while True:
        reply.send("number", number)
        number += 1
        time.sleep(0.001)


def numbers(reply: Reply, payload: int, state: WorkerLoopState) -> None:
    for number in range(payload):
        reply.send("number", number)


def poll(reply: Reply, payload: dict[str, Any], state: WorkerLoopState) -> None:
    """Work for so many seconds: look at the abort token, as native code would."""
    _mark(payload)
    until = time.monotonic() + payload["seconds"]
    while time.monotonic() < until:
        if reply.abort.is_set():
            raise CallCancelled("aborted")
        time.sleep(0.005)
    reply.send("answer", "answer")


def chatter(reply: Reply, payload: int, state: WorkerLoopState) -> None:
    """Write so many lines to the log, by logging and by print."""
    for number in range(payload):
        logging.getLogger("chatter").info("line %d", number)
        with contextlib.suppress(OSError):
            os.write(2, b"native line\n")
    reply.send("lines", payload)


HANDLERS: dict[str, KindHandler] = {
    "echo": echo,
    "request": request,
    "stream": stream,
    "large": large,
    "idle": idle,
    "count": count,
    "numbers": numbers,
    "poll": poll,
    "chatter": chatter,
}
