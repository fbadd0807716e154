"""What a worker can still reach, and what it says of that."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from tiny_models import write_projector

from inferpool import (
    ChatConfig,
    EmbedConfig,
    Pool,
    RerankConfig,
    Role,
    SandboxReport,
    VisionConfig,
)
from inferpool.messages import Sandbox, WorkerArguments
from inferpool.models import resolve
from inferpool.worker import sandbox

TESTS = str(Path(__file__).parent)
CONFINED = SandboxReport(level="confined")
# What works for anybody, wherever the tests run, unless a sandbox is in the way.
ORDINARY = {
    "read a file in the home directory",
    "list the home directory",
    "write a file",
    "write beside the log",
    "append to a file",
    "remove a file",
    "change a file's mode",
    "connect by TCP",
    "send by UDP",
    "connect to a local socket",
    "fork",
    "start a program",
    "become a program",
    "signal the host",
    "have the host signalled",
    "have it signalled by type",
    "choose the signal",
    "have it signalled by ioctl",
    "have it signalled by a socket",
}
# Younger than some kernels, which know nothing to allow then; a filter answers first.
YOUNG = {
    "set an attribute of a file",
    "remove an attribute of a file",
    "change a file's flags",
}
# Landlock itself denies these on newer kernels only, or on none.
BEFORE_LANDLOCK = {
    "open a file for neither reading nor writing",
    "truncate a file by opening it",
    "truncate the model",
}


def escape_role(level: Any, **settings: Any) -> Role:
    return Role("escape_role:make_session", "escape_role:HANDLERS", sandbox=level, **settings)


@pytest.fixture
def around(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What there is to escape to, see `escape_role.attempts`."""
    unix = str(tmp_path / "socket")
    memory = ctypes.create_string_buffer(b"secret")
    (tmp_path / "model").write_bytes(b"weights")
    with (
        tempfile.NamedTemporaryFile(dir=Path.home()) as secret,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as local,
    ):
        udp.bind(("127.0.0.1", 0))
        local.bind(unix)
        secret.write(b"secret")
        secret.flush()
        yield {
            "host": os.getpid(),
            "address": ctypes.addressof(memory),
            "secret": secret.name,
            "model": str(tmp_path / "model"),
            "log_dir": str(tmp_path),
            "tcp": tcp.getsockname()[1],
            "udp": udp.getsockname()[1],
            "unix": unix,
            "nproc": resource.getrlimit(resource.RLIMIT_NPROC),
        }


def outcomes(pool: Pool, role: str, around: dict[str, Any], folder: Path) -> dict[str, str]:
    """What becomes of every try of the role, with files of its own to try it on."""
    folder.mkdir()
    for name in ("remove", "rename"):
        (folder / name).touch()
    answer: dict[str, str] = pool.call(role, "escape", {**around, "folder": str(folder)})
    return answer


def test_nothing_gets_out_of_a_confined_worker(around: dict[str, Any], tmp_path: Path) -> None:
    levels: list[Any] = ["basic", "strict"]
    roles = {level: escape_role(level, readable=[around["model"]]) for level in levels}
    with Pool(**roles, log_dir=tmp_path) as pool:
        free = outcomes(pool, "basic", around, tmp_path / "free")
        held = outcomes(pool, "strict", around, tmp_path / "held")
        status = pool.status()
    # The tries are sound: without a sandbox, they succeed.
    assert {name for name in ORDINARY if free[name] != "succeeded"} == set()
    assert status["basic"].sandbox == SandboxReport(level="basic")
    # For want of a facility some fail in another way; what matters is that all do.
    assert {name: how for name, how in held.items() if how == "succeeded"} == {}
    assert {held[name] for name in ORDINARY} <= {"EACCES", "EPERM"}
    assert {held[name] for name in YOUNG | BEFORE_LANDLOCK} == {"EPERM"}
    assert free["truncate the model"] == "succeeded"
    assert status["strict"].sandbox == CONFINED
    assert sorted(path.name for path in (tmp_path / "held").iterdir()) == ["remove", "rename"]


def test_every_worker_starts_with_little(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOME_API_KEY", "secret")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    inherited = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(inherited, True)
    with Pool(basic=escape_role("basic"), confined=escape_role("confined")) as pool:
        for role in ("basic", "confined"):
            facts = pool.call(role, "facts")
            assert "SOME_API_KEY" not in facts["environment"]
            assert facts["environment"]["LC_ALL"] == "C.UTF-8"
            assert str(tmp_path) not in facts["descriptors"]
            assert facts["group"] == facts["pid"]
            assert facts["core"] == (0, 0)
            assert max(facts["files"]) <= 4096
            # The heartbeat's too, which is older than the session.
            assert len(facts["threads"]) > 1
            assert {each["NoNewPrivs"] for each in facts["threads"]} == {"1"}
            if role == "confined":
                assert {each["Seccomp"] for each in facts["threads"]} == {"2"}
    os.close(inherited)


def test_a_confined_role_reads_what_it_may(tmp_path: Path) -> None:
    for name in ("may", "may not"):
        (tmp_path / name).write_text(name)
    role = escape_role("confined", readable=[str(tmp_path / "may"), "smollm2"])
    with Pool(role=role) as pool:
        assert pool.call("role", "read", str(tmp_path / "may")) == "may"
        assert pool.call("role", "read", str(tmp_path / "may not")) == "EACCES"


@pytest.mark.parametrize("level", ["confined", "strict"])
def test_the_built_in_roles_work_in_the_sandbox(
    level: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not converted yet: that happens before the sandbox is entered.
    monkeypatch.setenv("INFERPOOL_CACHE_DIR", str(tmp_path / "cache"))
    projector = write_projector(tmp_path / "mmproj.gguf", width=576)
    alike: dict[str, Any] = {"sandbox": level, "n_threads": 1}
    roles = {
        "chat": ChatConfig("smollm2", **alike),
        "embed": EmbedConfig("minilm", **alike),
        "rerank": RerankConfig(f"{TESTS}/data/tiny-reranker.gguf", **alike),
        "vision": VisionConfig("smollm2", str(projector), n_ctx=512, **alike),
    }
    with Pool(**roles, log_dir=tmp_path) as pool:
        assert pool.chat("Why do bees dance?", max_tokens=4).usage.completion_tokens == 4
        assert pool.embed(["bees dance"]).shape == (1, 384)
        assert len(pool.rerank("bees", ["bees dance", "markets fall"])) == 2
        image = np.zeros((50, 70, 3), np.uint8)
        assert pool.vision(image, prompt="What?", max_tokens=2).usage.completion_tokens == 2
        assert [each.sandbox for each in pool.status().values()] == [CONFINED] * 4
    assert "sandbox: confined" in (tmp_path / "worker-chat.log").read_text()


def test_models_are_parsed_in_a_sandbox_unless_a_driver_needs_more() -> None:
    def level(config: Any) -> str:
        with Pool(chat=config) as pool:
            return pool._core.supervisor("chat").spec.role.sandbox

    assert level("smollm2") == "confined"
    assert level(ChatConfig("smollm2", n_gpu_layers=-1)) == "basic"
    assert level(ChatConfig("smollm2", n_gpu_layers=-1, sandbox="strict")) == "strict"


def test_a_confined_worker_loads_the_library_that_the_user_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = importlib.util.find_spec("llama_cpp")
    assert package is not None
    assert package.origin is not None
    shutil.copytree(Path(package.origin).parent / "lib", tmp_path / "lib")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path / "lib"))
    with Pool(embed="minilm") as pool:
        assert pool.embed(["a library of one's own"]).shape == (1, 384)
        assert pool.status()["embed"].sandbox == CONFINED


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="sandbox must be one of"):
        ChatConfig("smollm2", sandbox="loose")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sandbox must be one of"):
        escape_role("loose")


@pytest.mark.parametrize(("call", "facility"), [("landlock", "Landlock"), ("seccomp", "seccomp")])
def test_a_kernel_without_a_facility_is_said_and_strict_refuses(call: str, facility: str) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import faults\n"
        "from inferpool import Pool, Role, WorkerStartError\n"
        "from test_sandbox import escape_role\n"
        f"faults.fail_system_calls([faults.{call.upper()}], 'ENOSYS')\n"
        "with Pool(lax=escape_role('confined'), strict=escape_role('strict')) as pool:\n"
        "    pool.call('lax', 'facts')\n"
        "    report = pool.status()['lax'].sandbox\n"
        "    print(report.level, *report.missing)\n"
        "    try: pool.call('strict', 'facts')\n"
        "    except WorkerStartError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, TESTS],
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    report, refusal, *_ = done.stdout.splitlines()
    assert report.startswith(f"partial {facility}: ")
    assert f"SandboxIncomplete: {facility}: " in refusal


class Replaced(Exception):
    """Stands for the program that would run from here on."""


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Enter a sandbox in this process, as far as that can be undone."""
    seen: dict[str, Any] = {}

    def enter(missing: list[str], **settings: Any) -> Any:
        def confine(*, readable: list[str], writable: list[str]) -> SimpleNamespace:
            seen.update(readable=readable, writable=writable)
            landlock = not any(each.startswith("Landlock") for each in missing)
            seccomp = not any(each.startswith("seccomp") for each in missing)
            return SimpleNamespace(files=landlock, calls=seccomp, missing=missing)

        def execv(program: str, arguments: list[str]) -> None:
            seen["command"] = arguments
            raise Replaced

        monkeypatch.setattr(sandbox, "restrain", lambda: None)
        monkeypatch.setattr(sandbox, "confine", confine)
        monkeypatch.setattr(os, "execv", execv)
        arguments = WorkerArguments(
            fds=[], host_pid=1, frame_limit=1, wait="park", sandbox=Sandbox(**settings)
        )
        return sandbox.enter_sandbox(arguments)

    enter.seen = seen  # type: ignore[attr-defined]
    return enter


@pytest.mark.parametrize(
    ("missing", "level"),
    [([], "confined"), (["Landlock: x"], "partial"), (["Landlock: x", "seccomp: y"], "basic")],
)
def test_the_level_is_what_was_achieved(
    entered: Any, missing: list[str], level: Any, tmp_path: Path
) -> None:
    log = str(tmp_path / "log")
    report = entered(missing, level="confined", readable=["/some/model"], log_path=log)
    assert report == SandboxReport(level=level, missing=missing)
    assert {"/some/model", sys.prefix} <= set(entered.seen["readable"])
    assert entered.seen["writable"] == [log]
    if missing:
        with pytest.raises(sandbox.SandboxIncomplete, match="; ".join(missing)):
            entered(missing, level="strict")


@pytest.mark.parametrize("threads", [True, False])
def test_a_worker_with_threads_starts_afresh_with_what_it_located(
    entered: Any, monkeypatch: pytest.MonkeyPatch, threads: bool
) -> None:
    monkeypatch.setattr(sandbox, "_has_threads", lambda: threads)
    path = str(resolve("smollm2"))
    settings = {"level": "strict", "readable": ["smollm2"], "locate": "inferpool.models:readable"}
    if not threads:
        assert entered([], **settings) == CONFINED
        assert path in entered.seen["readable"]
        return
    with pytest.raises(Replaced):
        entered([], **settings)
    again = msgspec.json.decode(entered.seen["command"][-1], type=WorkerArguments).sandbox
    assert again.locate is None
    assert again.readable == [path]


def test_threads_are_noticed() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    assert sandbox._has_threads()
    done.set()
    thread.join()
