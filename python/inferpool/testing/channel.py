"""A role's session and handlers in the test's own process, without a worker."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self, cast

from inferpool import codec
from inferpool._transport import Request
from inferpool.config import Role
from inferpool.errors import CallCancelled
from inferpool.messages import ErrorInfo, Start
from inferpool.worker import runtime
from inferpool.worker.runtime import WorkerLoopState
from inferpool.worker.sandbox import import_attribute

__all__ = ["InProcessChannel"]


class InProcessChannel:
    """Serves a custom role's calls where the debugger is.

    Payloads pass through the codec in both directions, so what cannot travel to a worker is
    refused here too, and arrives in the same form. Calls are served one after the other, each to
    its end. The abort token has no address for native code.

    Example:
        >>> role = Role("mypkg.echo:make_session", "mypkg.echo:HANDLERS")
        >>> with InProcessChannel(role) as channel:
        ...     assert channel.call("echo", "hello") == "hello"
    """

    def __init__(self, role: Role) -> None:
        """Import the role and build its session.

        Raises:
            ImportError, AttributeError: as the role's modules do, or lack.
        """
        self._handlers = import_attribute(role.handlers)
        start = Start(
            role="test",
            incarnation=1,
            session=role.session,
            handlers=role.handlers,
            options=_travel(dict(role.options)),
            log_path=None,
            log_level="INFO",
            sys_path=[],
        )
        session = import_attribute(role.session)(start, _Abort())
        self._state = WorkerLoopState(start, session)
        self._calls = 0

    @property
    def session(self) -> Any:
        """What the session factory returned."""
        return self._state.session

    def call(self, kind: str, payload: Any = None) -> Any:
        """The one item of the answer, or None if there is none.

        Raises:
            RemoteError: the handler raised, if not a `ModelError` or `CallError`, which is itself.
            ValueError: there are more items; or as the codec says.
            TypeError: the payload or the answer cannot travel.
        """
        items = self.stream(kind, payload)
        if len(items) > 1:
            raise ValueError(f"the answer to {kind!r} has more than one item; use stream")
        return items[0] if items else None

    def stream(self, kind: str, payload: Any = None, *, limit: int | None = None) -> list[Any]:
        """The items of the answer; errors are those of `call`.

        Args:
            kind: which of the handlers.
            payload: as in ``Pool.call``.
            limit: items after which the call is cancelled.
        """
        self._calls += 1
        request = _Request(self._calls, _parts(kind, payload), limit)
        runtime._serve(cast(Request, request), self._handlers, self._state)
        while self._state.deferred and not request.ended:
            runtime._step(self.session.step, self._state)
        if request.error is not None:
            raise request.error.exception()
        return request.items

    def close(self) -> None:
        """Close the session."""
        self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Abort:
    """As `AbortToken`, as far as Python goes."""

    def __init__(self, *united: _Abort) -> None:
        self._united = united
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True

    def union(self, other: _Abort, /) -> _Abort:
        return _Abort(self, other)

    @property
    def cancelled(self) -> bool:
        return self._cancelled or any(each.cancelled for each in self._united)

    def is_set(self) -> bool:
        return self.cancelled


class _Request:
    """As the transport's request; keeps what is sent."""

    def __init__(self, call: int, parts: codec.Parts, limit: int | None) -> None:
        self.call = call
        self.parts = parts
        self.abort = _Abort()
        self.items: list[Any] = []
        self.error: ErrorInfo | None = None
        self.ended = False
        self._limit = limit

    @property
    def cancelled(self) -> bool:
        return self.abort.cancelled

    def send(self, parts: codec.Parts) -> None:
        if self.cancelled:
            raise CallCancelled("given up")
        self.items.append(codec.decode(_copy(parts))[1])
        if len(self.items) == self._limit:
            self.abort.cancel()

    def try_send(self, parts: codec.Parts) -> bool:
        self.send(parts)
        return True

    def fail(self, parts: codec.Parts) -> None:
        self.error = codec.decode_as(_copy(parts), ErrorInfo)
        self.ended = True

    def end(self) -> None:
        self.ended = True


def _parts(kind: str, payload: Any) -> codec.Parts:
    return _copy(codec.encode(kind, payload))


def _copy(parts: codec.Parts) -> codec.Parts:
    """The parts as they would arrive: in memory of their own."""
    if isinstance(parts, tuple):
        return parts
    return [parts[0], *(memoryview(bytearray(memoryview(each).cast("B"))) for each in parts[1:])]


def _travel(payload: Any) -> Any:
    return codec.decode(_parts("options", payload))[1]
