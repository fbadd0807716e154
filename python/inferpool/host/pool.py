"""`Pool` and `AsyncPool`: models by role, for threads and for event loops."""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from inferpool.config import Policy, PoolOptions
from inferpool.errors import CallTimeout
from inferpool.host.calls import Deadline, call, next_item, open_call, ping, try_call
from inferpool.host.drive import LoopDriver, ThreadDriver
from inferpool.host.roles import (
    AsyncChat,
    AsyncEmbed,
    AsyncRerank,
    AsyncVision,
    Chat,
    Embed,
    Rerank,
    Vision,
)
from inferpool.host.spec import RoleLike, RoleSpec
from inferpool.host.status import RoleStatus
from inferpool.host.stream import AsyncStream, Stream
from inferpool.host.supervisor import MemoryBudget, Supervisor
from inferpool.host.watch import SLICE_SECONDS
from inferpool.messages import READY_KIND

__all__ = ["AsyncPool", "Pool"]

PING_SECONDS = 5.0
"""Default bound of a ping."""


class _Core:
    """What both pools are made of: a supervisor for each role."""

    def __init__(self, options: PoolOptions, roles: Mapping[str, RoleLike]) -> None:
        if not roles:
            raise TypeError("a pool needs at least one role, such as chat='smollm2'")
        self._options = options
        self._loop_driver: weakref.ref[LoopDriver] | None = None
        self.supervisors: dict[str, Supervisor] = {}
        budget = MemoryBudget(options.memory_budget, self.supervisors)
        for name, given in roles.items():
            self.supervisors[name] = Supervisor(RoleSpec.of(name, given, options), budget)
        # Runs when the last pool that shares this is collected, and at exit.
        self._finalizer = weakref.finalize(self, _close, self.supervisors, options.close_timeout)

    def supervisor(self, role: str) -> Supervisor:
        try:
            return self.supervisors[role]
        except KeyError:
            known = ", ".join(self.supervisors)
            raise ValueError(f"this pool has no role {role!r}; it has {known}") from None

    def attribute(self, role: str) -> Supervisor:
        """The same for an attribute, which `hasattr` and `unittest.mock` must find missing."""
        try:
            return self.supervisor(role)
        except ValueError as error:
            raise AttributeError(str(error)) from None

    def named(self, role: str | None) -> list[Supervisor]:
        return list(self.supervisors.values()) if role is None else [self.supervisor(role)]

    def every_worker(self) -> list[Supervisor]:
        """Each supervisor as often as it has replicas."""
        return [each for each in self.supervisors.values() for _ in range(each.spec.role.replicas)]

    def configure(self, role: str, given: RoleLike) -> None:
        self.supervisor(role).configure(RoleSpec.of(role, given, self._options))

    def loop_driver(self) -> LoopDriver:
        """The driver of every `AsyncPool` that shares this."""
        driver = self._loop_driver() if self._loop_driver is not None else None
        if driver is None:
            driver = LoopDriver(self)
            self._loop_driver = weakref.ref(driver)
        return driver

    def close(self, *, drain: bool, timeout: float | None) -> None:
        if drain:
            _drain(self.supervisors, Deadline(timeout))
            timeout = None
        _close(self.supervisors, self._options.close_timeout if timeout is None else timeout)
        self._finalizer.detach()  # not before: Ctrl-C may have ended the wait for a worker


def _own(supervisors: Mapping[str, Supervisor]) -> list[Supervisor]:
    """Without those whose workers are another process's: a forked child leaves them alone."""
    return [each for each in supervisors.values() if each.owner in {None, os.getpid()}]


def _drain(supervisors: Mapping[str, Supervisor], deadline: Deadline) -> None:
    for supervisor in _own(supervisors):
        supervisor.refuse()
    while any(supervisor.in_flight() for supervisor in _own(supervisors)):
        pause = deadline.left(SLICE_SECONDS / 10)
        if not pause:
            return
        time.sleep(pause)


def _close(supervisors: Mapping[str, Supervisor], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    for supervisor in _own(supervisors):
        supervisor.ask_to_end()
    for supervisor in _own(supervisors):
        supervisor.end(max(0.0, deadline - time.monotonic()))


def _as_they_are(items: Sequence[Any]) -> Sequence[Any]:
    return items


class _Base:
    """What is the same for threads and event loops, because it never waits."""

    def __init__(
        self,
        *,
        log_dir: str | os.PathLike[str] | None = None,
        log_level: str = "INFO",
        policy: Policy | None = None,
        memory_budget: int | None = None,
        close_timeout: float = 2.0,
        wait: str = "adaptive",
        **roles: RoleLike,
    ) -> None:
        """Name the roles; nothing is started yet.

        Args:
            log_dir: folder of ``worker-<role>.log``; None keeps a bounded tail in memory.
            log_level: level of the workers' Python logging.
            policy: how workers are watched, restarted and released, for each role that has no
                policy of its own.
            memory_budget: resident bytes that the workers may have together. Above it idle
                workers are released, the least recently used first.
            close_timeout: seconds that workers have to end by themselves before they are killed.
            wait: ``"adaptive"`` spins briefly before it sleeps, ``"park"`` never spins.
            **roles: ``chat=``, ``embed=`` and ``rerank=`` take a model's name or path, or a
                config; ``vision=`` takes a config; any other name takes a `Role`.

        Raises:
            TypeError: an unknown option, or a role that is given as something else.
        """
        options = PoolOptions(
            log_dir=None if log_dir is None else Path(log_dir).absolute(),
            log_level=log_level,
            policy=Policy() if policy is None else policy,
            memory_budget=memory_budget,
            close_timeout=close_timeout,
            wait=wait,
        )
        self._core = _Core(options, roles)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a pool can be neither copied nor sent to another process; make one there")

    def cancel(self, role: str) -> int:
        """Cancel the role's calls in flight, and return how many those were.

        Whoever waits for one of them gets `CallCancelled`.
        """
        return self._core.supervisor(role).cancel_all()

    def status(self) -> dict[str, RoleStatus]:
        """What each role is doing."""
        return {name: each.status() for name, each in self._core.supervisors.items()}

    def reset(self, role: str) -> None:
        """Forget the role's crashes: it is not degraded any more, and no request poisonous."""
        self._core.supervisor(role).reset()

    def configure(self, role: str, given: RoleLike) -> None:
        """Give a role another model or other options. Other roles do not notice.

        Calls in flight end on the worker that they are with, which ends after them; the next call
        starts a new one. ``model=`` on a call of a built-in role does so for the model alone.

        Args:
            role: one of the pool's roles.
            given: as in the constructor.
        """
        self._core.configure(role, given)


class Pool(_Base):
    """Local models by role, each in a worker process of its own.

    Example:
        >>> with Pool(chat="smollm2", embed="minilm") as pool:
        ...     vectors = pool.embed(["bees dance", "markets fall"])
        ...     for delta in pool.chat.stream("Why do bees dance?"):
        ...         print(delta.text, end="", flush=True)

    Any thread may use a pool, several at once. Workers start when they are first needed, or all
    at once with `start`. They end with `close`, when the pool is collected, when the
    interpreter exits, and when this process dies, however it dies.
    """

    @cached_property
    def _driver(self) -> ThreadDriver:
        return ThreadDriver(self._core)

    @property
    def chat(self) -> Chat:
        """The ``chat`` role."""
        return Chat(self._core.attribute("chat"), self._driver)

    @property
    def embed(self) -> Embed:
        """The ``embed`` role."""
        return Embed(self._core.attribute("embed"), self._driver)

    @property
    def rerank(self) -> Rerank:
        """The ``rerank`` role."""
        return Rerank(self._core.attribute("rerank"), self._driver)

    @property
    def vision(self) -> Vision:
        """The ``vision`` role."""
        return Vision(self._core.attribute("vision"), self._driver)

    def call(
        self, role: str, kind: str, payload: Any = None, *, timeout: float | None = None
    ) -> Any:
        """Ask a role for one answer.

        Args:
            role: name of the role.
            kind: which of its handlers.
            payload: see `inferpool.codec`.
            timeout: seconds until `CallTimeout`.

        Returns:
            What the handler sent, or None if it sent nothing.

        Raises:
            RemoteError: the handler raised; a `ModelError` or `CallError` comes back as itself.
            WorkerStartError, WorkerCrashed, WorkerStuck, RoleDegraded: there is no worker to
                serve it, or no longer.
            CallTimeout, CallCancelled, QueueFull, PayloadTooLarge, PoisonousRequest, PoolClosed,
                ProtocolError: see there.
            TypeError, ValueError: the payload cannot travel, there is no such role, or the
                answer has several items.
        """
        supervisor = self._core.supervisor(role)
        answer = try_call(supervisor, self._driver, kind, payload, timeout)
        if isinstance(answer, tuple):
            return answer[0]
        if answer is not None and (napped := answer.nap(timeout)) is not None:
            return napped[0]
        return self._driver.run(
            call(supervisor, self._driver, kind, payload, timeout, opened=answer)
        )

    def stream(
        self, role: str, kind: str, payload: Any = None, *, timeout: float | None = None
    ) -> Stream[Any]:
        """Ask a role for an answer of many items. Arguments and errors are those of `call`."""
        supervisor = self._core.supervisor(role)
        opening = partial(open_call, supervisor, self._driver, kind, payload)
        return Stream(self._driver, opening, timeout, _as_they_are)

    def start(
        self,
        *,
        timeout: float | None = None,
        progress: Callable[[str, float], object] | None = None,
    ) -> Self:
        """Start every worker, all at once, and wait until each has its session.

        Args:
            timeout: seconds until `CallTimeout`; the workers go on.
            progress: called with a role and the seconds since the start, whenever one of its
                workers is ready.

        Raises:
            WorkerStartError, ModelError: a session could not be built.
            WorkerCrashed, WorkerStuck, RoleDegraded, CallTimeout, PoolClosed: as `call`.
        """
        deadline = Deadline(timeout)
        began = time.monotonic()
        waiting = [
            self._driver.run(open_call(each, self._driver, READY_KIND, None, deadline))
            for each in self._core.every_worker()
        ]
        while waiting:
            for opened in list(waiting):
                turn = deadline.left(SLICE_SECONDS / len(waiting))
                try:
                    self._driver.run(next_item(opened, Deadline(turn)))
                except CallTimeout:
                    deadline.check()
                    continue
                waiting.remove(opened)
                opened.abandon()
                if progress is not None:
                    progress(opened.supervisor.spec.name, time.monotonic() - began)
        return self

    def ping(self, role: str | None = None, *, timeout: float | None = PING_SECONDS) -> float:
        """Ask the heartbeat of a role's worker, or of every role's, whatever it is doing.

        A role without a worker gets one; its session need not stand for an answer.

        Args:
            role: name of a role; None asks each, one after the other.
            timeout: seconds until `CallTimeout`, for each role.

        Returns:
            Seconds until the answer; of the slowest when there are several.

        Raises:
            WorkerStartError, WorkerCrashed, RoleDegraded, CallTimeout, PoolClosed: as `call`.
        """
        return max(
            self._driver.run(ping(each, self._driver, timeout)) for each in self._core.named(role)
        )

    def as_async(self) -> AsyncPool:
        """The same workers for event loops. Closing either pool closes both."""
        return AsyncPool._sharing(self._core)

    def close(self, *, drain: bool = False, timeout: float | None = None) -> None:
        """End every worker: calls in flight fail with `PoolClosed`. Final and idempotent.

        Args:
            drain: let the calls in flight end first, while new ones are refused.
            timeout: seconds until workers are killed, in place of ``close_timeout``. With `drain`,
                seconds that the calls have to end; None for as long as they take.
        """
        self._core.close(drain=drain, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class AsyncPool(_Base):
    """As `Pool`, on an event loop: no call blocks it, and none needs a thread.

    Cancelling a task that waits for a call cancels the call. Several loops may share a pool.
    """

    @cached_property
    def _driver(self) -> LoopDriver:
        return self._core.loop_driver()

    @classmethod
    def _sharing(cls, core: _Core) -> Self:
        pool = cls.__new__(cls)
        pool._core = core
        return pool

    @property
    def chat(self) -> AsyncChat:
        """The ``chat`` role."""
        return AsyncChat(self._core.attribute("chat"), self._driver)

    @property
    def embed(self) -> AsyncEmbed:
        """The ``embed`` role."""
        return AsyncEmbed(self._core.attribute("embed"), self._driver)

    @property
    def rerank(self) -> AsyncRerank:
        """The ``rerank`` role."""
        return AsyncRerank(self._core.attribute("rerank"), self._driver)

    @property
    def vision(self) -> AsyncVision:
        """The ``vision`` role."""
        return AsyncVision(self._core.attribute("vision"), self._driver)

    async def call(
        self, role: str, kind: str, payload: Any = None, *, timeout: float | None = None
    ) -> Any:
        """As `Pool.call`."""
        supervisor = self._core.supervisor(role)
        answer = try_call(supervisor, self._driver, kind, payload, timeout)
        if isinstance(answer, tuple):
            await self._driver.breathe()
            return answer[0]
        return await self._driver.run(
            call(supervisor, self._driver, kind, payload, timeout, opened=answer)
        )

    def stream(
        self, role: str, kind: str, payload: Any = None, *, timeout: float | None = None
    ) -> AsyncStream[Any]:
        """As `Pool.stream`, for ``async for``. The request is sent with the first item."""
        supervisor = self._core.supervisor(role)
        opening = partial(open_call, supervisor, self._driver, kind, payload)
        return AsyncStream(self._driver, opening, timeout, _as_they_are)

    async def start(
        self,
        *,
        timeout: float | None = None,
        progress: Callable[[str, float], object] | None = None,
    ) -> Self:
        """As `Pool.start`."""
        began = time.monotonic()

        async def start_one(supervisor: Supervisor) -> None:
            await self._driver.run(call(supervisor, self._driver, READY_KIND, None, timeout))
            if progress is not None:
                progress(supervisor.spec.name, time.monotonic() - began)

        await asyncio.gather(*map(start_one, self._core.every_worker()))
        return self

    async def ping(self, role: str | None = None, *, timeout: float | None = PING_SECONDS) -> float:
        """As `Pool.ping`."""
        pings = [
            self._driver.run(ping(each, self._driver, timeout)) for each in self._core.named(role)
        ]
        return max(await asyncio.gather(*pings))

    async def aclose(self, *, drain: bool = False, timeout: float | None = None) -> None:
        """As `Pool.close`."""
        # Waiting for processes to end is the one thing here that has no descriptor to watch
        # on every system.
        await asyncio.to_thread(self._core.close, drain=drain, timeout=timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()
