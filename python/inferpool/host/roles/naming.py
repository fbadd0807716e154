"""A call that names its model."""

from __future__ import annotations

import os
from typing import TypedDict, TypeVar

from inferpool.host.calls import Naming
from inferpool.host.spec import ModelLike

__all__ = ["ModelOption", "naming"]

T = TypeVar("T")


class ModelOption(TypedDict, total=False):
    """What every call of a built-in role may say."""

    model: ModelLike | None
    """By name or path, the model that answers. A role that has another is given this one, as by
    `Pool.configure` but with the rest of its config as it is, and keeps it for later calls.
    Default: whichever it has."""


def naming(model: ModelLike | None, request: T) -> T | Naming:
    """The request, for this model if there is one.

    Raises:
        TypeError: `model` is neither a name nor a path.
    """
    return request if model is None else Naming(os.fspath(model), request)
