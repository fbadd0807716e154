"""Round trips and streams between two Python processes."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.measure import Row, interleaved, seconds
from inferpool import Pool, Role

ECHO = Role("benchmarks.echo_role:make_session", "benchmarks.echo_role:HANDLERS")
SMALL = b"x" * 64


@contextmanager
def _pool(**options: Any) -> Iterator[Pool]:
    with Pool(echo=ECHO, **options) as pool:
        yield pool.start()


def _timed(round_trip: Callable[[Any], Any], payload: Any) -> Callable[[], float]:
    """Seconds of a round trip; the answer is checked once, before anything is measured."""
    if not np.array_equal(round_trip(payload), payload):
        raise AssertionError("the answer is not what was sent")
    return lambda: seconds(lambda: round_trip(payload))


def _round_trips(size: int, payload: Any, *, rounds: int, repeats: int) -> list[Row]:
    with ExitStack() as stack:
        enter = stack.enter_context
        pipe = enter(peers.pipe())

        def through_pipe(sent: Any) -> Any:
            pipe.send(sent)
            return pipe.recv()

        pool, parked = enter(_pool()), enter(_pool(wait="park"))
        round_trips: dict[str, Callable[[Any], Any]] = {
            "mp.Pipe": through_pipe,
            "mp.Pipe, asyncio + executor, sync facade": enter(peers.bridge(through_pipe)),
            "inferpool": lambda sent: pool.call("echo", "echo", sent),
            "inferpool, wait='park'": lambda sent: parked.call("echo", "echo", sent),
        }
        turns: dict[str, peers.Turn] = {}
        contenders = {name: _timed(call, payload) for name, call in round_trips.items()}
        try:
            contenders["pyzmq PAIR, ipc"] = _timed(enter(peers.zeromq()), payload)
            for name, events in (("iceoryx2, polling", False), ("iceoryx2, events", True)):
                call, turns[name] = enter(peers.iceoryx(size, events=events))
                contenders[name] = _timed(call, payload)
                with turns[name]():
                    pass
        except ImportError as error:
            print(f"left out: {error}", file=sys.stderr)
        if size > 64:
            copy = peers.copies(size)
            contenders["limit: 4 copies"] = lambda: seconds(copy)
        label = f"{size} B" if size <= 64 else f"{size >> 20} MiB"
        name = f"round trip, {label}"
        return interleaved(name, contenders, rounds=rounds, repeats=repeats, unit="s", turns=turns)


@contextmanager
def _on(cpu: int) -> Iterator[None]:
    """Runs on one CPU, as do the processes that are started meanwhile."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _sleepers(*, rounds: int, repeats: int) -> list[Row]:
    """Sleepers on CPUs of our choice: left alone, the scheduler puts one pair together, where a
    wake-up costs two microseconds, and another apart, where it costs thirty."""
    ours, *others = sorted(os.sched_getaffinity(0))
    rows: list[Row] = []
    for label, theirs in (("one CPU", ours), *(("two CPUs", other) for other in others[:1])):
        with ExitStack() as stack:
            with _on(theirs):
                bare = {
                    f"limit: {name} ping-pong": stack.enter_context(limit())
                    for name, limit in (("eventfd", peers.eventfd), ("futex", peers.futex))
                }
                pool = stack.enter_context(_pool(wait="park"))
            contenders = {name: partial(seconds, trip) for name, trip in bare.items()}
            contenders["inferpool, wait='park'"] = _timed(partial(pool.call, "echo", "echo"), SMALL)
            stack.enter_context(_on(ours))
            name = f"round trip of sleepers on {label}, 64 B"
            rows += interleaved(name, contenders, rounds=rounds, repeats=repeats, unit="s")
    return rows


def _asyncio(*, rounds: int, turns: int) -> list[Row]:
    with (
        peers.pipe() as pipe,
        _pool() as pool,
        ThreadPoolExecutor(1) as executor,
        asyncio.Runner() as runner,
    ):
        shared = pool.as_async()

        def through_pipe(sent: bytes) -> Any:
            pipe.send(sent)
            return pipe.recv()

        async def bridged() -> None:
            loop = asyncio.get_running_loop()
            for _ in range(turns):
                await loop.run_in_executor(executor, through_pipe, SMALL)

        async def pooled() -> None:
            for _ in range(turns):
                await shared.call("echo", "echo", SMALL)

        def per_turn(main: Callable[[], Any]) -> float:
            return seconds(lambda: runner.run(main())) / turns

        contenders = {
            "mp.Pipe, executor": lambda: per_turn(bridged),
            "inferpool": lambda: per_turn(pooled),
        }
        name = "asyncio round trip, 64 B"
        return interleaved(name, contenders, rounds=rounds, repeats=3, unit="s")


def _stream(*, rounds: int, items: int) -> list[Row]:
    item = b"x" * 32
    with peers.pipe() as pipe, _pool() as pool:

        def of_pipe() -> None:
            pipe.send((items, item))
            for _ in range(items):
                pipe.recv()

        def of_pool() -> None:
            for _ in pool.stream("echo", "count", (items, item)):
                pass

        contenders = {
            "mp.Pipe": lambda: seconds(of_pipe) / items,
            "inferpool": lambda: seconds(of_pool) / items,
        }
        name = f"one of {items:,} items of a stream, 32 B"
        rows = interleaved(name, contenders, rounds=rounds, repeats=1, unit="s")
        _print_rescued(name, pool)
        return rows


def _print_rescued(what: str, pool: Pool) -> None:
    counters = pool.status()["echo"].counters
    frames = counters["frames_sent"] + counters["frames_received"]
    print(
        f"{what}: {counters['rescued_waits']} rescued waits in {frames:,} frames", file=sys.stderr
    )


def _threads(*, rounds: int, calls: int) -> list[Row]:
    rows: list[Row] = []
    # A sleeping caller takes ten times as long.
    for wait, number in (("adaptive", calls), ("park", calls // 10)):
        with _pool(wait=wait) as pool:

            def rate(threads: int, pool: Pool = pool, calls: int = number) -> float:
                def work() -> None:
                    for _ in range(calls // threads):
                        pool.call("echo", "echo", SMALL)

                def together() -> None:
                    workers = [threading.Thread(target=work) for _ in range(threads)]
                    for worker in workers:
                        worker.start()
                    for worker in workers:
                        worker.join()

                return seconds(together) / calls

            contenders = {
                f"{number} threads": lambda number=number: rate(number) for number in (1, 2, 8)
            }
            name = f"a call of several threads, wait={wait!r}"
            rows += interleaved(name, contenders, rounds=rounds, repeats=1, unit="s")
            _print_rescued(name, pool)
    return rows


def run(*, quick: bool) -> list[Row]:
    """All transport comparisons; the pipe is the measure."""
    rounds = 3 if quick else 15
    rows: list[Row] = []
    rows += _round_trips(64, SMALL, rounds=rounds, repeats=300)
    for size, repeats in ((1 << 20, 30), (16 << 20, 3)):
        rows += _round_trips(size, np.zeros(size, np.uint8), rounds=rounds, repeats=repeats)
    rows += _sleepers(rounds=rounds, repeats=300)
    rows += _asyncio(rounds=rounds, turns=100)
    rows += _stream(rounds=3 if quick else 5, items=50_000 if quick else 1_000_000)
    rows += _threads(rounds=rounds, calls=4_000 if quick else 40_000)
    return rows
