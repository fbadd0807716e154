"""What a role is: as the user gives it, and as its workers are told."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from inferpool.config import (
    ChatConfig,
    EmbedConfig,
    Hosting,
    Policy,
    PoolOptions,
    RerankConfig,
    Role,
    VisionConfig,
)
from inferpool.messages import Sandbox, Start

__all__ = ["ModelLike", "RoleLike", "RoleSpec"]

Config = ChatConfig | EmbedConfig | RerankConfig | VisionConfig
ModelLike = str | os.PathLike[str]
"""A model's name or path."""
RoleLike = ModelLike | Config | Role
"""What a role can be given as: a model's name or path, a config, or a `Role` of one's own."""

_CONFIGS: Mapping[str, type[Config]] = {
    "chat": ChatConfig,
    "embed": EmbedConfig,
    "rerank": RerankConfig,
    "vision": VisionConfig,
}
# What configs and `Role` have in common.
_HOSTING = frozenset({*(field.name for field in dataclasses.fields(Hosting)), "retry"})


@dataclass(frozen=True)
class RoleSpec:
    """A role by name, and how its workers are started."""

    name: str
    role: Role
    options: PoolOptions
    folder: Path | None
    """Where its workers start, so that relative paths stay what they were when it was given."""

    @classmethod
    def of(cls, name: str, given: RoleLike, options: PoolOptions) -> RoleSpec:
        """What `given` says.

        Raises:
            TypeError: it is nothing that a role of this name can be given as.
            ValueError: the name is not an identifier.
        """
        return cls(name, _as_role(name, given), options, _working_folder())

    @property
    def policy(self) -> Policy:
        """How its workers are treated."""
        return self.role.policy or self.options.policy

    @property
    def model(self) -> str | None:
        """Its model by name or path; None if it has none."""
        return self.role.options.get("model")

    def with_model(self, model: str) -> RoleSpec:
        """The same with another model.

        Raises:
            TypeError: the role has none, or this is neither a name nor a path.
        """
        if self.model is None:
            raise TypeError(f"role {self.name!r} has no model that a call could name")
        if not isinstance(model, str):  # os.PathLike may stand for bytes
            raise TypeError(f"model must be a name or a path, not {type(model).__name__}")
        readable = [model if each == self.model else each for each in self.role.readable]
        options = {**self.role.options, "model": model}
        role = dataclasses.replace(self.role, options=options, readable=readable)
        return dataclasses.replace(self, role=role, folder=_working_folder())

    def sandbox(self, log: Path | None) -> Sandbox:
        """What a worker shall give up, but for its log."""
        role = self.role
        # A role of one's own may be anywhere; the package's own are where the interpreter looks.
        own = role.session.partition(":")[0].startswith("inferpool.")
        folders = [] if own else [entry or "." for entry in _module_path()]
        start = self.folder or Path()  # where the worker looks for relative ones
        return Sandbox(
            level=role.sandbox,
            # As an import does, and not `Path.exists`, this passes over what may not be looked at.
            readable=[
                *map(str, role.readable),
                *(each for each in folders if os.access(start / each, os.F_OK)),
            ],
            locate="inferpool.models:readable",
            log_path=None if log is None else str(log),
        )

    def start(self, incarnation: int, log: Path | None) -> Start:
        """The first message to a worker."""
        return Start(
            role=self.name,
            incarnation=incarnation,
            session=self.role.session,
            handlers=self.role.handlers,
            options=dict(self.role.options),
            log_path=None if log is None else str(log),
            log_level=self.options.log_level,
            sys_path=_module_path(),
        )


def _working_folder() -> Path | None:
    try:
        return Path.cwd()
    except OSError:  # it was removed
        return None


def _module_path() -> list[str]:
    """``sys.path`` without folders whose names are not UTF-8, which can't travel."""
    entries = map(str, sys.path)
    return [entry for entry in entries if entry.encode(errors="ignore").decode() == entry]


def _as_role(name: str, given: RoleLike) -> Role:
    if not name.isidentifier():  # it names a file of the log directory too
        raise ValueError(f"a role's name must be an identifier, not {name!r}")
    if isinstance(given, Role):
        return given
    config_class = _CONFIGS.get(name)
    if config_class is None:
        raise TypeError(
            f"{name!r} is neither an option of a pool nor a built-in role ({', '.join(_CONFIGS)}); "
            "a role of your own needs Role(session=..., handlers=...)"
        )
    if isinstance(given, str | os.PathLike) and not issubclass(config_class, VisionConfig):
        given = config_class(os.fspath(given))
    if not isinstance(given, config_class):
        raise TypeError(
            f"{name} takes a model, {config_class.__name__} or Role, not {type(given).__name__}"
        )
    module = f"inferpool.roles.{name}"
    options = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    # What the host is to know of the role is not the session's business.
    hosting = {name: options.pop(name) for name in _HOSTING if name in options}
    return Role(
        f"{module}:make_session",
        f"{module}:HANDLERS",
        options,
        sandbox=given.sandbox or ("basic" if given.n_gpu_layers else "confined"),
        readable=[options[name] for name in ("model", "mmproj") if options.get(name)],
        **hosting,
    )
