"""Framed shared memory between a host and one worker process.

The Rust crate ``inferpool-transport`` behind a thin binding. Every method that can wait does so
without the GIL, and runs Python's signal handlers when a signal arrives. Methods raise the
errors of `inferpool.errors`; `PeerDied` stands for the death of the process at the other end.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, final

__all__ = [
    "AbortToken",
    "Body",
    "Call",
    "Confinement",
    "Event",
    "HostChannel",
    "LoopNotifier",
    "Progress",
    "Request",
    "WorkerChannel",
    "confine",
    "restrain",
]

_Parts: TypeAlias = tuple[str, Any] | list[Any]
"""Kind and payload, if that is None, a bool, int, float, str or bytes, which are encoded and
decoded here; or a message and the C-contiguous buffers beside it, as they are."""

@final
class AbortToken:
    """Set once a call, or the whole worker, should stop; never cleared."""

    def union(self, other: AbortToken, /) -> AbortToken:
        """A token that is set once this one is, or `other`, of the same worker."""

    def is_set(self) -> bool:
        """Whether to stop. Each call counts as progress."""

    @property
    def cancelled(self) -> bool:
        """Whether the host has cancelled a call of this token."""

    @property
    def callback(self) -> int:
        """Address of a C function ``bool (*)(void *)`` that says the same as `is_set`.

        It needs no GIL and may be called from any thread.
        """

    @property
    def data(self) -> int:
        """Address to pass to `callback`; valid while this object lives."""

@final
class Body:
    """Received bytes, aligned to 64, as a writable buffer."""

    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class Progress:
    """How far a worker has come. Each count only grows."""

    @property
    def requests(self) -> int:
        """Requests that the worker has taken."""

    @property
    def replies(self) -> int:
        """Frames that it has sent."""

    @property
    def finished(self) -> int:
        """Requests that have ended."""

    @property
    def polls(self) -> int:
        """Times that somebody asked an `AbortToken` whether to stop."""

@final
class Event:
    """The next thing that happened to a call."""

    @property
    def kind(self) -> Literal["data", "end", "error", "pong"]:
        """One item of the answer, or how the call ended."""

    @property
    def parts(self) -> _Parts:
        """Of ``"data"`` and ``"error"``; buffers are views of one `Body`, but a short message."""

    @property
    def progress(self) -> Progress | None:
        """What a ``"pong"`` says."""

@final
class Call:
    """One call. It is given up when the object goes. One thread at a time sends or waits."""

    @property
    def id(self) -> int:
        """Unique within the channel, from 1; 0 until the request is under way."""

    @property
    def sent(self) -> bool:
        """Whether the request is all out."""

    @property
    def taken(self) -> bool:
        """Whether the worker has begun with the request, as far as it said while it lived.

        It has not with one that is not all out, whatever it has read of that.
        """

    def is_over(self) -> bool:
        """Whether the worker is done with the call, which may be long after it has ended here.

        Looks at what has arrived, without waiting.
        """

    def send(self, timeout: float | None = None) -> None:
        """Send the request, waiting for space while the worker is behind.

        Raises:
            CallTimeout: there was not enough space within `timeout` seconds.
            CallCancelled: the call was cancelled meanwhile.
            PayloadTooLarge: the request is above the frame limit.
            PeerDied, PoolClosed, ProtocolError: the channel has ended.
        """

    def try_send(self) -> bool:
        """Send what fits now, and say whether the request is all out. Raises as `send` does."""

    def await_space(self) -> bool:
        """Register this call's event loop for ``LoopNotifier.SPACE``; False: try again now.

        Raises:
            PoolClosed, ProtocolError: the channel has ended.
        """

    def next(self, timeout: float | None = None) -> Event:
        """Wait for what happens next.

        Raises:
            CallTimeout: nothing did within `timeout` seconds. The call goes on.
            CallCancelled: the call was cancelled.
            PeerDied, PoolClosed, ProtocolError: the channel has ended.
        """

    def answer(self, timeout: float | None = None) -> _Parts | None:
        """Wait for the end, and take the answer if that is one item, in the form of `Event.parts`.

        None: it is anything else, which `next` tells item by item.

        Raises:
            CallTimeout: there was no end within `timeout` seconds. The call goes on.
        """

    def poll(self) -> Event | None:
        """What happened next, or None. Never waits. Raises as `next` does."""

    def poll_messages(self) -> bytes | None:
        """Short messages that have arrived, up to 128 at once, as one msgpack array.

        None when what comes next, if anything has come, is no such message.
        """

    def spin(self) -> bool:
        """Spin for what happens next, as long as that pays; whether something has.

        For calls of an event loop. Others of its calls may have got something meanwhile.
        """

    def cancel(self) -> None:
        """End the call here at once and tell the worker. From any thread, any number of times."""

    def abandon(self) -> None:
        """Cancel the call and forget it. Does nothing once the call has ended."""

@final
class LoopNotifier:
    """What an event loop watches, beside a channel's own descriptors."""

    SPACE: int
    """Stands, in the list of `take_ready`, for space to send."""

    def __new__(cls) -> LoopNotifier: ...
    def fileno(self) -> int:
        """Readable while `take_ready` has something new."""

    def take_ready(self) -> list[int]:
        """Ids of the calls to which something happened since the last time."""

@final
class HostChannel:
    """The host's end of a channel to one worker process. Any thread may use it."""

    def __new__(cls, *, ring_capacity: int, frame_limit: int, wait: str) -> HostChannel:
        """Create the shared segment and everything else that the worker inherits.

        Args:
            ring_capacity: bytes of each of the two rings; a power of two from 128 to 2**31.
            frame_limit: bytes of the largest frame.
            wait: ``"adaptive"`` or ``"park"``.

        Raises:
            ValueError: a value out of range.
            OSError: the system has no more memory or descriptors.
        """

    def worker_fds(self) -> list[int]:
        """Descriptors that the worker must inherit, in the order it expects them."""

    def watch(self, pid: int) -> None:
        """Watch the process that inherited them, and close what only it may keep open."""

    def descriptors(self) -> list[int]:
        """What an event loop should watch; when one is readable, call `look`."""

    def open(self, parts: _Parts, notifier: LoopNotifier | None = None) -> Call:
        """Make a call whose request has these parts, and send it if that takes no waiting.

        Otherwise `Call.sent` is false, and `Call.send` or `Call.try_send` goes on.

        Args:
            parts: what the request holds; buffers are held until it is out.
            notifier: told when the call has something, if an event loop will wait for it.
        """

    def ask(self, parts: _Parts, notifier: LoopNotifier | None = None) -> _Parts | Call | None:
        """As `open`, and spin for the answer for at most 10 µs, as long as that pays.

        The GIL is kept meanwhile.

        Returns:
            The parts of an answer that is one item and a good end, as in `Event`; otherwise the
            call. None, and there is no call, if to send it would take waiting or fails.
        """

    def ping(self, notifier: LoopNotifier | None = None) -> Call:
        """Ask the worker's heartbeat how far it is; the answer is a ``"pong"``."""

    def look(self, notifier: LoopNotifier) -> bool:
        """Hand out what has arrived, without waiting; False once the channel has ended.

        Afterwards the next frame makes one of `descriptors` readable.
        """

    def cancel(self, call: int) -> None:
        """Cancel the call with this id, as its `Call.cancel` does."""

    def close(self) -> None:
        """Fail every call in flight with `PoolClosed`, and ask the worker to end."""

    @property
    def ended(self) -> bool:
        """Whether the channel has ended, for whatever reason.

        Raises:
            PoolClosed: in a forked child, which must not end the worker of its parent.
        """

    def wait_death(self, timeout: float | None = None) -> bool:
        """Wait for the watched process to end; False if it lives after `timeout` seconds."""

    @property
    def reader_behind(self) -> bool:
        """Whether the worker waits until more of some answer is read here."""

    def in_flight(self) -> list[int]:
        """Ids of the calls that have not ended; in a forked child there are none."""

    def counters(self) -> dict[str, int]:
        """Counts so far, see `inferpool.RoleStatus`."""

@final
class Request:
    """One request in the worker, and where its answer goes."""

    @property
    def parts(self) -> _Parts:
        """Parts of the frame, as in `Event`; empty when the host gave the request up half sent."""

    @property
    def call(self) -> int:
        """Id of the call."""

    @property
    def abort(self) -> AbortToken:
        """Set when this call should stop."""

    @property
    def cancelled(self) -> bool:
        """Whether this call was given up."""

    def send(self, parts: _Parts) -> None:
        """Send one item of the answer, waiting while the reader is behind.

        Raises:
            CallCancelled: nobody waits for the answer any more.
            PoolClosed: the worker shuts down, or the call has ended.
            PayloadTooLarge: the item is above the frame limit.
            ValueError: part of another item is out, see `try_send`.
        """

    def try_send(self, parts: _Parts) -> bool:
        """As `send`, but false where that would wait; then try again with the same parts.

        Raises:
            ValueError: part of another item is out. The call can still end, or fail.
        """

    def fail(self, parts: _Parts) -> None:
        """End the call with an error that these parts describe."""

    def end(self) -> None:
        """End the call."""

@final
class WorkerChannel:
    """The worker's end of a channel."""

    def __new__(
        cls, fds: Sequence[int], *, host_pid: int, frame_limit: int, wait: str
    ) -> WorkerChannel:
        """Take over the inherited descriptors and start the heartbeat thread.

        From then on the process ends when the host does.
        """

    def receive(self, timeout: float | None = None) -> Request | None:
        """Wait for a request; None when there is something else to look at.

        Args:
            timeout: seconds to wait at most; 0 takes what is there.
        """

    @property
    def shutting_down(self) -> bool:
        """Whether the worker should end."""

    @property
    def unexpected_control(self) -> int:
        """Control messages that made no sense and were dropped."""

    @property
    def abort(self) -> AbortToken:
        """Set when the worker should end."""

    def shut_down(self) -> None:
        """Make `shutting_down` true and wake whoever waits."""

    def join_heartbeat(self) -> None:
        """End the heartbeat thread."""

@final
class Confinement:
    """What `confine` achieved, as tried afterwards."""

    @property
    def files(self) -> bool:
        """Whether opening a path that was not allowed fails."""

    @property
    def calls(self) -> bool:
        """Whether making a socket fails, and with it every other forbidden system call."""

    @property
    def missing(self) -> list[str]:
        """Why something was not achieved; empty when nothing is missing."""

def restrain() -> None:
    """Give up new privileges, core dumps, and descriptors beyond 4096; for good.

    Raises:
        OSError: the system refused.
    """

def confine(*, readable: Sequence[str], writable: Sequence[str]) -> Confinement:
    """Give up files, network and other processes, as far as the kernel can; for good.

    The process must have one thread only: others would stay free.

    Args:
        readable: files, and folders with all that they hold; what does not exist is passed over.
        writable: files that may be read and written.
    """
