"""A call to a built-in role, whose errors are part of its interface."""

from __future__ import annotations

from typing import Any

from inferpool.errors import RemoteError
from inferpool.host.calls import Driver, Steps, call
from inferpool.host.supervisor import Supervisor

__all__ = ["as_builtin", "ask"]

# What a built-in role raises about an argument that only the worker can judge.
_BUILTINS = {cls.__name__: cls for cls in (TypeError, ValueError)}


def as_builtin(error: RemoteError) -> Exception:
    """The builtin exception that the worker raised, or the error itself."""
    cls = _BUILTINS.get(error.type_name)
    return error if cls is None else cls(error.message)


def ask(
    supervisor: Supervisor, driver: Driver, kind: str, payload: Any, timeout: float | None
) -> Steps[Any]:
    """As `call`, but a ``TypeError`` or ``ValueError`` in the worker is one at the caller."""
    try:
        return (yield from call(supervisor, driver, kind, payload, timeout))
    except RemoteError as error:
        raise as_builtin(error) from error
