"""Keeps a role's workers: starts them, chooses between them, releases and replaces them."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Mapping

from inferpool import codec
from inferpool.errors import (
    CallCancelled,
    InferpoolError,
    PoisonousRequest,
    PoolClosed,
    QueueFull,
    RoleDegraded,
)
from inferpool.host.incarnation import Incarnation
from inferpool.host.process import call_later, resident_bytes
from inferpool.host.restart import CrashRecord
from inferpool.host.spec import RoleSpec
from inferpool.host.status import RoleStatus

__all__ = ["MemoryBudget", "Supervisor"]


class Supervisor:
    """The workers of one role.

    Attributes:
        spec: the role; a change holds for workers started from then on.
        at_hand: the worker that may get a call without another question, see `calls.try_call`.
        owner: id of the process that started workers; None before that.
        waiting: as many entries as calls wait until a worker may have them.
        cancels: how often all calls were cancelled.
    """

    def __init__(self, spec: RoleSpec, budget: MemoryBudget) -> None:
        self.spec = spec
        self._budget = budget
        self._lock = threading.RLock()
        # One place for each replica.
        self._places: list[Incarnation | None] = [None] * spec.role.replicas
        # Every worker that has not ended, those that take no more calls too.
        self._members: set[Incarnation] = set()
        self.at_hand: Incarnation | None = None
        self.owner: int | None = None
        self.waiting: list[None] = []  # no int, since threads would lose counts
        self.cancels = 0
        self._count = 0
        self._closed = False
        self._crashes = CrashRecord(spec.policy)
        self._crash_count = 0
        self._last_exit: str | None = None
        self._last_crashed = False
        self._idle_timer: threading.Timer | None = None
        self._memory_before = 0
        # Of the workers before these.
        self._counters: Counter[str] = Counter()

    @property
    def is_closed(self) -> bool:
        """Whether calls are refused for good."""
        return self._closed

    def _check_open(self) -> None:
        if self._closed:
            raise PoolClosed("the pool is closed")
        self._check_owner()

    def _check_owner(self) -> None:
        # Before a lock is taken: in a forked child, one of a thread of its parent's stays taken.
        if self.owner not in {None, os.getpid()}:
            raise PoolClosed(
                f"the workers of role {self.spec.name!r} belong to the process that started them; "
                "a forked child needs a pool of its own"
            )

    def admit(self, parts: codec.Parts, model: str | None = None) -> None:
        """Refuse a request that must not reach a worker.

        Args:
            parts: the request.
            model: which model it names, if any. Its crashes with another do not count.

        Raises:
            PoisonousRequest: it has crashed two of them.
            QueueFull: ``max_queue`` calls are in flight.
        """
        if self._crashes.is_poisonous(parts) and model in {None, self.spec.model}:
            raise PoisonousRequest(
                f"this request has crashed a worker of role {self.spec.name!r} twice"
            )
        limit = self.spec.policy.max_queue
        if limit is None:
            return
        if len(self.waiting) + sum(len(each.flights) for each in list(self._members)) >= limit:
            raise QueueFull(f"role {self.spec.name!r} has {limit} calls in flight already")

    def current(self, model: str | None = None) -> Incarnation | None:
        """The worker that should take the next call; None if one is to be started for it.

        Args:
            model: which model that worker must have; the role is given it if it has another.

        Raises:
            PoolClosed: the pool is closed, or the workers are another process's.
            TypeError: the role has no model.
        """
        self._check_open()
        if model is not None:
            with self._lock:  # nobody swaps it between the two
                if model != self.spec.model:
                    self.configure(self.spec.with_model(model))
                return self.current()
        places = self._places
        if len(places) == 1:
            only = places[0]
            return None if only is None or only.ended else only
        best = self._least_busy()
        if best is not None and best.flights and not all(places):
            return None
        return best

    def _least_busy(self) -> Incarnation | None:
        return min(self.living(), key=lambda each: len(each.flights), default=None)

    def pause(self) -> float:
        """Seconds until a worker may be started, because others have crashed."""
        self._check_open()
        with self._lock:
            self._sweep()
            if self._crashes.degraded is not None or self._least_busy() is not None:
                return 0.0
            return self._crashes.pause()

    def start(self, model: str | None = None) -> Incarnation:
        """The worker that should take the next call, started if need be. Does not wait for it.

        Args:
            model: as in `current`.

        Raises:
            PoolClosed: the pool is closed.
            RoleDegraded: there were too many crashes.
            WorkerStartError: the process could not be started.
        """
        self._budget.make_room(self, self._memory_before)
        with self._lock:
            self._sweep()
            best = self.current(model)
            if best is not None:
                return best
            best = self._least_busy()
            if self._crashes.degraded is None and (best is None or not self._crashes.pause()):
                return self._fill(self._places.index(None), model)
            if best is not None:
                return best
            raise RoleDegraded(
                f"role {self.spec.name!r} is degraded: it {self._crashes.degraded}",
                role=self.spec.name,
                incarnation=self._count,
            )

    def _fill(self, place: int, model: str | None) -> Incarnation:
        self._count += 1
        self.owner = os.getpid()
        places = self._places
        started = Incarnation(self.spec, self._count, place, self._release)
        self._members.add(started)
        if self._closed or places is not self._places or places[place] is not None:
            # A signal's handler has closed the pool meanwhile, or used it.
            started.ask_to_end()
            self._end(started)
            return self.start(model)
        places[place] = started
        policy = self.spec.policy
        limits = (policy.max_queue, policy.call_timeout)
        if len(self._places) == 1 and limits == (None, None) and not self._crashes.suspects:
            self.at_hand = started
        if policy.idle_timeout is not None and not policy.keep_alive:
            self._set_idle_timer(policy.idle_timeout)
        return started

    def living(self) -> list[Incarnation]:
        """The workers that take calls."""
        return [each for each in self._places if each is not None and not each.ended]

    def staying(self) -> list[Incarnation]:
        """The workers that have not been told to end, those that take no more calls too."""
        members = list(self._members)
        return [each for each in members if not (each.ended or each.asked_to_end)]

    def replace(self, incarnation: Incarnation) -> None:
        """Note that a worker has ended."""
        with self._lock:
            if incarnation in self._members:
                self._end(incarnation)

    def explain(self, incarnation: Incarnation, error: InferpoolError) -> InferpoolError:
        """End a worker after an error of its channel, and say what happened to a call of its."""
        explained = incarnation.explain(error)
        self.replace(incarnation)
        return explained

    def became_ready(self) -> None:
        """Note that a session is ready; with it the pool may be above its memory budget."""
        self._budget.make_room(self, 0)

    def cancel_all(self) -> int:
        """Cancel the calls in flight, and say how many those were."""
        self.cancels += 1  # first, so that a call that is counted sees it
        return len(self.waiting) + sum(each.cancel_all() for each in list(self._members))

    def check_cancelled(self, before: int) -> None:
        """Raise `CallCancelled` if all calls were cancelled since `cancels` was ``before``."""
        if self.cancels != before:
            raise CallCancelled("the call was cancelled")

    def reset(self) -> None:
        """Forget the crashes, so that the role gets workers again."""
        self._check_owner()
        with self._lock:
            self._sweep()
            self._crashes = CrashRecord(self.spec.policy)

    def configure(self, spec: RoleSpec) -> None:
        """Start workers by `spec` from now on. Those there are end after their calls."""
        self._check_open()
        with self._lock:
            self._check_open()
            self._sweep()
            retired = [each for each in self._places if each is not None]
            self._stop_idle_timer()
            self.spec = spec
            self.at_hand = None
            self._crashes = CrashRecord(spec.policy)
            self._places = [None] * spec.role.replicas
            for each in retired:
                if each.retire():
                    self._release(each)

    def release(self, incarnation: Incarnation) -> bool:
        """Let a worker end if it is idle; whether it was."""
        with self._lock:
            if incarnation not in self._places or not incarnation.retire(only_if_idle=True):
                return False
            self._places[incarnation.replica] = self.at_hand = None
            self._memory_before = resident_bytes(incarnation.pid) or 0
            self._release(incarnation)
            return True

    def _release(self, incarnation: Incarnation) -> None:
        """Let a worker end that takes no more calls, in the background."""
        incarnation.ask_to_end()
        timeout = self.spec.options.close_timeout
        waiter = threading.Thread(
            target=self._end, args=(incarnation, timeout), name="inferpool-release", daemon=True
        )
        try:
            waiter.start()
        except RuntimeError:  # the system has no thread left
            self._end(incarnation)

    def _set_idle_timer(self, seconds: float) -> None:
        if self._idle_timer is None and not self._closed:
            self._idle_timer = call_later(seconds, self._release_idle)

    def _stop_idle_timer(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    def _release_idle(self) -> None:
        with self._lock:
            self._idle_timer = None
            policy = self.spec.policy
            limit = policy.idle_timeout
            if limit is None or policy.keep_alive:
                return
            left = []
            for each in self.living():
                idle = 0.0 if each.flights else time.monotonic() - each.last_used
                if idle < limit or not self.release(each):
                    left.append(max(limit - idle, 0.01))
            if left:
                self._set_idle_timer(min(left))

    def ask_to_end(self) -> None:
        """Refuse calls from now on, fail those in flight, and tell the workers to end."""
        with self._lock:
            self.refuse()
            self._stop_idle_timer()
            for each in list(self._members):  # a signal's handler may close the pool too
                each.ask_to_end()

    def refuse(self) -> None:
        """Refuse calls from now on, and let those in flight go on."""
        self._closed = True
        self.at_hand = None

    def in_flight(self) -> int:
        """Calls that have not ended."""
        return len(self.waiting) + sum(each.in_flight() for each in list(self._members))

    def end(self, timeout: float) -> None:
        """After `ask_to_end`: make sure that the workers have ended within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        for each in list(self._members):
            self._end(each, max(0.0, deadline - time.monotonic()))

    def _sweep(self) -> None:
        """Note which workers have ended by themselves."""
        for each in list(self._members):
            if not each.asked_to_end and not each.alive:
                self._end(each)

    def _end(self, incarnation: Incarnation, timeout: float = 0.0) -> None:
        incarnation.end(timeout)
        with self._lock:
            if incarnation not in self._members:
                return
            # Its memory and descriptors go, even if a closed pool is kept.
            self._members.discard(incarnation)
            if incarnation in self._places:
                self._places[incarnation.replica] = None
            if self.at_hand is incarnation:
                self.at_hand = None
            self._counters.update(incarnation.channel.counters())
            self._last_exit = incarnation.epitaph()
            self._last_crashed = incarnation.crashed
            self._crash_count += incarnation.crashed
            if incarnation.spec is not self.spec:
                return  # what it did says nothing of the role as it is now
            if incarnation.ready is not None:
                self._crashes.loaded()
            if incarnation.crashed:
                at_load = incarnation.ready is None and incarnation.by_itself
                suspect = incarnation.suspect
                self._crashes.crashed(at_load=at_load, suspect=suspect, how=self._last_exit)

    def status(self) -> RoleStatus:
        """See `RoleStatus`."""
        if not self._closed:
            self._check_owner()
            with self._lock:
                self._sweep()
        members = [] if self._closed else sorted(self._members, key=lambda each: each.number)
        counters = self._counters.copy()
        for each in members:
            counters.update(each.channel.counters())
        workers = tuple(each.status() for each in members if not each.ended)
        states = {each.state for each in workers}
        if self._crashes.degraded is not None and not states:
            without = "degraded"
        else:
            without = "dead" if self._last_crashed and not self._closed else "stopped"
        state = next((each for each in ("busy", "ready", "starting") if each in states), without)
        first = workers[0] if workers else None
        calls = [call for each in workers for call in each.calls]
        queue = [call for call in calls if not (call.taken or call.given_up)]
        return RoleStatus(
            role=self.spec.name,
            model=self.spec.model,
            state=state,
            pid=first.pid if first else None,
            incarnation=self._count,
            uptime=first.uptime if first else None,
            loading=first.loading if first else 0.0,
            load_seconds=first.load_seconds if first else None,
            sandbox=first.sandbox if first else None,
            in_flight=len(self.waiting) + sum(each.in_flight() for each in members),
            queue=len(self.waiting) + len(queue),
            memory=sum(each.memory or 0 for each in workers),
            restarts=self._crash_count,
            last_exit=self._last_exit,
            degraded=self._crashes.degraded,
            workers=workers,
            counters=dict(counters),
        )


class MemoryBudget:
    """What the workers of a pool may have in RAM together."""

    def __init__(self, limit: int | None, supervisors: Mapping[str, Supervisor]) -> None:
        self._limit = limit
        self._supervisors = supervisors

    def make_room(self, asking: Supervisor, needed: int) -> None:
        """Release idle workers, the least recently used first, until `needed` bytes fit.

        Those of the role that asks stay, as do busy ones and those that are to be kept alive.
        """
        if self._limit is None:
            return
        everybody = [
            (each.last_used, resident_bytes(each.pid) or 0, supervisor, each)
            for supervisor in self._supervisors.values()
            for each in supervisor.staying()
        ]
        over = sum(memory for _, memory, _, _ in everybody) + needed - self._limit
        for _, memory, supervisor, each in sorted(everybody, key=lambda entry: entry[0]):
            if over <= 0:
                return
            if supervisor is asking or supervisor.spec.policy.keep_alive:
                continue
            if supervisor.release(each):
                over -= memory
