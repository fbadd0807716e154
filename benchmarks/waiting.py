"""What waiting costs, and what is heard from a worker whose Python is busy."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.measure import Row, interleaved, seconds, summed
from benchmarks.transport import ECHO
from inferpool import ChatConfig, Pool, WorkerCrashed


def _hold_gil(span: float) -> None:
    ctypes.PyDLL(None).usleep(int(span * 1e6))


def _beat(connection: Connection, span: float) -> None:
    def answer() -> None:
        with contextlib.suppress(EOFError):
            while True:
                connection.send(connection.recv())

    threading.Thread(target=answer, daemon=True).start()
    connection.send("ready")
    time.sleep(0.5)
    _hold_gil(span)
    time.sleep(1)


@contextmanager
def busy(processes: int) -> Iterator[None]:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


INTERVAL = 0.002
"""Seconds between two pings."""


def _as_asked(times: list[float]) -> list[float]:
    """What somebody would have seen who asks every `INTERVAL`, whether or not the last question
    was answered: while one waits, later ones would have waited too (coordinated omission,
    https://github.com/HdrHistogram/HdrHistogram#corrected-vs-raw-value-recording-calls)."""
    seen: list[float] = []
    for time_taken in times:
        left = time_taken
        while left > 0:
            seen.append(left)
            left -= INTERVAL
    return seen


def _pings(pool: Pool, span: float) -> list[float]:
    stream = pool.stream("echo", "hold_gil", span)
    times: list[float] = []
    ended = time.monotonic() + span * 0.9
    while time.monotonic() < ended:
        times.append(pool.ping())
        time.sleep(INTERVAL)
    stream.close()
    return times


def _beats_of_a_thread(span: float) -> list[float]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_beat, args=(theirs, span), daemon=True)
    process.start()
    ours.recv()
    times: list[float] = []
    ended = time.monotonic() + span
    while time.monotonic() < ended:
        times.append(seconds(lambda: (ours.send(None), ours.recv())))
        time.sleep(INTERVAL)
    process.kill()
    process.join()
    return times


def liveness(*, quick: bool) -> list[Row]:
    """Pings during a handler that holds the GIL, and the way from a kill to its error."""
    span = 2.0 if quick else 10.0
    rows: list[Row] = []
    for load, processes in (("", 0), (", 4 times the CPUs busy", 4 * (os.cpu_count() or 1))):
        with Pool(echo=ECHO) as pool, busy(processes):
            pool.start()
            ours, theirs = _as_asked(_pings(pool, span)), _as_asked(_beats_of_a_thread(span))
        name = f"ping while Python is held for {span:g} s{load}"
        ratio = statistics.median(ours) / statistics.median(theirs)
        rows.append(summed(name, "a Python thread's heartbeat", theirs))
        rows.append(summed(name, "inferpool", ours, ratio=ratio))
        high = sorted(ours)[int(len(ours) * 0.999)]
        print(f"{name}: p99.9 {high * 1e3:.3g} ms, max {max(ours) * 1e3:.3g} ms", file=sys.stderr)
    return [*rows, summed("SIGKILL to WorkerCrashed", "inferpool", _kills(10 if quick else 200))]


def _kills(number: int) -> list[float]:
    times: list[float] = []
    with Pool(echo=ECHO) as pool:
        for _ in range(number):
            pid = pool.start().status()["echo"].pid
            assert pid is not None
            began = [0.0]

            def kill(pid: int = pid, began: list[float] = began) -> None:
                began[0] = time.perf_counter()
                os.kill(pid, signal.SIGKILL)

            timer = threading.Timer(0.02, kill)
            timer.start()
            try:
                pool.call("echo", "sleep", 10)
            except WorkerCrashed:
                times.append(time.perf_counter() - began[0])
            timer.join()
            pool.reset("echo")  # so many crashes would have the role rest
    return times


def _switches(pid: int) -> int:
    total = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        for line in status.read_text().splitlines():
            if "ctxt_switches" in line:
                total += int(line.split()[1])
    return total


def spinning(*, quick: bool) -> list[Row]:
    """What the spins of a caller and of the worker's own threads cost a model on every CPU."""
    tokens = 32 if quick else 128
    config = ChatConfig("smollm2", n_ctx=1024, n_threads=os.cpu_count() or 1)

    def per_token(pool: Pool) -> float:
        began = time.perf_counter()
        stream = pool.chat.stream("Count to one thousand.", max_tokens=tokens, temperature=0)
        number = sum(1 for _ in stream)
        return (time.perf_counter() - began) / number

    with Pool(chat=config, wait="park") as parked, Pool(chat=config) as adaptive:
        contenders = {
            "wait='park'": lambda: per_token(parked.start()),
            "wait='adaptive'": lambda: per_token(adaptive.start()),
        }
        name = "SmolLM2 Q4_1, a token of a stream, all CPUs decoding"
        return interleaved(name, contenders, rounds=3 if quick else 9, repeats=1, unit="s")


def idle(*, quick: bool) -> list[Row]:
    """Prints what an idle pool and a blocked caller do; there is nothing to compare."""
    span = 2.0 if quick else 10.0
    with Pool(a=ECHO, b=ECHO, c=ECHO, d=ECHO) as pool:
        pool.start()
        time.sleep(0.5)
        pids = [status.pid for status in pool.status().values() if status.pid is not None]
        before = {pid: _switches(pid) for pid in [os.getpid(), *pids]}
        time.sleep(span)
        # This thread's own sleep is one switch, and the only one that is not the pool's.
        after = {pid: _switches(pid) - before[pid] for pid in before}
        workers = sum(after[pid] for pid in pids)
        host = after[os.getpid()] - 1
        print(f"idle for {span:g} s: context switches: host {host}, 4 workers {workers}")
        used = time.process_time()
        pool.call("a", "sleep", span / 2)
        share = (time.process_time() - used) / (span / 2)
        print(f"a caller blocked for {span / 2:g} s uses {share:.3%} of a CPU")
    return []
