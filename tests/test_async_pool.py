"""`AsyncPool`: the same rules as `Pool`, on event loops."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from conftest import descriptors, echo_role, eventually

from inferpool import (
    AsyncPool,
    AsyncStream,
    CallCancelled,
    CallTimeout,
    Policy,
    Pool,
    PoolClosed,
    QueueFull,
    RemoteError,
    WorkerCrashed,
)
from inferpool.host.drive import LoopDriver


@contextlib.asynccontextmanager
async def echo_pool(**options: Any) -> AsyncIterator[AsyncPool]:
    async with AsyncPool(echo=echo_role(), **options) as pool:
        yield pool


def run(body: Callable[[AsyncPool], Awaitable[None]]) -> None:
    async def main() -> None:
        async with echo_pool() as pool:
            await body(pool)

    asyncio.run(main())


def test_calls_and_streams() -> None:
    async def body(pool: AsyncPool) -> None:
        assert await pool.start() is pool
        assert await pool.call("echo", "echo", {"a": 1}) == {"a": 1}
        assert [item async for item in pool.stream("echo", "count", 3000)] == list(range(3000))
        with pytest.raises(RemoteError, match="ValueError"):
            await pool.call("echo", "raise", "value")
        assert await pool.ping() < 5
        assert pool.status()["echo"].state == "ready"

    run(body)


def test_large_payloads_both_ways_at_once() -> None:
    async def body(pool: AsyncPool) -> None:
        array = np.arange((24 << 20) // 8)
        answers = await asyncio.gather(*(pool.call("echo", "echo", array) for _ in range(3)))
        for answer in answers:
            np.testing.assert_array_equal(answer, array)

    run(body)


def test_the_loop_goes_on_while_a_call_waits_behind_a_full_ring() -> None:
    async def body(pool: AsyncPool) -> None:
        await pool.start()
        busy = asyncio.create_task(pool.call("echo", "sleep", 0.3))
        await asyncio.sleep(0.05)
        big = asyncio.create_task(pool.call("echo", "echo", b"x" * (16 << 20)))
        ticks = 0
        while not busy.done():
            await asyncio.sleep(0.01)
            ticks += 1
        assert ticks > 3
        assert len(await big) == 16 << 20

    run(body)


@pytest.mark.parametrize("error", [CallTimeout, QueueFull])
def test_a_request_given_up_half_sent_leaves_the_worker_usable(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(pool: AsyncPool) -> None:
        await pool.start()
        busy = asyncio.create_task(pool.call("echo", "sleep", 0.5))
        await asyncio.sleep(0.05)
        monkeypatch.setattr("inferpool.host.calls.QUEUE_SECONDS", 0.1)
        timeout = 0.05 if error is CallTimeout else None
        with pytest.raises(error):
            await pool.call("echo", "echo", b"x" * (16 << 20), timeout=timeout)
        await busy
        for number in range(5):
            assert await pool.call("echo", "echo", number) == number
        status = pool.status()["echo"]
        assert (status.in_flight, status.restarts) == (0, 0)

    run(body)


def test_a_task_cancelled_amid_an_upload_to_an_idle_worker_does_not_cost_it() -> None:
    async def body() -> None:
        async with AsyncPool(echo=echo_role(), policy=Policy(cancel_grace=0.2)) as pool:
            await pool.start()
            for steps in range(1, 8):
                upload = asyncio.create_task(pool.call("echo", "echo", b"x" * (64 << 20)))
                for _ in range(steps):
                    await asyncio.sleep(0)
                upload.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await upload
                # Nobody makes another call, and the worker has to have been told nevertheless.
                while calls := pool.status()["echo"].workers[0].calls:
                    assert [call.given_up for call in calls] == [True]
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)
            assert await pool.call("echo", "echo", 1) == 1
            status = pool.status()["echo"]
            assert (status.incarnation, status.restarts) == (1, 0)

    asyncio.run(body())


def test_cancel_ends_an_upload_behind_a_busy_worker() -> None:
    async def body() -> None:
        policy = Policy(cancel_grace=60.0)
        async with AsyncPool(echo=echo_role(), policy=policy, close_timeout=0.0) as pool:
            await pool.start()
            busy = asyncio.create_task(pool.call("echo", "sleep", 60.0))
            upload = asyncio.create_task(pool.call("echo", "echo", b"x" * (16 << 20)))
            while pool.status()["echo"].in_flight < 2:
                await asyncio.sleep(0.001)
            assert pool.cancel("echo") == 2
            for task in (busy, upload):
                with pytest.raises(CallCancelled):
                    await asyncio.wait_for(task, 10)

    asyncio.run(body())


@pytest.mark.parametrize(
    ("then", "error"),
    [("raise", "RuntimeError"), ("send another", "ValueError"), ("return", None)],
)
def test_a_handler_may_stop_amid_an_item(tmp_path: Path, then: str, error: str | None) -> None:
    async def body(pool: AsyncPool) -> None:
        await pool.start()
        mark = tmp_path / "mark"
        answer = asyncio.create_task(pool.call("echo", "half", [then, str(mark)]))
        await asyncio.sleep(0)
        # Nobody reads meanwhile, so the ring gets full.
        assert eventually(mark.exists)
        if error is None:
            assert await answer is None
        else:
            with pytest.raises(RemoteError) as caught:
                await answer
            assert caught.value.type_name == error
        assert await pool.call("echo", "echo", 1) == 1
        assert pool.status()["echo"].restarts == 0

    run(body)


def test_cancelling_a_task_cancels_its_call() -> None:
    async def body(pool: AsyncPool) -> None:
        await pool.start()
        task = asyncio.create_task(pool.call("echo", "wait_for_abort"))
        while not pool.status()["echo"].in_flight:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        facts = await pool.call("echo", "facts")
        assert facts["dropped"] == 1

    run(body)


@pytest.mark.parametrize("how", ["cancel", "close"])
@pytest.mark.parametrize("what", ["upload", "start"])
def test_a_stream_can_be_ended_while_it_opens(what: str, how: str) -> None:
    async def body() -> None:
        role = echo_role(load_seconds=60.0 if what == "start" else 0.0)
        policy = Policy(cancel_grace=60.0)
        async with AsyncPool(echo=role, policy=policy, close_timeout=0.0) as pool:
            if what == "upload":
                await pool.start()
                busy = asyncio.create_task(pool.call("echo", "sleep", 60.0))
                while not pool.status()["echo"].in_flight:
                    await asyncio.sleep(0.001)
            stream = pool.stream("echo", "echo", b"x" * (16 << 20))
            first = asyncio.create_task(anext(stream))
            await asyncio.sleep(0.05)
            getattr(stream, how)()
            with pytest.raises(CallCancelled if how == "cancel" else StopAsyncIteration):
                await asyncio.wait_for(first, 10)
            assert [item async for item in stream] == []
            if what == "upload":
                busy.cancel()

    asyncio.run(body())


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_a_stream_can_be_ended_while_another_task_waits_for_it(how: str) -> None:
    async def body(pool: AsyncPool) -> None:
        stream = pool.stream("echo", "wait_for_abort")
        await anext(stream)
        waiting = asyncio.create_task(anext(stream))
        await asyncio.sleep(0.05)
        getattr(stream, how)()
        with pytest.raises(CallCancelled if how == "cancel" else StopAsyncIteration):
            await asyncio.wait_for(waiting, 10)
        assert [item async for item in stream] == []
        assert await pool.call("echo", "echo", 1) == 1

    run(body)


def test_a_task_that_opens_a_stream_and_is_cancelled_too_stays_cancelled() -> None:
    async def body(pool: AsyncPool) -> None:
        stream = pool.stream("echo", "count", 3)
        first = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        stream.cancel()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first

    run(body)


def test_a_stream_cancelled_before_it_began_says_so() -> None:
    async def body(pool: AsyncPool) -> None:
        stream = pool.stream("echo", "count", 3)
        stream.cancel()
        with pytest.raises(CallCancelled):
            await anext(stream)
        assert [item async for item in stream] == []
        assert pool.status()["echo"].state == "stopped"

    run(body)


def test_event_loops_that_come_and_go_leave_no_descriptors_behind() -> None:
    pool = Pool(echo=echo_role())
    shared = pool.as_async()
    counts = set()
    for number in range(6):

        async def use(number: int = number) -> None:
            await shared.call("echo", "echo", number)
            for _ in range(4):
                await pool.as_async().call("echo", "echo", number)

        asyncio.run(use())
        gc.collect()
        counts.add(descriptors())
    pool.close()
    assert max(counts) - min(counts) <= 1, counts


@pytest.mark.parametrize("steps", range(12))
def test_a_task_can_be_cancelled_at_every_await_point(steps: int) -> None:
    async def body(pool: AsyncPool) -> None:
        task = asyncio.create_task(pool.call("echo", "echo", b"x" * 100_000))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert await pool.call("echo", "echo", 1) == 1

    run(body)


def test_cancel_and_timeout() -> None:
    async def body(pool: AsyncPool) -> None:
        await pool.start()
        task = asyncio.create_task(pool.call("echo", "wait_for_abort"))
        while not pool.cancel("echo"):
            await asyncio.sleep(0.001)
        with pytest.raises(CallCancelled):
            await task
        with pytest.raises(CallTimeout):
            await pool.call("echo", "wait_for_abort", timeout=0.05)
        assert await pool.call("echo", "echo", 1, timeout=10) == 1

    run(body)


def test_a_closed_stream_ends() -> None:
    async def body(pool: AsyncPool) -> None:
        async with pool.stream("echo", "count", None) as stream:
            assert await anext(stream) == 0
        assert [item async for item in stream] == []
        unopened = pool.stream("echo", "count", None)
        unopened.cancel()
        await unopened.aclose()
        assert [item async for item in unopened] == []
        endless = pool.stream("echo", "wait_for_abort")
        await anext(endless)
        endless.cancel()
        with pytest.raises(CallCancelled):
            await anext(endless)
        assert await pool.call("echo", "echo", 1) == 1

    run(body)


def test_a_crash_is_an_error_at_once_and_the_next_call_works() -> None:
    async def body(pool: AsyncPool) -> None:
        stream = pool.stream("echo", "die", {"words": "bye", "signal": "SIGKILL"})
        assert await anext(stream) == "bye"
        with pytest.raises(WorkerCrashed) as caught:
            await anext(stream)
        assert caught.value.exit == "SIGKILL"
        assert await pool.call("echo", "echo", 1) == 1
        pid = pool.status()["echo"].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        while pool.status()["echo"].state != "dead":
            await asyncio.sleep(0.001)
        assert await pool.call("echo", "echo", 2) == 2
        assert pool.status()["echo"].incarnation == 3

    run(body)


def test_closing_a_pool_ends_its_calls() -> None:
    async def main() -> None:
        pool = AsyncPool(echo=echo_role())
        await pool.start()
        task = asyncio.create_task(pool.call("echo", "wait_for_abort"))
        while not pool.status()["echo"].in_flight:
            await asyncio.sleep(0.001)
        await pool.aclose()
        with pytest.raises(PoolClosed):
            await task
        with pytest.raises(PoolClosed):
            await pool.call("echo", "echo")

    asyncio.run(main())


def test_a_pool_may_outlive_its_loop_and_serve_another() -> None:
    pool = AsyncPool(echo=echo_role())

    async def first() -> None:
        assert await pool.call("echo", "echo", 1) == 1

    async def second() -> None:
        assert await pool.call("echo", "echo", 2) == 2
        await pool.aclose()

    asyncio.run(first())
    asyncio.run(second())


def test_two_loops_share_a_pool() -> None:
    pool = AsyncPool(echo=echo_role())

    async def many(number: int) -> None:
        async def one(turn: int) -> None:
            assert await pool.call("echo", "echo", [number, turn]) == [number, turn]

        for turn in range(50):
            await asyncio.gather(one(turn), one(-turn))

    threads = [threading.Thread(target=lambda n=n: asyncio.run(many(n))) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert pool.status()["echo"].in_flight == 0
    asyncio.run(pool.aclose())


def test_fifty_threads_and_fifty_tasks_at_once_get_their_own_answers() -> None:
    """One worker serves threads and an event loop together."""
    seconds = 3.0
    with Pool(echo=echo_role()) as pool:
        shared = pool.as_async()
        wrong: list[object] = []
        done = [0] * 100
        deadline = time.monotonic() + seconds

        def thread_caller(number: int) -> None:
            while time.monotonic() < deadline:
                mine = [number, done[number], "x" * (number * 40)]
                if pool.call("echo", "echo", mine) != mine:
                    wrong.append(mine)
                done[number] += 1

        async def task_caller(number: int) -> None:
            while time.monotonic() < deadline:
                mine = [number, done[number], "y" * (number * 40)]
                if await shared.call("echo", "echo", mine) != mine:
                    wrong.append(mine)
                done[number] += 1

        async def tasks() -> None:
            await asyncio.gather(*(task_caller(number) for number in range(50, 100)))

        threads = [threading.Thread(target=thread_caller, args=(n,)) for n in range(50)]
        for thread in threads:
            thread.start()
        asyncio.run(tasks())
        for thread in threads:
            thread.join(30)
        assert wrong == []
        assert all(done)
        status = pool.status()["echo"]
        assert status.in_flight == 0
        assert status.counters["dropped_late"] == 0


def test_a_stream_that_never_waits_lets_the_loop_go_round() -> None:
    arrived = msgspec.msgpack.encode([("number", 1)] * 128)
    call = SimpleNamespace(poll_messages=lambda: arrived)
    rounds = 0

    async def run(steps: object) -> SimpleNamespace:
        return SimpleNamespace(call=call)

    async def count() -> None:
        nonlocal rounds
        while True:
            rounds += 1
            await asyncio.sleep(0)

    async def main() -> None:
        counter = asyncio.create_task(count())
        driver = cast("LoopDriver", SimpleNamespace(run=run))
        stream = AsyncStream[int](
            driver, lambda deadline: cast("Any", None), None, lambda items: items
        )
        until = time.monotonic() + 0.1
        async for _ in stream:
            if time.monotonic() > until:
                break
        counter.cancel()

    asyncio.run(main())
    assert rounds > 1


class EarlyLoop(asyncio.SelectorEventLoop):
    """Its timers are 10 ms early, as those of other loops are by up to 1 ms."""

    def call_at(self, when: float, *args: Any, **options: Any) -> asyncio.TimerHandle:
        return super().call_at(when - 0.01, *args, **options)


def test_a_timer_that_is_early_makes_no_full_queue() -> None:
    async def main() -> None:
        async with echo_pool() as pool:
            stream = pool.stream("echo", "wait_for_abort")
            await anext(stream)
            with pytest.raises(CallTimeout, match=r"within 0\.2 s"):
                await pool.call("echo", "echo", b"x" * (8 << 20), timeout=0.2)
            stream.close()

    with asyncio.Runner(loop_factory=EarlyLoop) as runner:
        runner.run(main())


def test_a_stream_belongs_to_one_event_loop() -> None:
    async def first() -> Any:
        return await anext(stream)

    with Pool(echo=echo_role()) as pool:
        stream = pool.as_async().stream("echo", "wait_for_abort")
        assert asyncio.run(first()) is None
        with pytest.raises(RuntimeError, match="event loop on which it was begun"):
            asyncio.run(asyncio.wait_for(first(), 10))
        stream.close()


def test_tasks_may_share_a_stream() -> None:
    async def body(pool: AsyncPool) -> None:
        stream = pool.stream("echo", "count", 1000)

        async def read() -> list[int]:
            return [item async for item in stream]

        received = await asyncio.gather(read(), read(), read())
        assert sorted(itertools.chain(*received)) == list(range(1000))

    run(body)
