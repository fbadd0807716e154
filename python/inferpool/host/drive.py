"""Runs the steps of `inferpool.host.calls`: in a thread that blocks, or on an event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from inferpool._transport import Call, Event, LoopNotifier
from inferpool.errors import CallTimeout, InferpoolError
from inferpool.host.calls import Steps, Wait
from inferpool.host.incarnation import Incarnation
from inferpool.host.watch import SIGNAL_SECONDS, SLICE_SECONDS

__all__ = ["LoopDriver", "ThreadDriver"]

BREATH = 64
"""Calls answered at once, between two rounds of an event loop: a fraction of a millisecond."""

T = TypeVar("T")
_Told = asyncio.Future[None]


class ThreadDriver:
    """Blocks the calling thread where steps must wait; the GIL is free meanwhile."""

    def __init__(self, owner: object) -> None:
        """Keep ``owner`` alive, which ends the workers when it goes."""
        self._owner = owner

    def notifier(self, incarnation: Incarnation) -> LoopNotifier | None:
        """Threads are told through doorbells of their own."""
        return None

    def run(self, steps: Steps[T]) -> T:
        """Run the steps to their end and return their result."""
        try:
            wait = next(steps)
            while True:
                try:
                    event = self._wait(wait)
                except BaseException as error:  # noqa: BLE001  # the steps decide
                    wait = steps.throw(error)
                else:
                    wait = steps.send(event)
        except StopIteration as stop:
            result: T = stop.value
            return result

    def _wait(self, wait: Wait | float) -> Event | None:
        on_main = threading.current_thread() is threading.main_thread()
        turn = SIGNAL_SECONDS if on_main else SLICE_SECONDS
        if isinstance(wait, float):
            until = time.monotonic() + wait
            while (pause := until - time.monotonic()) > 0:
                time.sleep(min(turn, pause))
            return None
        incarnation, call, awaited, timeout = wait
        act = call.next if awaited == "event" else call.send
        left = timeout
        began = looked = time.monotonic()
        while True:
            try:
                return act(turn if left is None else min(turn, left))
            except CallTimeout:
                now = time.monotonic()
                if now - looked >= SLICE_SECONDS:
                    incarnation.check()
                    looked = now
                if timeout is not None:
                    left = timeout - (now - began)
                    if left <= 0:
                        raise


class LoopDriver:
    """Awaits on the running event loop where steps must wait. Several loops may share one.

    There is one for a channel, since a loop watches a descriptor once.
    """

    def __init__(self, owner: object) -> None:
        """Keep ``owner`` alive, which ends the workers when it goes."""
        self._owner = owner
        self._watchers: dict[tuple[asyncio.AbstractEventLoop, Incarnation], _Watcher] = {}
        self._breath = 0

    def notifier(self, incarnation: Incarnation) -> LoopNotifier | None:
        """The notifier of the running loop for this worker."""
        return self._watcher(incarnation).notifier

    async def run(self, steps: Steps[T]) -> T:
        """Run the steps to their end and return their result."""
        try:
            wait = next(steps)
            while True:
                try:
                    event = await self._wait(wait)
                except BaseException as error:  # noqa: BLE001  # the steps decide
                    wait = steps.throw(error)
                else:
                    wait = steps.send(event)
        except StopIteration as stop:
            result: T = stop.value
            return result

    async def breathe(self) -> None:
        """Let the loop go round every now and then, after calls that never had to wait."""
        self._breath += 1
        if self._breath % BREATH == 0:
            await asyncio.sleep(0)

    async def _wait(self, wait: Wait | float) -> Event | None:
        if isinstance(wait, float):
            await asyncio.sleep(wait)
            return None
        return await self._watcher(wait[0]).wait(wait)

    def _watcher(self, incarnation: Incarnation) -> _Watcher:
        key = (asyncio.get_running_loop(), incarnation)
        watcher = self._watchers.get(key)
        if watcher is None:
            # A loop that was closed does not say so. Other threads have loops too.
            for other in list(self._watchers):
                if other[0].is_closed():
                    self._watchers.pop(other, None)
            # Without this driver: a loop that watches must not keep the workers alive.
            watcher = _Watcher(*key, on_end=partial(self._watchers.pop, key, None))
            self._watchers[key] = watcher
        return watcher


class _Watcher:
    """One event loop's view of one channel. No thread and no executor: it watches descriptors."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        incarnation: Incarnation,
        on_end: Callable[[], object],
    ) -> None:
        self.notifier = LoopNotifier()
        self._loop = loop
        self._incarnation = incarnation
        self._channel = incarnation.channel
        self._on_end = on_end
        self._check: asyncio.TimerHandle | None = None
        self._waiting: dict[int, _Told] = {}
        self._waiting_for_space: set[_Told] = set()
        self._fds = [self.notifier.fileno(), *self._channel.descriptors()]
        for fd in self._fds:
            loop.add_reader(fd, self._look)

    async def wait(self, wait: Wait) -> Event | None:
        """Do what `wait` asks, within its timeout."""
        _, call, until, timeout = wait
        if until == "event" and (event := self._spin(call)) is not None:
            return event
        if self._check is None:
            self._check_later()
        work = self._event(call) if until == "event" else self._send(call)
        if timeout is None:
            return await work
        try:
            async with asyncio.timeout(timeout):
                return await work
        except TimeoutError as error:
            raise CallTimeout("timed out") from error

    def _check_later(self) -> None:
        self._check = self._loop.call_later(SLICE_SECONDS, self._check_now)

    def _check_now(self) -> None:
        self._check = None
        if self._waiting or self._waiting_for_space:
            self._check_later()
            self._incarnation.check()

    def _spin(self, call: Call) -> Event | None:
        """What has happened, or does within the tens of microseconds for which a loop may spin."""
        event = call.poll()
        if event is None and call.spin():
            self._tell_ready()
            event = call.poll()
        return event

    async def _send(self, call: Call) -> None:
        while not call.try_send():
            told = self._loop.create_future()
            self._waiting_for_space.add(told)
            try:
                if call.await_space():
                    await told
            finally:
                self._waiting_for_space.discard(told)

    async def _event(self, call: Call) -> Event:
        while (event := call.poll()) is None:
            told = self._loop.create_future()
            self._waiting[call.id] = told
            try:
                # Something may have come since `poll`; if not, the ring is armed from now on.
                self._look()
                await told
            finally:
                self._waiting.pop(call.id, None)
        return event

    def _look(self) -> None:
        try:
            alive = self._channel.look(self.notifier)
        except InferpoolError:
            alive = False  # each call learns why from its own outcome
        self._tell_ready()
        if not alive:
            self._detach()

    def _tell_ready(self) -> None:
        for id in self.notifier.take_ready():
            if id == LoopNotifier.SPACE:
                _tell(self._waiting_for_space)
            elif id in self._waiting:
                _tell([self._waiting[id]])

    def _detach(self) -> None:
        # Descriptors of a dead worker stay readable; watching on would keep the loop busy.
        for fd in self._fds:
            self._loop.remove_reader(fd)
        self._fds = []
        if self._check is not None:
            self._check.cancel()
        self._on_end()
        _tell([*self._waiting.values(), *self._waiting_for_space])


def _tell(futures: list[_Told] | set[_Told]) -> None:
    for told in futures:
        if not told.done():
            told.set_result(None)
