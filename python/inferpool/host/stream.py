"""Answers of many items, for ``for`` and ``async for``."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from inferpool.host.calls import Deadline, OpenCall, Steps, next_item
from inferpool.host.drive import LoopDriver, ThreadDriver

__all__ = ["AsyncStream", "Stream"]

T = TypeVar("T")


class Stream(Iterator[T], Generic[T]):
    """The items of one answer as they arrive. Closing it, or dropping it, cancels the call."""

    def __init__(
        self,
        driver: ThreadDriver,
        opening: Callable[[Deadline], Steps[OpenCall]],
        timeout: float | None,
        convert: Callable[[Any], T],
    ) -> None:
        self._driver = driver
        self._convert = convert
        self._deadline = Deadline(timeout)
        self._ended = False
        self._lock = threading.Lock()
        self._opened = driver.run(opening(self._deadline))

    def __next__(self) -> T:
        with self._lock:  # threads that share a stream share its items
            if self._ended:
                raise StopIteration
            try:
                item = self._driver.run(next_item(self._opened, self._deadline))
            except BaseException:
                self.close()
                raise
            if item is None:
                self.close()
                raise StopIteration
            return self._convert(item[0])

    def cancel(self) -> None:
        """End the call from any thread; whoever iterates gets `CallCancelled`."""
        self._opened.call.cancel()

    def close(self) -> None:
        """Stop the answer; iteration ends. Idempotent."""
        self._ended = True
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
    """As `Stream`, on an event loop. The request is sent with the first item."""

    def __init__(
        self,
        driver: LoopDriver,
        opening: Callable[[Deadline], Steps[OpenCall]],
        timeout: float | None,
        convert: Callable[[Any], T],
    ) -> None:
        self._driver = driver
        self._convert = convert
        self._timeout = timeout
        self._opening = opening
        self._ended = False
        self._lock = asyncio.Lock()
        self._deadline: Deadline | None = None
        self._opened: OpenCall | None = None

    async def __anext__(self) -> T:
        async with self._lock:  # tasks that share a stream share its items
            if self._ended:
                raise StopAsyncIteration
            try:
                if self._opened is None or self._deadline is None:
                    self._deadline = Deadline(self._timeout)
                    self._opened = await self._driver.run(self._opening(self._deadline))
                item = await self._driver.run(next_item(self._opened, self._deadline))
            except BaseException:
                self.close()
                raise
            if item is None:
                self.close()
                raise StopAsyncIteration
            return self._convert(item[0])

    def cancel(self) -> None:
        """End the call from any task; whoever iterates gets `CallCancelled`."""
        if self._opened is None:
            self._ended = True
        else:
            self._opened.call.cancel()

    def close(self) -> None:
        """Stop the answer; iteration ends. Idempotent."""
        self._ended = True
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
