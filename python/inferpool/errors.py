"""The one exception tree of the package.

::

    InferpoolError
    ├── WorkerError             the process behind a role
    │   ├── WorkerStartError    it could not start or load its session
    │   ├── WorkerCrashed       it died while calls were in flight
    │   ├── WorkerStuck         it made no progress, and was killed
    │   └── RoleDegraded        too many crashes; `Pool.reset` allows more
    ├── CallError               one call
    │   ├── CallTimeout         (also a TimeoutError)
    │   ├── CallCancelled
    │   ├── QueueFull
    │   ├── PayloadTooLarge     (also a ValueError)
    │   ├── InvalidRequest      (also a ValueError)
    │   ├── PoisonousRequest    it crashed a worker twice
    │   └── RemoteError         the handler raised
    ├── ModelError              the model or its context
    │   ├── ModelNotFound
    │   ├── ModelLoadError
    │   └── ContextLengthExceeded
    ├── ProtocolError           the other side broke the wire format
    ├── PeerDied                internal; callers see WorkerCrashed
    └── PoolClosed

A builtin is raised where a builtin says it: ``TypeError`` for an argument of the
wrong type or an unknown option, ``ValueError`` for a wrong value.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "CallCancelled",
    "CallError",
    "CallTimeout",
    "ContextLengthExceeded",
    "GivenUp",
    "InferpoolError",
    "InvalidRequest",
    "ModelError",
    "ModelLoadError",
    "ModelNotFound",
    "PayloadTooLarge",
    "PeerDied",
    "PoisonousRequest",
    "PoolClosed",
    "ProtocolError",
    "QueueFull",
    "RemoteError",
    "RoleDegraded",
    "WorkerCrashed",
    "WorkerError",
    "WorkerStartError",
    "WorkerStuck",
]


class InferpoolError(Exception):
    """Base of every error that this package defines. Can be copied and pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        # By what it has, since constructors differ.
        return _restore, (type(self), self.args), self.__dict__


def _restore(cls: type[InferpoolError], args: tuple[Any, ...]) -> InferpoolError:
    return cls.__new__(cls, *args)


class WorkerError(InferpoolError):
    """The process behind a role failed.

    Attributes:
        role: name of the role.
        pid: process id of the worker, or None when none was started.
        incarnation: which life of the role's worker this was, counted from 1.
        exit: how it ended, by name (``"SIGKILL"``, ``"exit code 1"``), or None
            while that is unknown.
        cause: why, where more is known than that: the host killed it, or the kernel did for
            want of memory.
        in_flight: what it was doing: kind and age of each call.
        native_message: what a native library said at the end, such as a failed assertion.
        log_tail: the last lines of the role's log, native messages included.
    """

    def __init__(
        self,
        message: str,
        *,
        role: str,
        pid: int | None = None,
        incarnation: int = 0,
        exit: str | None = None,
        cause: str | None = None,
        in_flight: tuple[str, ...] = (),
        native_message: str | None = None,
        log_tail: str = "",
    ) -> None:
        text = f"{message}\n--- last log lines ---\n{log_tail}" if log_tail else message
        super().__init__(text)
        self.role = role
        self.pid = pid
        self.incarnation = incarnation
        self.exit = exit
        self.cause = cause
        self.in_flight = in_flight
        self.native_message = native_message
        self.log_tail = log_tail


class WorkerStartError(WorkerError):
    """The worker process could not be started, or its session could not be built."""


class WorkerCrashed(WorkerError):
    """The worker died while this call was in flight. The next call starts a new one."""


class WorkerStuck(WorkerError):
    """The worker lived but got nowhere, and was killed. The next call starts a new one."""


class RoleDegraded(WorkerError):
    """The role's workers crashed too often. It refuses calls until `Pool.reset`."""


class CallError(InferpoolError):
    """One call failed; the worker goes on."""


class GivenUp:
    """How far the worker had to be pressed to let go of a call that was given up.

    Attributes:
        rung: ``"flag"``: it was told before it began with the call. ``"abort"``: the abort token
            told it amid the call. ``"grace"``: it goes on for longer than ``cancel_grace``, for the
            sake of other calls. ``"kill"``: it was killed.
    """

    __slots__ = ("rung",)

    def __init__(self) -> None:
        self.rung = "flag"


class _Cancelled(CallError):
    ladder: GivenUp = GivenUp()

    @property
    def rung(self) -> str:
        """How far the worker had to be pressed until now, see `GivenUp`; may still rise."""
        return self.ladder.rung


class CallTimeout(_Cancelled, TimeoutError):
    """The call's ``timeout`` ran out. The call was cancelled."""


class CallCancelled(_Cancelled):
    """The call was cancelled from another thread, or its stream was closed."""


class PoisonousRequest(CallError):
    """The same request has crashed a worker twice. It is refused until `Pool.reset`."""


class QueueFull(CallError):
    """``max_queue`` calls are in flight, or the worker has had no room for a request for 30 s."""


class PayloadTooLarge(CallError, ValueError):
    """The encoded payload is above the channel's frame limit."""


class InvalidRequest(CallError, ValueError):
    """The worker refuses what the request asks for: the model can't do it, or it makes no sense."""


class RemoteError(CallError):
    """The handler raised.

    Attributes:
        type_name: class name of the exception in the worker, after its module's if this package
            has an error of that name.
        message: its text.
        remote_traceback: the traceback as the worker formatted it.
    """

    def __init__(self, type_name: str, message: str, remote_traceback: str = "") -> None:
        super().__init__(f"{type_name}: {message}" if message else type_name)
        self.type_name = type_name
        self.message = message
        self.remote_traceback = remote_traceback


class ModelError(InferpoolError):
    """The model, or what was asked of it."""


class ModelNotFound(ModelError):
    """No model has this name, and no file this path."""


class ModelLoadError(ModelError):
    """The file is there but llama.cpp could not load it as asked."""


class ContextLengthExceeded(ModelError):
    """The request needs more tokens than the model's context has.

    Attributes:
        details: the numbers behind it, in tokens, by name (for example
            ``{"asked": 900, "context": 512, "response_budget": 64}``).
    """

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.details = details


class ProtocolError(InferpoolError):
    """The other side of a channel broke the wire format; the worker was killed."""


class PoolClosed(InferpoolError):
    """The pool is closed, or was inherited through a fork."""


class PeerDied(InferpoolError):
    """The process at the other end is gone. Internal: callers see `WorkerCrashed`."""
