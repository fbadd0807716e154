"""Answers of many items, for ``for`` and ``async for``."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, cast

from inferpool.errors import CallCancelled
from inferpool.host.calls import Deadline, OpenCall, Steps, next_item, ready_items
from inferpool.host.drive import LoopDriver, ThreadDriver

__all__ = ["AsyncStream", "Stream", "read_beside"]

BREATH_SECONDS = 0.001
"""How long items that are there at once may keep an event loop from all else."""

T = TypeVar("T")


class Stream(Iterator[T], Generic[T]):
    """The items of one answer as they arrive. Closing it, or dropping it, cancels the call."""

    def __init__(
        self,
        driver: ThreadDriver,
        opening: Callable[[Deadline], Steps[OpenCall]],
        timeout: float | None,
        convert: Callable[[Sequence[Any]], Sequence[T]],
    ) -> None:
        self._driver = driver
        self._convert = convert
        self._deadline = Deadline(timeout)
        self._ended = threading.Event()
        self._lock = threading.Lock()
        # Items that came together with the last one.
        self._ready: deque[T] = deque()
        self._opened = driver.run(opening(self._deadline))

    def __next__(self) -> T:
        try:
            return self._ready.popleft()
        except IndexError:
            pass  # and wait out here: what is raised meanwhile has nothing to do with it
        return self._wait()

    def _wait(self) -> T:
        with self._lock:  # threads that share a stream share its items
            if self._ended.is_set():
                raise StopIteration
            try:
                items = ready_items(self._opened)
                if not items:
                    items = self._driver.run(next_item(self._opened, self._deadline))
                if items is None:
                    raise StopIteration
                first, *others = self._convert(items)
            except BaseException as error:
                ended = self._ended.is_set() and isinstance(error, Exception)
                self.close()
                if ended:  # by another thread, while this one waited
                    raise StopIteration from None
                raise
            self._ready.extend(others)
            if self._ended.is_set():  # meanwhile, by another thread
                self._ready.clear()
        return first

    def cancel(self) -> None:
        """End the call from any thread; whoever iterates gets `CallCancelled`."""
        self._opened.cancel()
        self._ready.clear()

    def close(self) -> None:
        """Stop the answer; iteration ends. Idempotent."""
        self._ended.set()
        self._ready.clear()
        self._opened.abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class AsyncStream(AsyncIterator[T], Generic[T]):
    """As `Stream`, on an event loop. The request is sent with the first item.

    It belongs to the loop on which its first item was asked for; to go on with it on another one
    is a `RuntimeError`.
    """

    def __init__(
        self,
        driver: LoopDriver,
        opening: Callable[..., Steps[OpenCall]],
        timeout: float | None,
        convert: Callable[[Sequence[Any]], Sequence[T]],
        reading: Callable[[], Any] | None = None,
    ) -> None:
        """Prepare to open a call with the first item.

        Args:
            driver: runs the steps.
            opening: opens the call, given its deadline, and before that its payload if there is
                ``reading``.
            timeout: seconds until `CallTimeout`.
            convert: makes items of what arrives.
            reading: makes the payload, and would block the loop.
        """
        self._driver = driver
        self._convert = convert
        self._timeout = timeout
        self._opening = opening
        self._reading = reading
        self._ended = False
        self._cancelled = False
        self._lock = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        # Whoever waits for the call to be open, until it is or has been called off.
        self._opener: asyncio.Task[Any] | None = None
        # Items that came together with the last one.
        self._ready: deque[T] = deque()
        self._deadline: Deadline | None = None
        self._opened: OpenCall | None = None
        self._breathed = time.monotonic()

    async def __anext__(self) -> T:
        if self._ready:
            return self._ready.popleft()
        loop = asyncio.get_running_loop()
        if self._loop not in {None, loop}:  # it alone is told of new items
            raise RuntimeError("a stream must be read on the event loop on which it was begun")
        self._loop = loop
        async with self._lock:  # tasks that share a stream share its items
            try:
                await self._breathe()
                if self._ended:
                    raise StopAsyncIteration
                if self._deadline is None:
                    self._deadline = Deadline(self._timeout)
                if self._opened is None:
                    self._check_ended()
                    self._opened = await self._open(self._deadline)
                    self._check_ended()
                items = ready_items(self._opened)
                if not items:
                    items = await self._driver.run(next_item(self._opened, self._deadline))
                if items is None:
                    raise StopAsyncIteration
                first, *others = self._convert(items)
            except BaseException as error:
                ended = self._ended and isinstance(error, Exception)
                self.close()
                if ended:  # by another task, while this one waited
                    raise StopAsyncIteration from None
                raise
            self._ready.extend(others)
        return first

    async def _breathe(self) -> None:
        """Let the loop go round, unless it just did: there may be no other wait for long."""
        if time.monotonic() - self._breathed > BREATH_SECONDS:
            await asyncio.sleep(0)
            self._breathed = time.monotonic()

    def _check_ended(self) -> None:
        if self._cancelled:
            raise CallCancelled("the call was cancelled") from None
        if self._ended:
            raise StopAsyncIteration from None

    async def _open(self, deadline: Deadline) -> OpenCall:
        """Open the call, which takes as long as a model loads or the worker reads nothing."""
        task = self._opener = cast("asyncio.Task[Any]", asyncio.current_task())
        cancelled_before = task.cancelling()
        try:
            opening = self._opening
            if self._reading is not None:
                opening = partial(opening, await read_beside(self._reading, deadline))
            return await self._driver.run(opening(deadline))
        except asyncio.CancelledError:
            # Who cancels the task as well wants more than an end of this call.
            if (self._cancelled or self._ended) and task.uncancel() <= cancelled_before:
                self._check_ended()
            raise
        finally:
            self._opener = None

    def _call_off(self) -> None:
        opener, self._opener = self._opener, None
        if opener is not None:
            opener.cancel()

    def cancel(self) -> None:
        """End the call from any task; whoever iterates gets `CallCancelled`."""
        self._ready.clear()
        self._cancelled = True
        self._call_off()
        if self._opened is not None:
            self._opened.cancel()

    def close(self) -> None:
        """Stop the answer; iteration ends. Idempotent."""
        self._ended = True
        self._ready.clear()
        self._call_off()
        if self._opened is not None:
            self._opened.abandon()

    async def aclose(self) -> None:
        """As `close`, under the name that ``contextlib.aclosing`` expects."""
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


async def read_beside(reading: Callable[[], Any], deadline: Deadline) -> Any:
    """What ``reading`` returns, in a thread beside the loop; nobody waits for it longer than asked.

    Raises:
        CallTimeout: it took too long. The thread goes on, since nothing can stop it.
    """
    try:
        async with asyncio.timeout(deadline.left()) as limit:
            return await asyncio.to_thread(reading)
    except TimeoutError:  # which a file system may raise, too
        if limit.expired():
            raise deadline.error() from None
        raise
