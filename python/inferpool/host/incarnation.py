"""One life of a worker: its process, its channel, and what can be said of its end."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from inferpool import codec, errors
from inferpool._transport import Call, Event, HostChannel
from inferpool.config import PoolOptions, Role
from inferpool.errors import (
    CallTimeout,
    InferpoolError,
    ProtocolError,
    RemoteError,
    WorkerCrashed,
    WorkerStartError,
)
from inferpool.host.process import RoleLogFile, WorkerProcess
from inferpool.messages import ErrorInfo, Ready, Sandbox, Start, WorkerArguments

__all__ = ["Incarnation", "RoleSpec", "remote_error"]

_FRAME_LIMIT = 1 << 30
"""Bytes of the largest frame."""
_RING_CAPACITY = 4 << 20
"""Bytes of each ring; larger frames flow through in fragments."""
_REAP_SECONDS = 5.0
"""How long a killed process may take to go."""


@dataclass(frozen=True)
class RoleSpec:
    """A role by name, and how its workers are started."""

    name: str
    role: Role
    options: PoolOptions


class Incarnation:
    """A worker process from its start to its end."""

    def __init__(self, spec: RoleSpec, number: int) -> None:
        """Start the process and send it its first message. Does not wait for the session.

        Raises:
            WorkerStartError: the process could not be started.
        """
        self.spec = spec
        self.number = number
        self.started = time.monotonic()
        self.ready: Ready | None = None
        self.loading = 0.0
        self._start_call: Call | None = None
        self._start_id = 0
        self._start_error: InferpoolError | None = None
        self._exit: str | None = None
        self._tail = ""
        self._lock = threading.Lock()
        with contextlib.ExitStack() as undo:
            try:
                self._log = RoleLogFile(spec.options.log_dir, spec.name)
                undo.callback(self._log.close)
                # Its descriptors go with it, and must not wait for the exception to be collected.
                undo.callback(self.__dict__.pop, "channel", None)
                self.channel = HostChannel(
                    ring_capacity=_RING_CAPACITY, frame_limit=_FRAME_LIMIT, wait=spec.options.wait
                )
                self._process = self._spawn()
            except OSError as error:
                raise WorkerStartError(
                    f"cannot start a worker for role {spec.name!r}: {error}",
                    role=spec.name,
                    incarnation=number,
                ) from error
            undo.pop_all()
        try:
            self.channel.watch(self._process.pid)
            self._start_call = self._send_start()
            self._start_id = self._start_call.id
        except (InferpoolError, OSError) as error:
            raise self.start_error(f"could not be reached: {error}") from error
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
            sandbox=self._sandbox(),
        )
        return WorkerProcess(msgspec.json.encode(arguments).decode(), fds, self._log)

    def _sandbox(self) -> Sandbox:
        role = self.spec.role
        # A role of one's own may be anywhere; the package's own are where the interpreter looks.
        own = role.session.partition(":")[0].startswith("inferpool.")
        modules = [] if own else [path for path in map(Path, sys.path) if path.exists()]
        return Sandbox(
            level=role.sandbox,
            readable=[*role.readable, *map(str, modules)],
            locate="inferpool.models:readable",
            log_path=None if self._log.path is None else str(self._log.path),
        )

    def _send_start(self) -> Call:
        spec = self.spec
        start = Start(
            role=spec.name,
            incarnation=self.number,
            session=spec.role.session,
            handlers=spec.role.handlers,
            options=dict(spec.role.options),
            log_path=None if self._log.path is None else str(self._log.path),
            log_level=spec.options.log_level,
            sys_path=[str(entry) for entry in sys.path],
        )
        call = self.channel.open(codec.encode("start", start))
        call.send()
        return call

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._process.pid

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

    def in_flight(self) -> list[int]:
        """Ids of the calls that have not ended; the one that starts the worker is none."""
        return [id for id in self.channel.in_flight() if id != self._start_id]

    def cancel_all(self) -> int:
        """Cancel the calls in flight, and say how many those were."""
        ids = self.in_flight()
        for id in ids:
            self.channel.cancel(id)
        return len(ids)

    def check_started(self) -> float | None:
        """Note whether the session stands; seconds left for that, None once it does.

        Requests queue behind the start message, so nobody has to wait for it; whoever waits
        for an answer makes sure with this that the wait is bounded.

        Raises:
            WorkerStartError: the session did not stand in time; the worker was killed.
        """
        with self._lock:
            self._poll_start()
            if self.ready is not None:
                return None
            timeout = self.spec.options.start_timeout
            left = self.started + timeout - time.monotonic()
            if left > 0:
                return left
        raise self.start_error(f"did not start within {timeout:g} s")

    def start_error(self, problem: str) -> InferpoolError:
        """End a worker that is not ready, and say why it never will be."""
        self.end()
        with self._lock:
            if self._start_error is not None:
                return self._start_error
        return WorkerStartError(
            f"the worker of role {self.spec.name!r} {problem}", **self._evidence()
        )

    def explain(self, error: InferpoolError) -> InferpoolError:
        """End the incarnation after an error of its channel, and say what happened to a call."""
        if isinstance(error, ProtocolError):
            self.end()
            return error
        # A process whose descriptors have closed is on its way out, and its own way says more
        # than the signal that would end it here.
        self.channel.wait_death(_REAP_SECONDS)
        ready = self.is_ready()
        self.end()
        if not ready:
            return self.start_error(f"ended while it started ({self._exit})")
        return WorkerCrashed(
            f"the worker of role {self.spec.name!r} (pid {self.pid}, incarnation {self.number}) "
            f"died: {self._exit}",
            **self._evidence(),
        )

    def ask_to_end(self) -> None:
        """Tell the worker to end, and fail the calls in flight with `PoolClosed`. Never waits."""
        self.channel.close()

    def end(self, timeout: float = 0.0) -> None:
        """Make sure that the worker has ended: by SIGKILL after `timeout` seconds. Idempotent."""
        self.channel.wait_death(timeout)
        with self._lock:
            if self._exit is None:
                self._poll_start()
                # Whoever waits for a call sees the death, once what was committed is read.
                self._process.kill()
                self._exit = self._process.reap(_REAP_SECONDS)
                self._tail = self._log.tail()
                self._log.close()

    def _poll_start(self) -> None:
        while self._start_call is not None:
            try:
                event = self._start_call.next(timeout=0)
            except CallTimeout:
                return
            except InferpoolError:
                self._start_call = None  # ended, which says no more than the channel's end
                return
            if event.kind == "data":
                kind, payload = codec.decode(event.parts)
                if kind == "loading" and isinstance(payload, float):
                    self.loading = payload
                    continue
                self.ready = codec.decode_as(event.parts, Ready)
            elif event.kind == "error":
                self._start_error = self._why_not_ready(event)
            self._start_call = None

    def _why_not_ready(self, event: Event) -> InferpoolError:
        error = remote_error(event)
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
            "log_tail": self._tail,
        }


def remote_error(event: Event) -> InferpoolError:
    """The exception that an ``"error"`` event stands for.

    A `ModelError` or `CallError` of this package comes back as itself, anything else as
    `RemoteError`.
    """
    info = codec.decode_as(event.parts, ErrorInfo)
    cls = getattr(errors, info.type_name, None) if info.type_name in errors.__all__ else None
    if cls is errors.ContextLengthExceeded:
        return errors.ContextLengthExceeded(info.message, **info.details)
    travels = cls is not None and issubclass(cls, (errors.ModelError, errors.CallError))
    if cls is None or not travels or cls is RemoteError:
        return RemoteError(info.type_name, info.message, info.traceback)
    error: InferpoolError = cls(info.message)
    error.add_note(info.traceback)
    return error
