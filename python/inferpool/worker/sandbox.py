"""What a worker gives up before it opens anything of its role.

Nothing here may import numpy: its BLAS starts threads, and Landlock restricts none that already
run.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from inferpool._transport import confine, restrain
from inferpool.config import library_path
from inferpool.messages import Sandbox, SandboxReport, WorkerArguments
from inferpool.worker.log import limit_log_size

__all__ = ["SandboxIncomplete", "enter_sandbox", "import_attribute"]


class SandboxIncomplete(Exception):
    """The role is ``"strict"``, and this system does not offer all that it asks for."""


def enter_sandbox(arguments: WorkerArguments) -> SandboxReport:
    """Give up what the role does not need, for good, and say what was achieved.

    Raises:
        SandboxIncomplete: see there.
        ModelNotFound: a model that may be read is not there.
    """
    restrain()
    sandbox = arguments.sandbox
    if sandbox.level == "basic":
        return SandboxReport(level="basic")
    if sandbox.locate is not None:
        sandbox = _located(sandbox, sandbox.locate)
        if _has_threads():
            # A model was converted, with numpy. A fresh start has no threads, and the file.
            arguments = msgspec.structs.replace(arguments, sandbox=sandbox)
            argument = msgspec.json.encode(arguments).decode()
            os.execv(sys.executable, [*sys.orig_argv[:-1], argument])  # noqa: S606
    log = [] if sandbox.log_path is None else [sandbox.log_path]
    limit_log_size(Path(log[0]) if log else None)
    done = confine(readable=[*_interpreter(), *sandbox.readable], writable=log)
    if sandbox.level == "strict" and done.missing:
        raise SandboxIncomplete("; ".join(done.missing))
    achieved = {0: "basic", 1: "partial", 2: "confined"}[done.files + done.calls]
    return msgspec.convert({"level": achieved, "missing": done.missing}, SandboxReport)


def _located(sandbox: Sandbox, locate: str) -> Sandbox:
    readable = [str(path) for name in sandbox.readable for path in import_attribute(locate)(name)]
    return msgspec.structs.replace(sandbox, readable=readable, locate=None)


def _has_threads() -> bool:
    return len(list(Path("/proc/self/task").iterdir())) > 1


def _interpreter() -> list[str]:
    """Where this interpreter keeps its modules and libraries.

    ``sys.path`` is still the worker's own: without the folder of the host's script, which may be
    a home directory.
    """
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    return [*prefixes, *filter(None, sys.path), *library_path()]


def import_attribute(path: str) -> Any:
    """Import what ``"package.module:attribute"`` names."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
