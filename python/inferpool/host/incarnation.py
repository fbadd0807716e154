"""One life of a worker: its process, its channel, and what can be said of its end."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from inferpool import codec
from inferpool._transport import Event, HostChannel
from inferpool.errors import (
    InferpoolError,
    ProtocolError,
    RemoteError,
    WorkerCrashed,
    WorkerStartError,
    WorkerStuck,
)
from inferpool.host.flight import Flight
from inferpool.host.process import (
    OomWitness,
    RoleLogFile,
    WorkerProcess,
    call_later,
    low_descriptors_taken,
    native_message,
    resident_bytes,
)
from inferpool.host.spec import RoleSpec
from inferpool.host.startup import Startup
from inferpool.host.status import WorkerStatus
from inferpool.host.watch import SIGNAL_SECONDS, Watch
from inferpool.messages import ErrorInfo, Ready, WorkerArguments

__all__ = ["Incarnation", "remote_error"]

_FRAME_LIMIT = 1 << 30
"""Bytes of the largest frame."""
_RING_CAPACITY = 4 << 20
"""Bytes of each ring; larger frames flow through in fragments."""
_REAP_SECONDS = 5.0
"""How long a killed process may take to go."""
_DYING_SECONDS = 0.5
"""How long a process may take to go once its end of the channel is closed: the kernel closes
descriptors last. An event loop that learns of it is held up meanwhile."""


class Incarnation:
    """A worker process from its start to its end.

    Attributes:
        flights: calls that have not ended here.
        lingering: calls that were given up here, while the worker goes on with them.
        asking: as many entries as threads are about to send, or have just sent, a call that is no
            flight yet, see `calls.try_call`.
        watch: how its progress is going.
        last_used: when the last call ended, or before the first, when the worker was started.
        retired: whether it takes no more calls.
        asked_to_end: whether `ask_to_end` was called.
    """

    def __init__(
        self,
        spec: RoleSpec,
        number: int,
        replica: int,
        on_retired_idle: Callable[[Incarnation], object],
    ) -> None:
        """Start the process and send it its first message. Does not wait for the session.

        Args:
            spec: the role.
            number: of this incarnation, among all of the role's.
            replica: which of the role's replicas this is, from 0.
            on_retired_idle: called when the last call of a retired worker has ended.

        Raises:
            WorkerStartError: the process could not be started.
        """
        self.spec = spec
        self.number = number
        self.replica = replica
        self.started = self.last_used = time.monotonic()
        self.retired = False
        self._retired_for_good = False
        self.flights: set[Flight] = set()
        self.asking: list[None] = []
        self.lingering: set[Flight] = set()
        self._suspect: Flight | None = None
        self._on_retired_idle = on_retired_idle
        self._ladder: threading.Timer | None = None
        self._cause: str | None = None
        self._stuck = False
        self.asked_to_end = False
        self._in_flight: tuple[str, ...] = ()
        self._oom_witness = OomWitness()
        self._startup = Startup()
        self._violation: ProtocolError | None = None
        self._exit: str | None = None
        self._tail = ""
        self._native: str | None = None
        # A signal's handler may close the pool amid `end`.
        self._lock = threading.RLock()
        self._ending = False
        with contextlib.ExitStack() as undo:
            try:
                with low_descriptors_taken():
                    self._log = RoleLogFile(spec.options.log_dir, spec.name)
                    undo.callback(self._log.close)
                    # Its descriptors go with it, and must not wait for the exception to be
                    # collected.
                    undo.callback(self.__dict__.pop, "channel", None)
                    self.channel = HostChannel(
                        ring_capacity=_RING_CAPACITY,
                        frame_limit=_FRAME_LIMIT,
                        wait=spec.options.wait,
                    )
                    self._process = self._spawn()
            except (OSError, MemoryError, UnicodeEncodeError) as error:  # a path may be no UTF-8
                raise WorkerStartError(
                    f"cannot start a worker for role {spec.name!r}: {error}",
                    role=spec.name,
                    incarnation=number,
                ) from error
            undo.pop_all()
        self.watch = Watch(self.channel, self.pid)
        try:
            self.channel.watch(self._process.pid)
            start = spec.start(number, self._log.path)
            self._startup.begin(self.channel.open(codec.encode("start", start)))
        except (InferpoolError, OSError, MemoryError) as error:
            failure = self.start_error(f"could not be reached: {error}")
            del self.channel  # as above
            raise failure from error
        except BaseException:
            self.end()
            raise

    def _spawn(self) -> WorkerProcess:
        fds = self.channel.worker_fds()
        arguments = WorkerArguments(
            fds=fds,
            host_pid=os.getpid(),
            frame_limit=_FRAME_LIMIT,
            wait=self.spec.options.wait,
            sandbox=self.spec.sandbox(self._log.path),
        )
        environment = self.spec.role.environment_of(self.replica)
        argument = msgspec.json.encode(arguments).decode()
        return WorkerProcess(argument, fds, self._log, environment, self.spec.folder)

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._process.pid

    @property
    def ready(self) -> Ready | None:
        """What the worker said of its session; None as long as it has not been heard."""
        return self._startup.ready

    @property
    def ended(self) -> bool:
        """Whether the incarnation is known to be over. Cheap, and may lag behind `alive`."""
        return self._exit is not None or self.channel.ended

    @property
    def alive(self) -> bool:
        """Whether the worker can take calls; asks the kernel."""
        return not self.ended and not self.channel.wait_death(0)

    def is_ready(self) -> bool:
        """Whether the session stands, as far as the worker has said."""
        with self._lock:
            self._poll_start()
            return self.ready is not None

    def in_flight(self) -> int:
        """How many calls have not ended."""
        return len(self._ids()) + len(self._without_slot())

    def _ids(self) -> list[int]:
        """Of the calls that have a slot; the start message does not count."""
        return [id for id in self.channel.in_flight() if id != self._startup.id]

    def _without_slot(self) -> list[Flight]:
        return [each for each in list(self.flights) if each.call is None or not each.call.id]

    def cancel_all(self) -> int:
        """Cancel the calls in flight, and say how many those were.

        Those that have no slot yet look for themselves, see `Flight.cancelled`.
        """
        count = self.in_flight()
        flights = list(self.flights)
        for flight in flights:
            flight.cancelled = True
        # Last: a call that did not see that any more has its slot by now.
        for id in self._ids():
            self.channel.cancel(id)
        for flight in flights:
            self.give_up(flight)
        return count

    def begin(self, flight: Flight) -> bool:
        """Note a call that is about to be sent; false if this worker takes no more.

        Whoever begins a call finishes it, whatever a signal's handler raises meanwhile.
        """
        self.begun(flight)
        # In this order: `retire` looks at the flights after it has said so.
        if self.retired:
            self.finish(flight)
            return False
        return True

    def begun(self, flight: Flight) -> None:
        """Note a call that has been sent."""
        if not self.flights:
            self.watch.begin()
        self.flights.add(flight)

    def finish(self, flight: Flight, *, dropped: bool = False) -> None:
        """Note that the call has ended here. Does so once.

        Args:
            flight: the call.
            dropped: its object was collected, which can happen wherever memory is allocated, under
                any lock; so none of ours is taken, and the next call has an eye on the worker.
        """
        if flight not in self.flights:
            return  # not again when its object goes, which at exit may be too late for a thread
        self.give_up(flight, watch=not dropped)
        self.flights.discard(flight)
        if flight.given_up_at is None:
            self.watch.frozen = 0.0
        if not self.flights:
            self.last_used = time.monotonic()
            self.leave_if_retired()

    def give_up(self, flight: Flight, *, watch: bool = True) -> None:
        """Make sure that the worker does not go on for long with a call that has ended here."""
        call = flight.call
        if call is None or call.is_over() or flight.given_up_at is not None:
            return
        flight.given_up_at = time.monotonic()
        flight.ladder.rung = "abort" if call.taken else "flag"
        self.lingering.add(flight)
        if watch:
            with self._lock:
                self._set_ladder()

    def _set_ladder(self) -> None:
        if self._ladder is None and not self.ended:
            self._ladder = call_later(self.spec.policy.cancel_grace, self._climb)

    def _climb(self) -> None:
        """Some time after a call was given up: see that the worker has let go of it."""
        with self._lock:
            self._ladder = None
            if self.is_held():
                self._set_ladder()
        self.check()

    def is_held(self) -> bool:
        """Whether the worker goes on with a call that was given up, or did so until it ended."""
        if self.lingering and not self.ended:  # from then on every call is over
            over = [each for each in list(self.lingering) if each.call and each.call.is_over()]
            self.lingering.difference_update(over)
        return bool(self.lingering)

    def check(self) -> None:
        """Kill the worker if it is overdue: with its session, with progress, with letting go.

        Whoever waits for an answer calls this now and then; its call then learns of the end.
        """
        policy = self.spec.policy
        now = time.monotonic()
        if self.ended:
            return
        if not self.is_ready():
            if now - self.started > policy.start_timeout:
                self._condemn(f"did not start within {policy.start_timeout:g} s", stuck=False)
            self.watch.begin()
            return
        frozen = self.watch.look()
        if policy.stuck_after is not None and self.flights and frozen >= policy.stuck_after:
            self._condemn(f"made no progress for {policy.stuck_after:g} s", stuck=True)
        grace = policy.cancel_grace
        if not self.is_held():
            return
        for flight in list(self.lingering):
            if now - (flight.given_up_at or now) < grace or not flight.taken():
                continue
            # A worker that serves others may need longer, as long as it gets on.
            if self.flights - self.lingering and frozen < grace:
                flight.ladder.rung = "grace"
                continue
            flight.ladder.rung = "kill"
            self._condemn(f"did not let go of a cancelled call within {grace:g} s", stuck=True)

    def _condemn(self, problem: str, *, stuck: bool) -> None:
        with self._lock:
            if self._exit is None and self._cause is None:
                self._cause = f"killed by the host: it {problem}"
                self._stuck = stuck
        self.end()

    def retire(self, *, only_if_idle: bool = False) -> bool:
        """Let the worker take no more calls; whether none is in flight.

        With `only_if_idle` it goes on taking them if one is.
        """
        self.retired = True
        if only_if_idle and not self._is_idle():
            self.retired = False
            return False
        self._retired_for_good = True
        # A call that ended before this was said has told nobody.
        return only_if_idle or self._is_idle()

    def _is_idle(self) -> bool:
        return not (self.flights or self.asking or self.in_flight())

    def leave_if_retired(self) -> None:
        """Have a retired worker end, if what has just ended was its last call."""
        if self.asked_to_end:
            return
        if self._retired_for_good and not self.flights and not self.asking:
            self._on_retired_idle(self)

    def start_error(self, problem: str) -> InferpoolError:
        """End a worker that is not ready, and say why it never will be."""
        self.end()
        with self._lock:
            if self._violation is not None:
                return self._violation
            if self._startup.failure is not None:
                return self._why_not_ready(self._startup.failure)
        return WorkerStartError(
            f"the worker of role {self.spec.name!r} {problem}", **self._evidence()
        )

    def explain(self, error: InferpoolError) -> InferpoolError:
        """End the incarnation after an error of its channel, and say what happened to a call."""
        if isinstance(error, ProtocolError):
            self._condemn(f"broke the wire format: {error}", stuck=False)
            return error
        # A process whose descriptors have closed is on its way out, and its own way says more
        # than the signal that would end it here.
        if not self.channel.wait_death(_DYING_SECONDS):
            self._condemn("closed its channel and went on", stuck=False)
        ready = self.is_ready()
        self.end()
        how = self._exit if self._cause is None else f"{self._exit}, {self._cause}"
        if not ready:
            return self.start_error(f"ended while it started ({how})")
        who = f"the worker of role {self.spec.name!r} (pid {self.pid}, incarnation {self.number})"
        if self._stuck:
            return WorkerStuck(f"{who} {self._cause}", **self._evidence())
        said = "" if self._native is None else f"; it said: {self._native}"
        return WorkerCrashed(f"{who} died: {how}{said}", **self._evidence())

    def ask_to_end(self) -> None:
        """Tell the worker to end, and fail the calls in flight with `PoolClosed`. Never waits."""
        self.asked_to_end = True
        self.is_held()  # for the epitaph
        self.channel.close()

    def end(self, timeout: float = 0.0) -> None:
        """Make sure that the worker has ended: by SIGKILL after `timeout` seconds. Idempotent."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            if self.channel.wait_death(min(SIGNAL_SECONDS, left)):
                # Where only a closed channel tells of it, the process may be on its way out yet.
                self._process.reap(left)
                break
        with self._lock:
            if self._exit is None and not self._ending:
                self._ending = True
                try:
                    self._end()
                finally:
                    self._ending = False

    def _end(self) -> None:
        self._poll_start()
        self._note_suspects()
        # Whoever waits for a call sees the death, once what was committed is read.
        self._process.kill()
        # Said in any case: what the kernel does not let go of must not be ended twice, since by
        # then the log's descriptor may be another file's.
        gone = self._process.reap(_REAP_SECONDS)
        self._exit = gone or f"unknown, since it was not gone {_REAP_SECONDS:g} s after SIGKILL"
        self._tail = self._log.tail()
        self._native = native_message(self._tail)
        unexplained = self._exit == "SIGKILL" and self._cause is None
        if unexplained and not self.asked_to_end and self._oom_witness.saw_kill():
            self._cause = "killed by the kernel for want of memory"
        self._log.append(self.epitaph())
        self._log.close()
        if self._ladder is not None:
            self._ladder.cancel()
            self._ladder = None  # its thread alone must not keep the channel

    def _note_suspects(self) -> None:
        self.is_held()  # which forgets the calls that the worker had let go of
        flights = self.flights | self.lingering
        self._in_flight = tuple(sorted(flight.describe() for flight in flights))
        taken = [flight for flight in flights if flight.taken()]
        if len(taken) == 1:  # with several, nobody knows which of them it was
            self._suspect = taken[0]

    @property
    def by_itself(self) -> bool:
        """Whether what the worker did ended it, and no signal that others send."""
        by_others = {"SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"}
        return not self._stuck and (self._cause is not None or self._exit not in by_others)

    @property
    def suspect(self) -> Flight | None:
        """After a crash that a request may have caused: the only one that the worker had taken."""
        return self._suspect if self.by_itself and self.ready is not None else None

    @property
    def crashed(self) -> bool:
        """Whether the worker ended though nobody had asked it to, or had to be killed."""
        asked = self.asked_to_end and self._cause is None
        return self._exit is not None and not asked and self._startup.failure is None

    def status(self) -> WorkerStatus:
        """See `WorkerStatus`."""
        self.is_held()  # as above
        flights = sorted(self.flights | self.lingering, key=lambda flight: flight.began)
        ready = self.is_ready()
        if not self.alive:
            state = "dead"
        elif ready:
            state = "busy" if self.flights else "ready"
        else:
            state = "starting"
        return WorkerStatus(
            state=state,
            pid=self.pid,
            incarnation=self.number,
            replica=self.replica,
            uptime=time.monotonic() - self.started,
            loading=self._startup.loading,
            load_seconds=self.ready.load_seconds if self.ready else None,
            sandbox=self.ready.sandbox if self.ready else None,
            memory=resident_bytes(self.pid),
            calls=tuple(flight.status() for flight in flights),
            progress=self.watch.counts(),
            frozen=self.watch.frozen,
        )

    def epitaph(self) -> str:
        """How the worker ended, in a line."""
        cause = "closed" if self.asked_to_end and self._cause is None else self._cause
        details = [
            f"worker {self.pid} (incarnation {self.number}) ended: {self._exit}",
            *([cause] if cause else []),
            *([f"in flight: {', '.join(self._in_flight)}"] if self._in_flight else []),
        ]
        return "; ".join(details)

    def _poll_start(self) -> None:
        try:
            self._startup.poll()
        except ProtocolError as error:
            if self._violation is None:
                self._violation = error
                self._cause = f"killed by the host: it broke the wire format: {error}"
                self._process.kill()

    def _why_not_ready(self, failure: Event) -> InferpoolError:
        error = remote_error(failure)
        if not isinstance(error, RemoteError):
            return error
        problem = f"role {self.spec.name!r} could not build its session: {error}"
        why = WorkerStartError(problem, **self._evidence())
        why.add_note(error.remote_traceback)
        return why

    def _evidence(self) -> dict[str, Any]:
        return {
            "role": self.spec.name,
            "pid": self.pid,
            "incarnation": self.number,
            "exit": self._exit,
            "cause": self._cause,
            "in_flight": self._in_flight,
            "native_message": self._native,
            "log_tail": self._tail,
        }


def remote_error(event: Event) -> InferpoolError:
    """The exception that an ``"error"`` event stands for."""
    return codec.decode_as(event.parts, ErrorInfo).exception()
