"""Round trips and streams between two Python processes."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection

import numpy as np

from benchmarks.measure import Row, interleaved, seconds
from inferpool import AsyncPool, Pool, Role

ECHO = Role("benchmarks.echo_role:make_session", "benchmarks.echo_role:HANDLERS")


def _pipe_worker(connection: Connection) -> None:
    while (message := connection.recv()) is not None:
        if isinstance(message, tuple):
            number, item = message
            for _ in range(number):
                connection.send(item)
        else:
            connection.send(message)


@contextmanager
def _pipe() -> Iterator[Connection]:
    """A process behind ``multiprocessing.Pipe``, as pickle and pipes have it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_pipe_worker, args=(theirs,), daemon=True)
    process.start()
    try:
        yield ours
    finally:
        ours.send(None)
        process.join()


def run(*, quick: bool) -> list[Row]:
    """All transport comparisons; the pipe is the measure."""
    rounds = 3 if quick else 15
    with (
        _pipe() as pipe,
        Pool(echo=ECHO) as pool,
        Pool(echo=ECHO, wait="park") as parked,
        ThreadPoolExecutor(1) as executor,
        asyncio.Runner() as runner,
    ):
        pool.start()
        parked.start()
        shared = pool.as_async()

        def through_pipe(payload: object) -> object:
            pipe.send(payload)
            return pipe.recv()

        def stream_of_pipe(number: int, item: bytes) -> None:
            pipe.send((number, item))
            for _ in range(number):
                pipe.recv()

        async def bridge(payload: object) -> object:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(executor, through_pipe, payload)

        async def many(times: int, pool: AsyncPool | None, payload: object) -> None:
            for _ in range(times):
                if pool is None:
                    await bridge(payload)
                else:
                    await pool.call("echo", "echo", payload)

        rows: list[Row] = []
        for label, payload, repeats in (
            ("64 B", b"x" * 64, 500),
            ("1 MiB", np.zeros(1 << 20, np.uint8), 10),
            ("16 MiB", np.zeros(16 << 20, np.uint8), 3),
        ):
            contenders = {
                "mp.Pipe": lambda p=payload: seconds(lambda: through_pipe(p)),
                "inferpool": lambda p=payload: seconds(lambda: pool.call("echo", "echo", p)),
                "inferpool, wait='park'": lambda p=payload: seconds(
                    lambda: parked.call("echo", "echo", p)
                ),
            }
            name = f"round trip, {label}"
            rows += interleaved(name, contenders, rounds=rounds, repeats=repeats, unit="s")
        small = b"x" * 64
        turns = 100
        rows += interleaved(
            "asyncio round trip, 64 B",
            {
                "mp.Pipe + executor": lambda: (
                    seconds(lambda: runner.run(many(turns, None, small))) / turns
                ),
                "inferpool": lambda: (
                    seconds(lambda: runner.run(many(turns, shared, small))) / turns
                ),
            },
            rounds=rounds,
            repeats=3,
            unit="s",
        )
        number = 20_000 if quick else 100_000
        item = b"x" * 32
        rows += interleaved(
            "one item of a stream, 32 B",
            {
                "mp.Pipe": lambda: seconds(lambda: stream_of_pipe(number, item)) / number,
                "inferpool": lambda: (
                    seconds(lambda: sum(1 for _ in pool.stream("echo", "count", (number, item))))
                    / number
                ),
            },
            rounds=rounds,
            repeats=1,
            unit="s",
        )
        return rows
