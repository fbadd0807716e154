"""What a call is, step by step, without saying how to wait.

Each function is a generator that yields a `Wait` where it has to wait, or the seconds for which
it only has to let time pass, and is resumed with what came of it. `inferpool.host.drive` runs
them, blocking a thread or awaiting on an event loop, so that `Pool` and `AsyncPool` share every
rule here.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from inferpool import codec
from inferpool._transport import Call, Event, LoopNotifier
from inferpool.codec import encode
from inferpool.errors import (
    CallCancelled,
    CallTimeout,
    GivenUp,
    InferpoolError,
    PeerDied,
    PoolClosed,
    ProtocolError,
    QueueFull,
    WorkerCrashed,
    WorkerStuck,
)
from inferpool.host.flight import Flight
from inferpool.host.incarnation import Incarnation, remote_error
from inferpool.host.supervisor import Supervisor
from inferpool.host.watch import SIGNAL_SECONDS, SLICE_SECONDS
from inferpool.messages import READY_KIND

__all__ = [
    "Deadline",
    "Driver",
    "Naming",
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

Steps = Generator[Wait | float, Any, T]

_PAUSES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
"""Seconds between looks at a worker that is expected to let go of a call at any moment."""


class Deadline:
    """When a call's ``timeout`` runs out, which began at `began`, or begins now."""

    __slots__ = ("_at", "_began", "_timeout")

    def __init__(self, timeout: float | None, began: float | None = None) -> None:
        self._began = began
        self._timeout: float | None = None
        self._at: float | None = None
        self.set_default(timeout)

    def set_default(self, timeout: float | None) -> None:
        """Use this timeout if there is none."""
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"timeout must not be negative: {timeout}")
        if self._at is None and timeout is not None:
            began = time.monotonic() if self._began is None else self._began
            self._timeout, self._at = timeout, began + timeout

    def left(self, bound: float | None = None) -> float | None:
        """Seconds left, or `bound` if that is less; None for no end."""
        if self._at is None:
            return bound
        left = max(0.0, self._at - time.monotonic())
        return left if bound is None else min(left, bound)

    def check(self) -> None:
        """Raise `CallTimeout` once the time has come."""
        if self._at is not None and time.monotonic() >= self._at:
            raise self.error()

    def error(self, ladder: GivenUp | None = None) -> CallTimeout:
        """What to raise when the time has come.

        To be raised at once: a variable of the raising function that held it would keep everything
        in its traceback, down to the streams of whoever called, until garbage is collected.
        """
        error = CallTimeout(f"no answer within {self._timeout:g} s")
        if ladder is not None:
            error.ladder = ladder
        return error


@dataclass(frozen=True, slots=True)
class Naming:
    """A request that must be answered by this model. For `call` and `open_call`."""

    model: str
    request: Any


class OpenCall:
    """A call that is under way, and with whom. It is given up when the object goes."""

    __slots__ = ("call", "flight", "incarnation", "supervisor")

    def __init__(
        self, supervisor: Supervisor, incarnation: Incarnation, flight: Flight, call: Call
    ) -> None:
        self.supervisor = supervisor
        self.incarnation = incarnation
        self.flight = flight
        self.call = flight.call = call

    def nap(self, timeout: float | None) -> tuple[Any] | None:
        """Block the thread a moment for an answer of one item, in a tuple of one.

        None leaves all else, and looks at the worker and for signals, to the steps of `call`.
        """
        if self.incarnation.ready is None:
            return None
        try:
            moment = SIGNAL_SECONDS if timeout is None else min(SIGNAL_SECONDS, timeout)
            answer = self.call.answer(moment)
            if answer is None:
                return None
            item = answer[1] if isinstance(answer, tuple) else codec.decode(answer)[1]
        except CallTimeout:
            return None
        except ProtocolError as error:
            raise self.explain(error) from error
        except BaseException:
            self.abandon()
            raise
        self.abandon()
        return (item,)

    def cancel(self) -> None:
        """End the call; whoever waits for it gets `CallCancelled`."""
        self.call.cancel()
        self.incarnation.give_up(self.flight)

    def explain(self, error: InferpoolError) -> InferpoolError:
        """What to tell the caller after an error of the channel."""
        return self.supervisor.explain(self.incarnation, error)

    def abandon(self) -> None:
        """Give the call up; does nothing if it has ended."""
        self.call.abandon()
        self.incarnation.finish(self.flight)

    def __del__(self) -> None:
        if not hasattr(self, "call"):
            return  # a signal's handler has raised amid `__init__`
        with contextlib.suppress(PoolClosed):  # in a forked child, whose call it is not
            self.call.abandon()
            self.incarnation.finish(self.flight, dropped=True)


class Driver(Protocol):
    """Whoever runs the steps."""

    def notifier(self, incarnation: Incarnation) -> LoopNotifier | None:
        """What calls to this worker are to be opened with."""


def open_call(
    supervisor: Supervisor, driver: Driver, kind: str, payload: Any, deadline: Deadline
) -> Steps[OpenCall]:
    """Send a request to one of the role's workers, starting one if need be.

    A request that names another model than the role has gives the role that model.
    """
    model = None
    if isinstance(payload, Naming):
        model, payload = payload.model, payload.request
    parts = encode(kind, payload)
    if kind != READY_KIND:  # which is not a call of the user's
        deadline.set_default(supervisor.spec.policy.call_timeout)
        supervisor.admit(parts, model)
    replaced = 0
    while True:
        opened = yield from _begin(supervisor, driver, kind, parts, deadline, model=model)
        if opened.call.sent and not opened.flight.cancelled:
            return opened
        incarnation = opened.incarnation
        try:
            yield from _sent(opened, deadline)
        except (PeerDied, ProtocolError) as error:
            untouched = opened.call.id == 0
            enough = replaced == supervisor.spec.role.replicas
            if enough or not untouched or not incarnation.is_ready():
                raise supervisor.explain(incarnation, error) from None
            # It died while idle: nothing was in flight, so the next one may have the request.
            opened.abandon()
            supervisor.replace(incarnation)
            replaced += 1
        except BaseException:
            opened.abandon()
            raise
        else:
            return opened


def _begin(
    supervisor: Supervisor,
    driver: Driver,
    kind: str,
    parts: codec.Parts,
    deadline: Deadline,
    *,
    model: str | None,
) -> Steps[OpenCall]:
    """Open the call on a worker that takes calls, and send what takes no waiting."""
    while True:
        incarnation = supervisor.current(model)
        if incarnation is None:
            incarnation = yield from _started(supervisor, deadline, model)
        if incarnation.lingering:
            yield from _let_go(supervisor, incarnation, deadline)
        flight = Flight(kind, parts)
        try:
            if not incarnation.begin(flight):
                continue  # it was retired meanwhile, as when another call names another model
            native = incarnation.channel.open(parts, driver.notifier(incarnation))
            return OpenCall(supervisor, incarnation, flight, native)
        except BaseException:
            incarnation.finish(flight)
            raise


def _sent(opened: OpenCall, deadline: Deadline) -> Steps[None]:
    """Wait until all of a request is out."""
    supervisor, incarnation = opened.supervisor, opened.incarnation
    until = time.monotonic() + QUEUE_SECONDS
    while True:
        # While it loads it reads none, for as long as `Policy.start_timeout` says.
        reads = incarnation.is_ready()
        if not reads:
            until = time.monotonic() + QUEUE_SECONDS
        patience = deadline.left(SLICE_SECONDS)
        try:
            yield incarnation, opened.call, "sent", patience
        except CallTimeout:
            # The deadline itself need not have come: the clock of a loop may have no microseconds.
            if patience != SLICE_SECONDS:
                raise deadline.error() from None
            if reads and time.monotonic() >= until:
                raise QueueFull(
                    f"role {supervisor.spec.name!r} took no request for {QUEUE_SECONDS:g} s"
                ) from None
        # As long as it had no slot, nobody could cancel it there.
        if opened.flight.cancelled:
            raise CallCancelled("the call was cancelled")
        if opened.call.sent:
            return


def _started(
    supervisor: Supervisor, deadline: Deadline, model: str | None = None
) -> Steps[Incarnation]:
    """Start a worker, after a pause if others have crashed."""
    while (pause := supervisor.pause()) > 0:
        # By a reset the pause ends, and by a close the call.
        yield from _paused(supervisor, min(pause, SLICE_SECONDS), deadline)
    return supervisor.start(model)


def _paused(supervisor: Supervisor, seconds: float, deadline: Deadline) -> Steps[None]:
    """Let time pass with a request that no worker may have yet; it counts for ``max_queue``."""
    cancels = supervisor.cancels
    supervisor.waiting.append(None)
    try:
        yield deadline.left(seconds) or 0.0
    finally:
        supervisor.waiting.pop()
    supervisor.check_cancelled(cancels)
    deadline.check()


def _let_go(supervisor: Supervisor, incarnation: Incarnation, deadline: Deadline) -> Steps[None]:
    """Wait until the worker has let go of calls that were given up, or was killed for not doing so.

    A request behind them would share their fate. Not so if the worker has begun with none of them,
    since it never will; and if other calls are in flight, one more may as well join them.
    """
    pauses = iter(_PAUSES)
    pause = 0.0
    while not incarnation.ended and incarnation.is_held() and incarnation.is_ready():
        if not any(each.taken() for each in list(incarnation.lingering)):
            return
        if any(each.given_up_at is None for each in list(incarnation.flights)):
            return
        incarnation.check()
        pause = next(pauses, pause)
        yield from _paused(supervisor, pause, deadline)


def next_event(opened: OpenCall, deadline: Deadline) -> Steps[Event]:
    """Wait for what happens to the call next."""
    incarnation = opened.incarnation
    try:
        event: Event = yield incarnation, opened.call, "event", deadline.left()
    except CallTimeout:
        raise deadline.error(opened.flight.ladder) from None
    except CallCancelled as cancelled:
        cancelled.ladder = opened.flight.ladder
        raise
    except (PeerDied, ProtocolError) as ended:
        raise opened.explain(ended) from None
    if incarnation.ready is None and incarnation.is_ready():
        opened.supervisor.became_ready()
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
        raise opened.explain(error) from error


def ready_items(opened: OpenCall) -> Sequence[Any] | None:
    """Items of the answer that have arrived and can be had together, or None."""
    try:
        array = opened.call.poll_messages()
        return None if array is None else [payload for _, payload in codec.decode_messages(array)]
    except (PeerDied, ProtocolError) as error:
        raise opened.explain(error) from error


def try_call(
    supervisor: Supervisor, driver: Driver, kind: str, payload: Any, timeout: float | None
) -> tuple[Any] | OpenCall | None:
    """Begin a call, and end it too if its answer is there within microseconds, in a tuple of one.

    The path of short calls, on which Python takes most of the time: it is kept as short as can
    be. None when there is no worker at hand that takes the request at once; then, as with
    anything but a plain answer, the steps of `call` go on.
    """
    incarnation = supervisor.at_hand
    if incarnation is None or incarnation.lingering or (timeout is not None and not timeout > 0):
        return None
    incarnation.last_used = time.monotonic()
    parts = encode(kind, payload)
    incarnation.asking.append(None)
    try:
        # In this order: `retire` looks at who is asking after it has said so.
        if incarnation.retired:
            return None
        answer = incarnation.channel.ask(parts, driver.notifier(incarnation))
        if isinstance(answer, tuple):
            return (answer[1],)
        if isinstance(answer, list):
            return (codec.decode(answer)[1],)
        if answer is None:
            return None
        opened = OpenCall(supervisor, incarnation, Flight(kind, parts), answer)
        incarnation.begun(opened.flight)
        return opened
    except ProtocolError as error:
        raise supervisor.explain(incarnation, error) from error
    finally:
        incarnation.asking.pop()
        if incarnation.retired:
            incarnation.leave_if_retired()


def call(
    supervisor: Supervisor,
    driver: Driver,
    kind: str,
    payload: Any,
    timeout: float | Deadline | None,
    *,
    opened: OpenCall | None = None,
) -> Steps[Any]:
    """Make a call whose answer is one item, or none, which gives None; or go on with `opened`."""
    deadline = (
        timeout
        if isinstance(timeout, Deadline)
        else Deadline(timeout, None if opened is None else opened.flight.began)
    )
    for retries in range(supervisor.spec.role.retry, -1, -1):
        try:
            if opened is None:
                opened = yield from open_call(supervisor, driver, kind, payload, deadline)
            return (yield from _only_item(opened, kind, deadline))
        except (WorkerCrashed, WorkerStuck):
            if not retries:
                raise
            opened = None
    raise AssertionError("unreachable")


def _only_item(opened: OpenCall, kind: str, deadline: Deadline) -> Steps[Any]:
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
    """Ask the heartbeat of each of the role's workers; seconds until the last has answered."""
    deadline = Deadline(timeout)
    began = time.monotonic()
    for incarnation in supervisor.living() or [(yield from _started(supervisor, deadline))]:
        try:
            native = incarnation.channel.ping(driver.notifier(incarnation))
            yield incarnation, native, "event", deadline.left()
        except CallTimeout:
            raise deadline.error() from None
        except PeerDied as error:
            raise supervisor.explain(incarnation, error) from None
        except PoolClosed:
            if supervisor.is_closed:
                raise
    return time.monotonic() - began
