"""Every way for a worker to end while it is needed, and what the caller learns of it."""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import TIRELESS, descriptors, echo_role, eventually, is_running

from inferpool import (
    ModelNotFound,
    Policy,
    Pool,
    ProtocolError,
    Role,
    RoleDegraded,
    WorkerCrashed,
    WorkerStartError,
)
from inferpool._transport import Call
from inferpool.host.process import oom_counts
from inferpool.host.startup import Startup


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGABRT", "SIGTERM"])
def test_a_signal_mid_stream_leaves_the_items_so_far_then_the_error(pool: Pool, name: str) -> None:
    stream = pool.stream("echo", "die", {"words": "so far", "signal": name})
    assert next(stream) == "so far"
    with pytest.raises(WorkerCrashed) as caught:
        next(stream)
    error = caught.value
    assert (error.role, error.incarnation, error.exit) == ("echo", 1, name)
    assert name in str(error)
    assert "native last words" in error.log_tail
    assert pool.call("echo", "echo", "next") == "next"
    assert pool.status()["echo"].incarnation == 2


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_native_assert_says_what_it_was(tmp_path: Path, in_thread: bool) -> None:
    role = Role("echo_role:make_session", "echo_role:HANDLERS", sandbox="confined")
    with Pool(echo=role, log_dir=tmp_path) as pool:
        with pytest.raises(WorkerCrashed) as caught:
            pool.call("echo", "assert", in_thread)
        assert caught.value.exit == "SIGABRT"
        assert "GGML_ASSERT(index < ggml_backend_dev_count()) failed" in str(caught.value)
        log = (tmp_path / "worker-echo.log").read_text()
        assert "CRITICAL ggml: ggml_abort: " in log
        assert pool.call("echo", "echo", 1) == 1


@pytest.mark.parametrize("code", [0, 7])
def test_an_exit_mid_call_is_a_crash_with_its_code(pool: Pool, code: int) -> None:
    with pytest.raises(WorkerCrashed) as caught:
        pool.call("echo", "exit", code)
    assert caught.value.exit == f"exit code {code}"
    assert pool.call("echo", "echo", 1) == 1


def test_a_worker_killed_while_idle_is_replaced_unnoticed(pool: Pool) -> None:
    for turn in range(3):
        pid = pool.call("echo", "facts")["pid"]
        os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: pool.status()["echo"].state == "dead")
        assert pool.call("echo", "echo", turn) == turn


def _reap_all(_signal: int, _frame: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


@pytest.mark.parametrize("handler", [signal.SIG_IGN, _reap_all], ids=["ignored", "reaped"])
def test_an_end_whose_status_others_take_is_unknown(pool: Pool, handler: signal._HANDLER) -> None:
    pool.start()
    before = signal.signal(signal.SIGCHLD, handler)
    try:
        with pytest.raises(WorkerCrashed) as caught:
            pool.call("echo", "exit", 3)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert caught.value.exit == "unknown, since this program takes the status of any child"
    assert pool.call("echo", "echo", 1) == 1


def test_a_crash_fails_every_call_in_flight_once(pool: Pool) -> None:
    pool.start()
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            pool.call("echo", "sleep", 60)
        except WorkerCrashed as error:
            errors.append(error)

    threads = [threading.Thread(target=wait) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert eventually(lambda: pool.status()["echo"].in_flight == 8)
    pid = pool.status()["echo"].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    for thread in threads:
        thread.join(10)
    assert len(errors) == 8
    assert pool.call("echo", "echo", 1) == 1


def test_a_crash_while_a_large_request_is_sent(pool: Pool) -> None:
    busy = pool.stream("echo", "sleep", 60)
    pid = pool.status()["echo"].pid
    assert pid is not None
    timer = threading.Timer(0.3, os.kill, (pid, signal.SIGKILL))
    timer.start()
    # Before its first answer a worker counts as starting.
    with pytest.raises((WorkerCrashed, WorkerStartError)):
        pool.call("echo", "echo", b"x" * (64 << 20))
    with pytest.raises((WorkerCrashed, WorkerStartError)):
        next(busy)
    timer.join()
    assert pool.call("echo", "echo", 1) == 1


def test_a_crash_of_one_role_leaves_the_others_streaming() -> None:
    with Pool(good=echo_role(), bad=echo_role()) as pool:
        stream = pool.stream("good", "count", 50_000)
        first = [next(stream) for _ in range(100)]
        with pytest.raises(WorkerCrashed):
            pool.call("bad", "exit", 1)
        assert first + list(stream) == list(range(50_000))


def test_a_worker_that_hangs_up_and_lives_on_is_killed(pool: Pool) -> None:
    with pytest.raises(WorkerCrashed) as caught:
        pool.call("echo", "hang_up", timeout=20)
    assert caught.value.exit == "SIGKILL"
    assert "closed its channel" in (caught.value.cause or "")
    assert pool.call("echo", "echo", 1) == 1


@pytest.mark.parametrize(
    ("role", "message"),
    [
        (echo_role(**{"raise": "no such weights"}), "no such weights"),
        (Role("no_such_module:make", "echo_role:HANDLERS"), "no_such_module"),
        (Role("echo_role:no_such_name", "echo_role:HANDLERS"), "no_such_name"),
        (Role("echo_role:make_session", "echo_role:echo"), "not a mapping"),
        (Role("echo_role:make_session", "echo_role:LAZY_HANDLERS"), "'echo' is async or a gen"),
        (echo_role(exit=9), "exit code 9"),
    ],
    ids=["raises", "no module", "no attribute", "no handlers", "lazy", "exits"],
)
def test_a_worker_that_cannot_start_is_a_typed_error(role: Role, message: str) -> None:
    with Pool(broken=role) as pool:
        with pytest.raises(WorkerStartError, match=message):
            pool.call("broken", "echo", timeout=20)
        with pytest.raises(WorkerStartError, match=message):
            pool.start()


def test_a_worker_that_takes_too_long_to_start_is_killed() -> None:
    with Pool(slow=echo_role(load_seconds=60), policy=Policy(start_timeout=1.0)) as pool:
        with pytest.raises(WorkerStartError, match="did not start within 1 s"):
            pool.call("slow", "echo")


def test_a_worker_that_starts_with_garbage_is_killed_and_replaced() -> None:
    with Pool(bad=echo_role(garbage=True), policy=Policy(backoff=0.0)) as pool:
        for incarnation in (1, 2):
            with pytest.raises(ProtocolError):
                pool.call("bad", "echo", timeout=20)
            status = pool.status()["bad"]
            assert (status.pid, status.restarts) == (None, incarnation)
            assert "broke the wire format" in str(status.last_exit)
        with pytest.raises(RoleDegraded):
            pool.call("bad", "echo")


def test_a_process_that_cannot_be_started_is_a_typed_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with Pool(echo=echo_role()) as pool, pytest.raises(WorkerStartError, match="No such file"):
        pool.call("echo", "echo")


def test_a_worker_that_cannot_be_told_to_start_is_a_typed_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Unsendable:
        def __init__(self, call: Call) -> None:
            self._call = call

        def send(self) -> None:
            self._call.abandon()  # as when it fails by itself
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        def __getattr__(self, name: str) -> Any:
            return getattr(self._call, name)

    begin = Startup.begin
    monkeypatch.setattr(
        Startup, "begin", lambda startup, call: begin(startup, cast("Call", Unsendable(call)))
    )
    with Pool(echo=echo_role()) as pool:
        with pytest.raises(WorkerStartError, match=r"could not be reached: .*Too many open files"):
            pool.call("echo", "echo")
        monkeypatch.undo()
        pool.reset("echo")
        assert pool.call("echo", "echo", 1) == 1


@pytest.mark.parametrize(("name", "value"), [("executable", None), ("frozen", True)])
def test_a_host_without_an_interpreter_is_not_started_again(
    monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    monkeypatch.setattr(sys, name, value, raising=False)
    with Pool(echo=echo_role()) as pool, pytest.raises(WorkerStartError, match=r"sys\.executable"):
        pool.call("echo", "echo")


def test_a_missing_model_is_a_typed_error() -> None:
    with Pool(embed="/no/such/model.gguf") as pool, pytest.raises(ModelNotFound):
        pool.embed(["text"])


def test_a_stopped_worker_is_killed_by_close(pool: Pool) -> None:
    pid = pool.call("echo", "facts")["pid"]
    os.kill(pid, signal.SIGSTOP)
    pool.close(timeout=0.1)
    assert not is_running(pid)


@pytest.mark.parametrize("options", [{"close_raises": True}, {"close_seconds": 60}])
def test_a_session_that_will_not_close_does_not_keep_the_pool(options: dict[str, object]) -> None:
    pool = Pool(echo=echo_role(**options))
    pid = pool.call("echo", "facts")["pid"]
    pool.close(timeout=1.0)
    assert not is_running(pid)


def test_the_log_has_what_python_and_native_code_wrote(tmp_path: Path) -> None:
    with Pool(echo=echo_role(), log_dir=tmp_path) as pool:
        facts = pool.call("echo", "facts")
        with pytest.raises(WorkerCrashed) as caught:
            pool.call("echo", "die", {"words": "", "signal": "SIGSEGV"})
        pool.call("echo", "echo")
    log = (tmp_path / "worker-echo.log").read_text()
    assert facts["stdin"] == "/dev/null"
    assert facts["stdout"] == str(tmp_path / "worker-echo.log")
    assert facts["modules"] == []
    assert "INFO inferpool.worker: incarnation 1 ready" in log
    assert "native last words" in log
    assert "Fatal Python error: Segmentation fault" in log
    assert "INFO echo: session closed" in log
    assert "Segmentation fault" in caught.value.log_tail


@pytest.mark.parametrize("with_folder", [True, False])
def test_an_error_says_nothing_that_a_terminal_obeys(tmp_path: Path, with_folder: bool) -> None:
    with Pool(echo=echo_role(), log_dir=tmp_path if with_folder else None) as pool:
        pool.call("echo", "print", "\x1b]0;title\x07\tnative\rGGML_ASSERT(\x9b2J) failed")
        with pytest.raises(WorkerCrashed) as caught:
            pool.call("echo", "be_killed")
    error = caught.value
    assert error.native_message == "GGML_ASSERT(\ufffd2J) failed"
    assert "\ufffd]0;title\ufffd\tnative\nGGML_ASSERT(" in error.log_tail
    assert not set(str(error)) & set("\x1b\x07\x9b\r")


def test_a_log_folder_that_goes_away_costs_only_the_log(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    with Pool(echo=echo_role(), log_dir=logs) as pool:
        pool.call("echo", "echo")
        shutil.rmtree(logs)
        with pytest.raises(WorkerCrashed, match="no log"):
            pool.call("echo", "die", {"words": "", "signal": "SIGKILL"})
        assert pool.call("echo", "echo", 1) == 1
        assert (logs / "worker-echo.log").exists()


def test_a_log_folder_that_cannot_be_made_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with Pool(echo=echo_role(), log_dir=tmp_path / "file") as pool:
        with pytest.raises(WorkerStartError, match="File exists"):
            pool.call("echo", "echo")


@pytest.mark.parametrize("with_folder", [True, False])
def test_a_log_does_not_grow_without_bound(tmp_path: Path, with_folder: bool) -> None:
    with Pool(echo=echo_role(), log_dir=tmp_path if with_folder else None) as pool:
        for _ in range(3):
            assert pool.call("echo", "chatter", 5 << 20) < 5 << 20
    with Pool(echo=echo_role(), log_dir=tmp_path if with_folder else None) as pool:
        assert pool.call("echo", "chatter", 5 << 20) < 5 << 20
        with pytest.raises(WorkerCrashed) as caught:
            pool.call("echo", "die", {"words": "", "signal": "SIGKILL"})
    assert "native last words" in caught.value.log_tail
    if with_folder:
        files = sorted(path.name for path in tmp_path.iterdir())
        assert files == ["worker-echo.log", *(f"worker-echo.log.{n}" for n in (1, 2, 3))]


def test_a_sandboxed_worker_cuts_its_log_and_the_next_one_moves_it(tmp_path: Path) -> None:
    role = Role("echo_role:make_session", "echo_role:HANDLERS", sandbox="confined")
    with Pool(echo=role, log_dir=tmp_path) as pool:
        assert pool.call("echo", "chatter", 5 << 20) < 5 << 20
        assert [path.name for path in tmp_path.iterdir()] == ["worker-echo.log"]
    # The last line may pass the bound that is looked at after it.
    (tmp_path / "worker-echo.log").write_bytes(b"x" * (5 << 20))
    with Pool(echo=role, log_dir=tmp_path) as pool:
        pool.call("echo", "echo")
    assert (tmp_path / "worker-echo.log.1").stat().st_size >= 5 << 20


def test_a_handler_may_close_the_worker_s_streams(pool: Pool) -> None:
    pid = pool.call("echo", "facts")["pid"]
    pool.call("echo", "close_streams")
    time.sleep(0.002)  # the log's size is looked at once in a millisecond
    assert pool.call("echo", "echo", 1) == 1
    assert pool.call("echo", "environment", "no such variable") is None
    assert pool.status()["echo"].pid == pid


def test_a_log_whose_folder_is_gone_is_cut(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    with Pool(echo=echo_role(), log_dir=logs) as pool:
        pool.call("echo", "echo")
        shutil.rmtree(logs)
        assert pool.call("echo", "chatter", 5 << 20) < 5 << 20
        assert pool.status()["echo"].incarnation == 1


@pytest.mark.parametrize(
    "how",
    [
        "far ahead",
        "misaligned",
        "backwards",
        "zeros",
        "ones",
        "noise",
        "rings",
        "answers to no question",
        "garbage on the control socket",
        "descriptors without end",
    ],
)
def test_a_worker_that_scribbles_is_killed_and_replaced(how: str) -> None:
    with Pool(bad=echo_role(), good=echo_role()) as pool:
        pool.start()
        good = pool.stream("good", "count", 10_000)
        pid = pool.status()["bad"].pid
        assert pid is not None
        open_before = descriptors()
        bad = pool.stream("bad", "scribble", how, timeout=20)
        with pytest.raises(ProtocolError):
            next(bad)
        assert not is_running(pid)
        assert descriptors() <= open_before
        assert pool.call("bad", "echo", 1) == 1
        assert pool.status()["bad"].counters["violations"] == 1
        assert list(good) == list(range(10_000))


def test_nothing_a_worker_prints_reaches_the_terminal() -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from inferpool import Pool, Role, WorkerCrashed\n"
        "with Pool(echo=Role('echo_role:make_session', 'echo_role:HANDLERS')) as pool:\n"
        "    pool.call('echo', 'chatter', 10_000)\n"
        "    try: pool.call('echo', 'die', {'words': '', 'signal': 'SIGABRT'})\n"
        "    except WorkerCrashed: print('crashed')\n"
    )
    arguments = [sys.executable, "-", str(Path(__file__).parent)]
    done = subprocess.run(
        arguments, input=script, capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("crashed\n", "", 0)


def test_too_few_descriptors_are_a_typed_error_and_leave_none_behind() -> None:
    with Pool(echo=echo_role()) as pool:
        pool.ping()  # this thread's own doorbell, made once, stays
    before = descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    outcomes = []
    for spare in range(20):
        pool = Pool(echo=echo_role())
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + spare, hard))
        try:
            outcomes.append(pool.call("echo", "echo", "answer", timeout=30))
        except WorkerStartError:
            outcomes.append("error")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        pool.close()
        assert descriptors() == before
    assert outcomes[0] == "error"
    assert outcomes[-1] == "answer"


def test_a_worker_stopped_while_it_starts_fails_its_calls_and_is_replaced() -> None:
    with Pool(slow=echo_role(load_seconds=0.5), policy=Policy(start_timeout=2.0)) as pool:
        stream = pool.stream("slow", "echo", 1)
        pid = pool.status()["slow"].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(WorkerStartError, match="did not start within 2 s"):
            next(stream)
        assert pool.call("slow", "echo", 2) == 2


@pytest.mark.parametrize(
    ("groups", "counts"),
    [
        ("4:memory:/a/b\n1:cpu:/c\n0::/\n", "/sys/fs/cgroup/memory/a/b/memory.oom_control"),
        ("4:cpu,memory:/a\n0::/d\n", "/sys/fs/cgroup/memory/a/memory.oom_control"),
        ("0::/user.slice/a.scope\n", "/sys/fs/cgroup/user.slice/a.scope/memory.events"),
        ("1:cpu:/a\n", None),
    ],
)
def test_both_versions_of_control_groups_are_known(groups: str, counts: str | None) -> None:
    found = oom_counts(groups)
    assert (str(found[0]) if found else None) == counts


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A control group that gets so many bytes: the file in it that takes the pids of members.

    Raises:
        OSError: none can be made here.
    """
    counts, *_ = oom_counts(Path("/proc/self/cgroup").read_text())
    own, is_first_version = counts.parent, counts.name == "memory.oom_control"
    # In version 2 a group with members can't share its memory out; the one above it may.
    above = own if is_first_version or own == Path("/sys/fs/cgroup") else own.parent
    group = above / f"inferpool-test-{os.getpid()}"
    group.mkdir()
    limits = {"memory.max": limit, "memory.swap.max": 0}
    if is_first_version:
        limits = {"memory.limit_in_bytes": limit, "memory.memsw.limit_in_bytes": limit}
    bound, swap = limits
    try:
        (group / bound).write_text(str(limits[bound]))
        if (group / swap).exists():  # not where the kernel does not count it
            (group / swap).write_text(str(limits[swap]))
        yield group / "cgroup.procs"
    finally:
        assert eventually(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def test_the_kernel_s_kill_for_want_of_memory_is_told_from_others() -> None:
    script = (
        "import json, os, sys\n"
        "open(sys.argv[1], 'w').write(str(os.getpid()))\n"  # so that its workers are members too
        "sys.path.insert(0, sys.argv[2])\n"
        "from conftest import TIRELESS, echo_role\n"
        "from inferpool import PoisonousRequest, Pool, WorkerCrashed\n"
        "outcomes = []\n"
        "def ask(role, kind, payload=None):\n"
        "    try: outcomes.append(pool.call(role, kind, payload))\n"
        "    except WorkerCrashed as error: outcomes.append([error.exit, error.cause])\n"
        "    except PoisonousRequest: outcomes.append('poisonous')\n"
        "with Pool(greedy=echo_role(), other=echo_role(), policy=TIRELESS) as pool:\n"
        "    pool.start()\n"
        "    ask('greedy', 'devour'); ask('greedy', 'echo', 'next')\n"
        # Of the second one's life the first one's end is a part.
        "    ask('greedy', 'be_killed'); ask('other', 'be_killed')\n"
        "    ask('greedy', 'devour'); ask('greedy', 'devour'); ask('other', 'echo', 'next')\n"
        "print(json.dumps(outcomes))\n"
    )
    try:
        ending = contextlib.ExitStack()
        members = ending.enter_context(memory_group(300 << 20))
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    with ending:
        arguments = [sys.executable, "-c", script, str(members), str(Path(__file__).parent)]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=50, check=False)
    assert (done.stderr, done.returncode) == ("", 0)
    for_memory = ["SIGKILL", "killed by the kernel for want of memory"]
    by_others = ["SIGKILL", None]
    assert json.loads(done.stdout) == [
        *(for_memory, "next"),
        *(by_others, by_others),
        *(for_memory, "poisonous", "next"),
    ]


def test_a_storm_of_kills_gives_each_call_its_answer_or_a_crash() -> None:
    with Pool(echo=echo_role(), policy=TIRELESS) as pool:
        pool.start()
        outcomes = storm(pool)
        assert outcomes["answer"]
        assert outcomes["SIGKILL"]
        assert outcomes.keys() <= {"answer", "SIGKILL", "start"}
        assert pool.call("echo", "echo", "next") == "next"


def storm(pool: Pool) -> collections.Counter[str]:
    """Kill the worker again and again while six threads call it; what became of the calls."""
    over = threading.Event()
    outcomes: collections.Counter[str] = collections.Counter()

    def caller(number: int) -> None:
        while not over.is_set():
            payload = bytes([number]) * 20_000
            try:
                assert pool.call("echo", "echo", payload, timeout=20) == payload
                outcomes["answer"] += 1
            except WorkerCrashed as error:
                outcomes[str(error.exit)] += 1
            except WorkerStartError:
                outcomes["start"] += 1

    threads = [threading.Thread(target=caller, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    assert eventually(lambda: outcomes["answer"])  # on a busy machine no later worker may do so
    for _ in range(5):
        pid = pool.status()["echo"].pid
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.4)
    over.set()
    for thread in threads:
        thread.join(30)
    return outcomes
