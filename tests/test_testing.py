"""The kit for users' tests, and the page that describes it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import echo_role, is_running

from inferpool import (
    CallTimeout,
    Pool,
    RemoteError,
    Role,
    WorkerCrashed,
    WorkerStartError,
)
from inferpool.testing import (
    Fault,
    InProcessChannel,
    scripted_chat,
    scripted_embed,
    signal_worker,
)
from inferpool.worker import Reply, RoleConfig, WorkerLoopState

PAGE = Path(__file__).parents[1] / "docs" / "testing.md"
CHAT = {"messages": [{"role": "user", "content": "two words"}]}


def test_the_page_s_example_runs(tmp_path: Path) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "test_page.py").write_text(example)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_page.py"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=55, check=False
    )
    assert done.returncode == 0, done.stdout
    assert f"{example.count('def test_')} passed" in done.stdout


def test_a_scripted_chat_counts_and_stops_like_a_model() -> None:
    with Pool(chat=scripted_chat(["a", "b", "c"])) as pool:
        result = pool.chat("two words", max_tokens=2)
        assert (result.text, result.finish_reason) == ("ab", "length")
        assert (result.usage.prompt_tokens, result.usage.total_tokens) == (2, 4)
        *_, last = pool.chat.stream("two words")
        assert last.finish_reason == "stop"
        with pytest.raises(TypeError, match="no_such_option"):
            pool.chat("two words", no_such_option=1)  # type: ignore[call-arg]


def test_a_wait_ends_with_its_call() -> None:
    with Pool(chat=scripted_chat(["a", 60.0, "b"])) as pool:
        pid = pool.start().status()["chat"].pid
        with pytest.raises(CallTimeout):
            pool.chat("x", timeout=0.1)
        pool.call("chat", "inferpool.ready")
        assert pool.status()["chat"].pid == pid


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (Fault("raise", "no more ideas"), RemoteError, "RuntimeError: no more ideas"),
        (Fault("exit", 3), WorkerCrashed, "exit code 3"),
        (Fault("signal", "SIGABRT"), WorkerCrashed, "SIGABRT"),
    ],
    ids=str,
)
def test_a_fault_happens_where_the_script_says(
    fault: Fault, error: type[Exception], message: str
) -> None:
    with Pool(embed=scripted_embed(4, [fault])).start() as pool:
        with pytest.raises(error, match=message):
            pool.embed(["x"])
    with Pool(chat=scripted_chat(["a"], load=[0.05, fault])) as pool:
        with pytest.raises(WorkerStartError, match=message):
            pool.chat("x")


@pytest.mark.parametrize("action", ["hang", "hold_gil"])
def test_a_hanging_session_does_not_keep_the_pool(action: str) -> None:
    pool = Pool(chat=scripted_chat([Fault(action)]), close_timeout=0.3)  # type: ignore[arg-type]
    pid = pool.start().status()["chat"].pid
    assert pid is not None
    with pytest.raises(CallTimeout):
        pool.chat("x", timeout=0.2)
    pool.close()
    assert not is_running(pid)


@pytest.mark.parametrize(
    "arguments", [("signal", 9), ("exit", "3"), ("raise",), ("hang", 1), ("signal", "SIGNOPE")]
)
def test_an_impossible_fault_is_refused(arguments: tuple[object, ...]) -> None:
    with pytest.raises((TypeError, ValueError)):
        Fault(*arguments)  # type: ignore[arg-type]


def test_a_script_of_something_else_is_refused() -> None:
    with pytest.raises(TypeError, match="not NoneType"):
        scripted_chat([None])  # type: ignore[list-item]
    for role, kind, payload in [
        (scripted_embed(4, ["token"]), "embed", {"texts": ["x"]}),  # type: ignore[list-item]
        (scripted_chat(["a"], load=["token"]), "chat", CHAT),  # type: ignore[list-item]
    ]:
        with pytest.raises((RemoteError, TypeError), match="token"):
            with InProcessChannel(role) as channel:
                channel.call(kind, payload)


def test_signals_reach_the_worker_of_a_role() -> None:
    with Pool(echo=echo_role()) as pool:
        with pytest.raises(ValueError, match="no worker"):
            signal_worker(pool, "echo", "SIGKILL")
        pool.start()
        with pytest.raises(ValueError, match="SIGNOPE"):
            signal_worker(pool, "echo", "SIGNOPE")
        pid = signal_worker(pool, "echo", "SIGKILL")
        deadline = time.monotonic() + 10
        while is_running(pid):
            assert time.monotonic() < deadline
        assert pool.call("echo", "echo", 1) == 1


def test_a_channel_in_this_process_answers_as_a_worker_does() -> None:
    payload = {"raw": b"x" * 2000, "t": (1, None), "s": "text"}
    with InProcessChannel(echo_role(some="option")) as channel:
        assert channel.session.options == {"some": "option"}
        assert channel.call("echo", payload)["raw"] == payload["raw"]
        assert channel.call("echo", payload)["t"] == (1, None)
        assert channel.call("nothing") is None
        assert channel.stream("count", 3) == [0, 1, 2]
        assert channel.stream("count", None, limit=5) == [0, 1, 2, 3, 4]
        with pytest.raises(ValueError, match="more than one item"):
            channel.call("count", 2)
        with pytest.raises(RemoteError, match="unknown kind"):
            channel.call("no such kind")
        with pytest.raises(TypeError):
            channel.call("echo", {1, 2})
        with pytest.raises(RemoteError, match="TypeError"):
            channel.call("unencodable")
        with pytest.raises(RemoteError, match="KeyError"):
            channel.call("raise", "missing")


@pytest.mark.parametrize("kind", ["model", "context", "value"])
def test_an_error_in_this_process_is_the_one_of_a_pool(kind: str) -> None:
    with Pool(echo=echo_role()) as pool, pytest.raises(Exception) as expected:  # noqa: PT011
        pool.call("echo", "raise", kind)
    with InProcessChannel(echo_role()) as channel, pytest.raises(expected.type) as caught:
        channel.call("raise", kind)
    assert str(caught.value) == str(expected.value)
    assert isinstance(caught.value, RemoteError) is (kind == "value")
    details = getattr(expected.value, "details", None)
    assert getattr(caught.value, "details", None) == details


def test_abort_tokens_in_this_process_have_a_union() -> None:
    with InProcessChannel(echo_role()) as channel:
        assert channel.stream("count_united", limit=3) == [0, 1, 2]
        assert channel.session.options["stopped_at"] == 3


class LazySession:
    """Fails with all that was left to it."""

    def step(self) -> None:
        raise RuntimeError("a step fails")

    def close(self) -> None:
        """Nothing to release."""


def make_lazy_session(role_config: RoleConfig, abort: Any) -> LazySession:
    return LazySession()


def handle_later(reply: Reply, payload: Any, state: WorkerLoopState) -> None:
    reply.defer()


LAZY_HANDLERS = {"later": handle_later}


def test_a_step_that_fails_in_this_process_fails_its_call() -> None:
    role = Role(f"{__name__}:make_lazy_session", f"{__name__}:LAZY_HANDLERS")
    with InProcessChannel(role) as channel, pytest.raises(RemoteError, match="a step fails"):
        channel.call("later")
