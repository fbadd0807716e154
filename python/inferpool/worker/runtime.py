"""The dispatch loop of a worker, and what it hands to a role's code."""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import os
import time
import traceback
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from inferpool import codec, errors
from inferpool._transport import AbortToken, Request, WorkerChannel
from inferpool.codec import encode
from inferpool.errors import CallCancelled, PayloadTooLarge, PoolClosed
from inferpool.messages import READY_KIND, ErrorInfo, Ready, SandboxReport, Start
from inferpool.worker.log import RoleLog, configure_worker_logging, redirect_stdio

__all__ = [
    "AbortToken",
    "KindHandler",
    "Reply",
    "RoleConfig",
    "Session",
    "WireKind",
    "WorkerChannel",
    "WorkerLoopState",
    "WorkerRole",
    "report_loading",
    "run_worker",
]

WorkerRole = str
"""Name of a role, as the pool's user chose it."""
WireKind = str
"""Name of what a request asks for, or of what a reply carries."""
RoleConfig = Start
"""What a session factory is told: role, options, log path and so on."""

LOG_CHECK_SECONDS = 0.001
"""Least time between two looks at the log's size, which take a tenth of a short request each."""

# What tells functions whose body does not run when they are called.
_LAZY = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)

UNCONFINED = SandboxReport(level="basic")

TAKING_SECONDS = 0.01
"""How long requests are taken at most between two steps of a session."""

_log = logging.getLogger("inferpool.worker")


class Session(Protocol):
    """A loaded model, or whatever a role keeps between calls.

    A session that serves several calls at once also has ``step() -> float | None``. The loop
    calls it whenever no request is waiting: it does a piece of work for the calls that handlers
    have deferred, and returns for how many seconds the loop may wait for a request before the
    next step: 0 while there is work, None when there is none.
    """

    def close(self) -> None:
        """Release everything. Called exactly once."""


# A Struct, since one is made for every request, and that takes a third of the time.
class Reply(msgspec.Struct, eq=False, gc=False):
    """Answers one call. Whatever is sent belongs to that call and to no other."""

    _request: Request
    _state: WorkerLoopState
    deferred: bool = False

    @property
    def abort(self) -> AbortToken:
        """Set when this call should stop: it was cancelled, or the worker shuts down."""
        return self._request.abort

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for this answer any more."""
        return self._request.cancelled

    def send(self, kind: WireKind, payload: Any) -> None:
        """Send one item of the answer, waiting while the reader is a window behind.

        Raises:
            TypeError: the payload holds something that cannot travel.
            ValueError: it holds something that cannot be encoded.
            PayloadTooLarge: its encoded form is above the frame limit.
            CallCancelled: nobody waits for this answer any more.
            PoolClosed: the worker shuts down, or the call has ended.
        """
        self._request.send(encode(kind, payload))

    def try_send(self, kind: WireKind, payload: Any) -> bool:
        """As `send`, but false where that would wait; then try again with the same item.

        Raises:
            ValueError: part of another item is out. The call can still end, or fail.
        """
        return self._request.try_send(encode(kind, payload))

    def defer(self) -> None:
        """Leave the call open when its handler returns, for `end` or `fail` to end it later."""
        self.deferred = True
        self._state.deferred.add(self)

    def end(self) -> None:
        """End a deferred call well."""
        self._finish(None)

    def fail(self, error: BaseException) -> None:
        """End a deferred call with an error."""
        self._finish(error)

    def _finish(self, error: BaseException | None) -> None:
        self._state.deferred.discard(self)
        _finish(self._request, error, self._state)


KindHandler = Callable[[Reply, Any, "WorkerLoopState"], None]
"""Serves one request: ``(reply, payload, state)``. What it raises ends its call, not the loop."""


@dataclass
class WorkerLoopState:
    """What the dispatch loop keeps between requests."""

    role_config: RoleConfig
    session: Session
    served: int = 0
    """Requests that have ended, well or not."""
    dropped: int = 0
    """Requests that were given up before their answer was complete."""
    deferred: set[Reply] = field(default_factory=set)
    """Calls that have outlived their handler."""
    forked: bool = False
    """Whether this is a process that a handler has forked."""


# Who waits for the session that is being built, and how many percent of it were reported.
_loading: ContextVar[tuple[Request, int] | None] = ContextVar("loading", default=None)


def report_loading(part: float) -> None:
    """Tell the host how much of the session has been built, from 0 to 1.

    For session factories, in the thread that called them; elsewhere it does nothing.
    """
    loading = _loading.get()
    if loading is not None:
        request, reported = loading
        # A window's worth of reports would make the worker wait for a host that does not look.
        if (percent := int(100 * part)) > reported:
            # Nobody may wait any more, which a factory learns from its abort token.
            with contextlib.suppress(CallCancelled, PoolClosed):
                request.try_send(encode("loading", percent / 100))
            _loading.set((request, percent))


def run_worker(
    channel: WorkerChannel,
    role_config: RoleConfig,
    *,
    session_factory: Callable[[RoleConfig, AbortToken], Session],
    kind_handlers: Mapping[WireKind, KindHandler],
    start_request: Request | None = None,
    sandbox: SandboxReport = UNCONFINED,
) -> None:
    """Build the session and serve requests until the channel shuts down.

    The heartbeat runs since the channel was attached, so a host that pings or dies while the
    session is being built is noticed.

    Args:
        channel: the worker's end of the channel.
        role_config: what the host said about the role.
        session_factory: builds the session; its abort token is set on shutdown.
        kind_handlers: handler by kind.
        start_request: answered with `Ready` once the session stands.
        sandbox: what the process has given up.
    """
    redirect_stdio(role_config.log_path)
    log = configure_worker_logging(role_config.log_path, role_config.log_level)
    _log.info("sandbox: %s", "; ".join([sandbox.level, *sandbox.missing]))
    session: Session | None = None
    try:
        handlers = {READY_KIND: _answer_nothing, **kind_handlers}
        for kind, handler in handlers.items():
            if any(is_lazy(handler) for is_lazy in _LAZY):
                raise TypeError(f"the handler of {kind!r} is async or a generator: nobody runs it")
        began = time.monotonic()
        if start_request is not None:
            _loading.set((start_request, 0))
        session = session_factory(role_config, channel.abort)
        _loading.set(None)
        # What has been made by now stays: to look at all of it for garbage takes 28 ms in chat.
        gc.freeze()
        seconds = time.monotonic() - began
        _log.info("incarnation %d ready in %.3f s", role_config.incarnation, seconds)
        if start_request is not None:
            start_request.send(encode("ready", Ready(load_seconds=seconds, sandbox=sandbox)))
            start_request.end()
        state = WorkerLoopState(role_config, session)
        os.register_at_fork(after_in_child=lambda: setattr(state, "forked", True))
        _dispatch(channel, handlers, state, log)
    finally:
        channel.shut_down()
        _close(session)
        channel.join_heartbeat()


def _dispatch(
    channel: WorkerChannel,
    kind_handlers: Mapping[WireKind, KindHandler],
    state: WorkerLoopState,
    log: RoleLog,
) -> None:
    unexpected = 0
    log_checked = 0.0
    step = getattr(state.session, "step", None)
    step_due = 0.0
    patience: float | None = None
    while not channel.shutting_down:
        request = channel.receive(patience)
        if request is not None:
            _serve(request, kind_handlers, state)
            now = time.monotonic()
            if now - log_checked > LOG_CHECK_SECONDS:
                log.limit_size()
                log_checked = now
            if step is None or not state.deferred:
                patience = None
                continue
            # What has come meanwhile is taken before the next step, but not without end.
            if patience is None:
                step_due = now + TAKING_SECONDS
            patience = 0.0
            if now < step_due:
                continue
        elif channel.unexpected_control != unexpected:
            unexpected = channel.unexpected_control
            _log.warning("dropped an unexpected control message (%d so far)", unexpected)
        if step is not None:
            patience = _step(step, state)
            step_due = time.monotonic() + TAKING_SECONDS


def _step(step: Callable[[], float | None], state: WorkerLoopState) -> float | None:
    try:
        return step()
    except BaseException as error:  # noqa: BLE001  # SystemExit too: the loop goes on
        _log.exception("a step failed, and with it the calls that it served")
        for reply in list(state.deferred):
            reply.fail(error)
        return None


def _serve(
    request: Request, kind_handlers: Mapping[WireKind, KindHandler], state: WorkerLoopState
) -> None:
    reply = Reply(request, state)
    try:
        if request.cancelled:
            raise CallCancelled("given up before it was served")
        parts = request.parts
        if parts:
            kind, payload = parts if isinstance(parts, tuple) else codec.decode(parts)
            handler = kind_handlers.get(kind)
            if handler is None:
                raise ValueError(f"unknown kind {kind!r}; known: {sorted(kind_handlers)}")
            handler(reply, payload, state)
            if state.forked:
                _leave_fork(None)
        if not reply.deferred:
            # Not by `Reply.end`, which takes longer: somebody waits for this.
            request.end()
            state.served += 1
    except BaseException as error:  # noqa: BLE001  # SystemExit too: the loop goes on
        if state.forked:
            _leave_fork(error)
        reply.fail(error)


def _leave_fork(error: BaseException | None) -> None:
    """End a process that a handler forked and let come back from it: it is no second worker."""
    code = error.code or 0 if isinstance(error, SystemExit) else int(error is not None)
    os._exit(code if isinstance(code, int) else 1)


def _finish(request: Request, error: BaseException | None, state: WorkerLoopState) -> None:
    state.served += 1
    given_up = isinstance(error, CallCancelled | PoolClosed)
    state.dropped += given_up
    # A handler may also give up by itself, which its caller must learn.
    if error is None or (given_up and request.cancelled):
        # The host wants to know when the call's slot is free, even of one that it gave up.
        with contextlib.suppress(PoolClosed):
            request.end()
        return
    if not given_up:
        _log.warning("call %d failed", request.call, exc_info=error)
    report_failure(request, error)


def _answer_nothing(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    """Serve `READY_KIND`: that it is served at all is the answer."""


def report_failure(request: Request, error: BaseException) -> None:
    """End a call with an error: type name, message, traceback and, if it has any, details."""
    info = _describe(error)
    # A call that has ended, or a worker that shuts down, takes no more frames.
    with contextlib.suppress(PoolClosed):
        try:
            request.fail(encode("error", info))
        except PayloadTooLarge:
            short = ErrorInfo(type_name=info.type_name, message="(too long)", traceback="")
            request.fail(encode("error", short))


def _describe(error: BaseException) -> ErrorInfo:
    cls = type(error)
    name = cls.__name__
    if name in errors.__all__ and cls is not getattr(errors, name):
        name = f"{cls.__module__}.{name}"  # such as asyncio.QueueFull, which is not ours
    try:
        details = getattr(error, "details", {})
        return ErrorInfo(
            type_name=name,
            message=_encodable(str(error)),
            traceback=_encodable("".join(traceback.format_exception(error))),
            details=details if _is_plain(details) else {},
        )
    except BaseException:  # noqa: BLE001  # the error's own code fails
        return ErrorInfo(type_name=name, message="(can't be told)", traceback="")


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _is_plain(details: Any) -> bool:
    try:
        encode("details", msgspec.convert(details, dict[str, Any]))
    except (TypeError, ValueError, msgspec.ValidationError):
        return False
    return True


def _close(session: Session | None) -> None:
    if session is not None:
        try:
            session.close()
        except BaseException:  # noqa: BLE001  # the process ends either way; the log says why
            _log.exception("closing the session failed")
