"""Runs the steps of `inferpool.host.calls`: in a thread that blocks, or on an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from inferpool._transport import Call, Event, HostChannel, LoopNotifier
from inferpool.errors import CallTimeout, InferpoolError
from inferpool.host.calls import Steps, Wait
from inferpool.host.incarnation import Incarnation

__all__ = ["LoopDriver", "ThreadDriver"]

BREATH = 64
"""Calls answered at once, between two rounds of an event loop: a fraction of a millisecond."""

T = TypeVar("T")
_Told = asyncio.Future[None]


class ThreadDriver:
    """Blocks the calling thread where steps must wait; the GIL is free meanwhile."""

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

    def _wait(self, wait: Wait) -> Event | None:
        _, call, until, timeout = wait
        if until == "event":
            return call.next(timeout)
        call.send(timeout)
        return None


class LoopDriver:
    """Awaits on the running event loop where steps must wait. Several loops may share one."""

    def __init__(self) -> None:
        self._watchers: dict[tuple[asyncio.AbstractEventLoop, HostChannel], _Watcher] = {}
        self._breath = 0

    def notifier(self, incarnation: Incarnation) -> LoopNotifier | None:
        """The notifier of the running loop for this worker."""
        return self._watcher(incarnation.channel).notifier

    async def run(self, steps: Steps[T]) -> T:
        """Run the steps to their end and return their result."""
        try:
            wait = next(steps)
            while True:
                try:
                    event = await self._watcher(wait[0].channel).wait(wait)
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

    def _watcher(self, channel: HostChannel) -> _Watcher:
        key = (asyncio.get_running_loop(), channel)
        watcher = self._watchers.get(key)
        if watcher is None:
            watcher = _Watcher(*key, on_end=lambda: self._watchers.pop(key, None))
            self._watchers[key] = watcher
        return watcher


class _Watcher:
    """One event loop's view of one channel. No thread and no executor: it watches descriptors."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        channel: HostChannel,
        on_end: Callable[[], object],
    ) -> None:
        self.notifier = LoopNotifier()
        self._loop = loop
        self._channel = channel
        self._on_end = on_end
        self._waiting: dict[int, _Told] = {}
        self._waiting_for_space: set[_Told] = set()
        self._fds = [self.notifier.fileno(), *channel.descriptors()]
        for fd in self._fds:
            loop.add_reader(fd, self._look)

    async def wait(self, wait: Wait) -> Event | None:
        """Do what `wait` asks, within its timeout."""
        _, call, until, timeout = wait
        if until == "event" and (event := self._spin(call)) is not None:
            return event
        work = self._event(call) if until == "event" else self._send(call)
        if timeout is None:
            return await work
        try:
            async with asyncio.timeout(timeout):
                return await work
        except TimeoutError as error:
            raise CallTimeout("timed out") from error

    def _spin(self, call: Call) -> Event | None:
        """What has happened, or does within the few microseconds for which spinning pays."""
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
        self._on_end()
        _tell([*self._waiting.values(), *self._waiting_for_space])


def _tell(futures: list[_Told] | set[_Told]) -> None:
    for told in futures:
        if not told.done():
            told.set_result(None)
