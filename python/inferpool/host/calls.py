"""What a call is, step by step, without saying how to wait.

Each function is a generator that yields a `Wait` where it has to wait and is resumed with what
came of it. `inferpool.host.drive` runs them, blocking a thread or awaiting on an event loop, so
that `Pool` and `AsyncPool` share every rule here.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from inferpool import codec
from inferpool._transport import Call, Event, LoopNotifier
from inferpool.codec import encode
from inferpool.errors import CallTimeout, PeerDied, ProtocolError, QueueFull
from inferpool.host.incarnation import Incarnation, remote_error
from inferpool.host.supervisor import Supervisor

__all__ = [
    "Deadline",
    "Driver",
    "OpenCall",
    "Steps",
    "Wait",
    "call",
    "next_item",
    "open_call",
    "ping",
    "ready_items",
    "try_call",
]

T = TypeVar("T")

QUEUE_SECONDS = 30.0
"""How long a request waits for space behind a worker that does not read; then `QueueFull`."""


Wait = tuple[Incarnation, Call, Literal["sent", "event"], float | None]
"""What has to be waited for: that a request is out, or that something happens to a call, with
whom, and for how many seconds at most."""

Steps = Generator[Wait, Any, T]


class Deadline:
    """The end of a call's ``timeout``."""

    __slots__ = ("_at", "_timeout")

    def __init__(self, timeout: float | None) -> None:
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"timeout must not be negative: {timeout}")
        self._timeout = timeout
        self._at = None if timeout is None else time.monotonic() + timeout

    def left(self, bound: float | None = None) -> float | None:
        """Seconds left, or `bound` if that is less; None for no end."""
        if self._at is None:
            return bound
        left = max(0.0, self._at - time.monotonic())
        return left if bound is None else min(left, bound)

    def check(self) -> None:
        """Raise `CallTimeout` once the time has come."""
        if self._at is not None and time.monotonic() >= self._at:
            raise CallTimeout(f"no answer within {self._timeout:g} s")


@dataclass(slots=True)
class OpenCall:
    """A call that is under way, and with whom."""

    supervisor: Supervisor
    incarnation: Incarnation
    call: Call

    def abandon(self) -> None:
        """Give the call up; does nothing if it has ended."""
        self.call.abandon()


class Driver(Protocol):
    """Whoever runs the steps."""

    def notifier(self, incarnation: Incarnation) -> LoopNotifier | None:
        """What calls to this worker are to be opened with."""


def open_call(
    supervisor: Supervisor, driver: Driver, kind: str, payload: Any, deadline: Deadline
) -> Steps[OpenCall]:
    """Send a request to the role's worker, starting one if need be."""
    parts = codec.encode(kind, payload)
    for last_try in (False, True):
        incarnation = supervisor.incarnation()
        native = incarnation.channel.open(parts, driver.notifier(incarnation))
        opened = OpenCall(supervisor, incarnation, native)
        if native.sent:
            return opened
        try:
            yield incarnation, native, "sent", deadline.left(QUEUE_SECONDS)
        except CallTimeout:
            opened.abandon()
            deadline.check()
            raise QueueFull(
                f"role {supervisor.spec.name!r} took no request for {QUEUE_SECONDS:g} s"
            ) from None
        except (PeerDied, ProtocolError) as error:
            untouched = native.id == 0
            if last_try or not untouched or not incarnation.is_ready():
                raise incarnation.explain(error) from None
            # It died while idle: nothing was in flight, so the next one may have the request.
            supervisor.replace(incarnation)
        except BaseException:
            opened.abandon()
            raise
        else:
            return opened
    raise AssertionError("unreachable")


def next_event(opened: OpenCall, deadline: Deadline) -> Steps[Event]:
    """Wait for what happens to the call next."""
    incarnation = opened.incarnation
    while True:
        try:
            bound = None if incarnation.ready else incarnation.check_started()
            event: Event = yield incarnation, opened.call, "event", deadline.left(bound)
        except CallTimeout:
            deadline.check()
        except (PeerDied, ProtocolError) as error:
            raise incarnation.explain(error) from None
        else:
            return event


def next_item(opened: OpenCall, deadline: Deadline) -> Steps[tuple[Any] | None]:
    """The next item of the answer in a tuple of one, or None at its end."""
    event = yield from next_event(opened, deadline)
    if event.kind == "end":
        return None
    if event.kind == "error":
        raise remote_error(event)
    try:
        return (codec.decode(event.parts)[1],)
    except ProtocolError as error:
        raise opened.incarnation.explain(error) from error


def ready_items(opened: OpenCall) -> Sequence[Any] | None:
    """Items of the answer that have arrived and can be had together, or None."""
    try:
        array = opened.call.poll_messages()
        return None if array is None else [payload for _, payload in codec.decode_messages(array)]
    except (PeerDied, ProtocolError) as error:
        raise opened.incarnation.explain(error) from error


def try_call(
    supervisor: Supervisor, driver: Driver, kind: str, payload: Any, timeout: float | None
) -> tuple[Any] | OpenCall | None:
    """Begin a call, and end it too if its answer is there within microseconds, in a tuple of one.

    The path of short calls, on which Python takes most of the time: it is kept as short as can
    be. None when there is no worker at hand that takes the request at once; then, as with
    anything but a plain answer, the steps of `call` go on.
    """
    incarnation = supervisor.at_hand
    if incarnation is None or (timeout is not None and not timeout > 0):
        return None
    try:
        answer = incarnation.channel.ask(encode(kind, payload), driver.notifier(incarnation))
        if isinstance(answer, tuple):
            return (answer[1],)
        if isinstance(answer, list):
            return (codec.decode(answer)[1],)
    except ProtocolError as error:
        raise incarnation.explain(error) from error
    return None if answer is None else OpenCall(supervisor, incarnation, answer)


def call(
    supervisor: Supervisor,
    driver: Driver,
    kind: str,
    payload: Any,
    timeout: float | None,
    *,
    opened: OpenCall | None = None,
) -> Steps[Any]:
    """Make a call whose answer is one item, or none, which gives None; or go on with `opened`."""
    deadline = Deadline(timeout)
    if opened is None:
        opened = yield from open_call(supervisor, driver, kind, payload, deadline)
    try:
        item = yield from next_item(opened, deadline)
        if item is None:
            return None
        if (yield from next_item(opened, deadline)) is not None:
            raise ValueError(f"the answer to {kind!r} has more than one item; use stream")
        return item[0]
    finally:
        opened.abandon()


def ping(supervisor: Supervisor, driver: Driver, timeout: float | None) -> Steps[float]:
    """Ask the worker's heartbeat, and return the seconds until it answered."""
    deadline = Deadline(timeout)
    incarnation = supervisor.incarnation()
    began = time.monotonic()
    try:
        native = incarnation.channel.ping(driver.notifier(incarnation))
    except PeerDied as error:
        raise incarnation.explain(error) from None
    opened = OpenCall(supervisor, incarnation, native)
    try:
        yield from next_event(opened, deadline)
    finally:
        opened.abandon()
    return time.monotonic() - began
