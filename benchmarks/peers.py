"""Other ways for two Python processes to talk, each as a round trip that takes and gives a payload.

A payload is `bytes`, or a numpy array of uint8 that arrives as an array of its own. Run as a
program, this is the process at the other end.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

__all__ = ["bridge", "copies", "eventfd", "futex", "iceoryx", "pipe", "zeromq"]

RoundTrip = Callable[[Any], Any]
Turn = Callable[[], AbstractContextManager[None]]

_SYS_FUTEX = 202  # x86_64, /usr/include/asm/unistd_64.h
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1  # /usr/include/linux/futex.h


@contextmanager
def _process(*arguments: str, fds: tuple[int, ...] = ()) -> Iterator[int]:
    command = [sys.executable, "-m", "benchmarks.peers", *arguments]
    process = subprocess.Popen(command, pass_fds=fds)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


@contextmanager
def pipe() -> Iterator[Connection]:
    """``multiprocessing.Pipe``: pickle through a pair of sockets."""
    ours, theirs = multiprocessing.Pipe()
    with _process("pipe", str(theirs.fileno()), fds=(theirs.fileno(),)):
        theirs.close()
        yield ours


def _serve_pipe(fd: str) -> None:
    connection = Connection(int(fd))
    while True:
        message = connection.recv()
        if isinstance(message, tuple):
            number, item = message
            for _ in range(number):
                connection.send(item)
        else:
            connection.send(message)


@contextmanager
def bridge(round_trip: RoundTrip) -> Iterator[RoundTrip]:
    """A blocking round trip behind asyncio and an executor, called from a thread: the loop runs
    in a thread of its own, as in programs with a synchronous face and an asynchronous core."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        with ThreadPoolExecutor(1) as executor:

            async def call(payload: Any) -> Any:
                return await loop.run_in_executor(executor, round_trip, payload)

            yield lambda payload: asyncio.run_coroutine_threadsafe(call(payload), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def zeromq() -> Iterator[RoundTrip]:
    """A PAIR of pyzmq sockets over ipc."""
    import zmq

    with tempfile.TemporaryDirectory() as folder, zmq.Context() as context:
        address = f"ipc://{folder}/pair"
        with _process("zeromq", address), context.socket(zmq.PAIR) as socket:
            socket.linger = 0
            socket.connect(address)

            def round_trip(payload: Any) -> Any:
                socket.send(payload)
                answer = socket.recv()
                return answer if isinstance(payload, bytes) else np.frombuffer(answer, np.uint8)

            yield round_trip


def _serve_zeromq(address: str) -> None:
    import zmq

    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.bind(address)
        while True:
            socket.send(socket.recv())


class _Iceoryx:
    """One side of two publish-subscribe services and two events."""

    def __init__(self, name: str, ours: str, theirs: str, size: int) -> None:
        import iceoryx2

        iceoryx2.set_log_level(iceoryx2.LogLevel.Error)
        self._node = iceoryx2.NodeBuilder.new().create(iceoryx2.ServiceType.Ipc)

        def service(end: str) -> Any:
            return self._node.service_builder(iceoryx2.ServiceName.new(f"{name}/{end}"))

        def publishing(end: str) -> Any:
            slices = iceoryx2.Slice[ctypes.c_uint8]
            return service(end).publish_subscribe(slices).open_or_create()

        self._publisher = publishing(ours).publisher_builder().initial_max_slice_len(size).create()
        self._subscriber = publishing(theirs).subscriber_builder().create()
        event = service(f"{ours}-event").event().open_or_create()
        self._notifier = event.notifier_builder().create()
        event = service(f"{theirs}-event").event().open_or_create()
        self._listener = event.listener_builder().create()

    def send(self, payload: Any, *, notify: bool) -> None:
        sample = self._publisher.loan_slice_uninit(len(payload))
        source = payload if isinstance(payload, bytes) else payload.ctypes.data
        ctypes.memmove(sample.payload().as_ptr(), source, len(payload))
        sample.assume_init().send()
        if notify:
            self._notifier.notify()

    def receive(self, *, wait: bool, array: bool) -> Any:
        while (sample := self._subscriber.receive()) is None:
            if wait:
                self._listener.blocking_wait()
        payload = sample.payload()
        size = payload.len()
        if not array:
            return ctypes.string_at(payload.as_ptr(), size)
        answer = np.empty(size, np.uint8)
        ctypes.memmove(answer.ctypes.data, payload.as_ptr(), size)
        return answer


@contextmanager
def _running(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGCONT)
    yield
    os.kill(pid, signal.SIGSTOP)


@contextmanager
def iceoryx(size: int, *, events: bool) -> Iterator[tuple[RoundTrip, Turn]]:
    """iceoryx2, polling or woken by its events; payloads are copied in and out.

    With it comes what a turn of it has to run in: a process that polls would take a CPU from
    everybody else's.
    """
    name = f"inferpool-benchmark-{os.getpid()}-{size}-{events}"
    end = _Iceoryx(name, "ask", "answer", size)
    with _process("iceoryx", name, str(size), "events" if events else "polling") as pid:

        def round_trip(payload: Any) -> Any:
            end.send(payload, notify=events)
            return end.receive(wait=events, array=not isinstance(payload, bytes))

        # What is published before the other side subscribes is lost.
        time.sleep(1)
        yield round_trip, nullcontext if events else lambda: _running(pid)


def _serve_iceoryx(name: str, size: str, mode: str) -> None:
    end = _Iceoryx(name, "answer", "ask", int(size))
    events = mode == "events"
    while True:
        end.send(end.receive(wait=events, array=int(size) > 4096), notify=events)


@contextmanager
def eventfd() -> Iterator[Callable[[], None]]:
    """The limit of whoever sleeps: two eventfds, nothing carried."""
    ask, answer = os.eventfd(0), os.eventfd(0)
    with _process("eventfd", str(ask), str(answer), fds=(ask, answer)):

        def round_trip() -> None:
            os.eventfd_write(ask, 1)
            os.eventfd_read(answer)

        yield round_trip
    os.close(ask)
    os.close(answer)


def _serve_eventfd(ask: str, answer: str) -> None:
    while True:
        os.eventfd_read(int(ask))
        os.eventfd_write(int(answer), 1)


class _Futex:
    """Two words of shared memory that are waited on."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, mmap.PAGESIZE)
        self._words = [ctypes.c_uint32.from_buffer(self._memory, at) for at in (0, 128)]
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall

    def post(self, word: int) -> None:
        self._words[word].value = 1
        self._call(word, _FUTEX_WAKE, 1)

    def take(self, word: int) -> None:
        while self._words[word].value == 0:
            self._call(word, _FUTEX_WAIT, 0)
        self._words[word].value = 0

    def _call(self, word: int, operation: int, value: int) -> None:
        self._syscall(_SYS_FUTEX, ctypes.byref(self._words[word]), operation, value, None, None, 0)


@contextmanager
def futex() -> Iterator[Callable[[], None]]:
    """The same by futexes."""
    fd = os.memfd_create("benchmark")
    os.ftruncate(fd, mmap.PAGESIZE)
    end = _Futex(fd)
    with _process("futex", str(fd), fds=(fd,)):

        def round_trip() -> None:
            end.post(0)
            end.take(1)

        yield round_trip
    os.close(fd)


def _serve_futex(fd: str) -> None:
    end = _Futex(int(fd))
    while True:
        end.take(0)
        end.post(1)


def copies(size: int) -> Callable[[], None]:
    """The limit of whoever copies in and out, both ways: four copies."""
    source, target = np.zeros(size, np.uint8), np.zeros(size, np.uint8)

    def copy() -> None:
        for _ in range(4):
            np.copyto(target, source)

    return copy


_SERVERS: dict[str, Callable[..., None]] = {
    "pipe": _serve_pipe,
    "zeromq": _serve_zeromq,
    "iceoryx": _serve_iceoryx,
    "eventfd": _serve_eventfd,
    "futex": _serve_futex,
}

if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, EOFError, ConnectionError):
        _SERVERS[sys.argv[1]](*sys.argv[2:])
