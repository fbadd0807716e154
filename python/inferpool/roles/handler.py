"""What a role's session factory and handlers are given, and how they read it.

The worker passes objects of these shapes; naming only the shapes here lets a role run, and
be tested, without a worker.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from inferpool.engine.abort import AbortToken
from inferpool.messages import read

__all__ = ["KindHandler", "Reply", "RoleConfig", "State", "read_options"]

T = TypeVar("T")


class Reply(Protocol):
    """Answers the call that is being served."""

    @property
    def abort(self) -> AbortToken:
        """Set when this call should end."""

    def send(self, kind: str, payload: Any) -> None:
        """Send one frame."""


class State(Protocol):
    """What the worker keeps between calls."""

    @property
    def session(self) -> Any:
        """What the role's session factory returned."""


class RoleConfig(Protocol):
    """How the role was configured."""

    @property
    def options(self) -> Mapping[str, Any]:
        """Options by name."""


KindHandler = Callable[[Reply, Any, Any], None]


def read_options(options: Mapping[str, Any], config: type[T]) -> T:
    """Convert ``options`` to the config dataclass ``config``.

    Raises:
        TypeError: for an unknown option, or one of the wrong type; by name.
        ValueError: for a wrong value; by name.
    """
    known = {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    for name in options:
        # msgspec ignores surplus fields of dataclasses.
        if name not in known:
            raise TypeError(f"{config.__name__} has no option {name!r}")
    return read(dict(options), config)
