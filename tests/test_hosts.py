"""Hosts of every kind: scripts on stdin, forks, threads at exit, and hosts that die."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import children, echo_role, eventually, is_running

from inferpool import Policy, Pool, PoolClosed, Role, WorkerCrashed, errors
from inferpool.config import SandboxLevel
from inferpool.models import resolve
from inferpool.testing import signal_worker

TESTS = str(Path(__file__).parent)
PREAMBLE = f"""
import os, sys, threading, time, _thread
sys.path.insert(0, {TESTS!r})
from inferpool import Pool, PoolClosed, Role
pool = Pool(echo=Role("echo_role:make_session", "echo_role:HANDLERS"))
"""


def run_host(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(arguments or ["-"])]
    given = None if arguments else PREAMBLE + script
    return subprocess.run(
        command, input=given, capture_output=True, text=True, timeout=50, check=False
    )


@contextlib.contextmanager
def started_host(script: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A host that prints its worker's pid and goes on."""
    command = [sys.executable, "-c", PREAMBLE + script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None
        try:
            yield host, int(host.stdout.readline())
        finally:
            host.kill()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def test_a_script_on_stdin_needs_no_main_guard() -> None:
    done = run_host("print(pool.call('echo', 'echo', 42))")
    assert (done.stdout, done.stderr, done.returncode) == ("42\n", "", 0)


def test_a_host_ends_though_a_finished_stream_outlives_its_worker() -> None:
    done = run_host(
        "stream = pool.stream('echo', 'count', 1)\n"
        "list(stream)\n"
        "pool.configure('echo', Role('echo_role:make_session', 'echo_role:HANDLERS'))\n"
        "print('done')\n"
    )
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)


def test_a_host_needs_no_standard_streams(tmp_path: Path) -> None:
    said = tmp_path / "said"
    script = PREAMBLE + f"open({str(said)!r}, 'w').write(str(pool.call('echo', 'echo', 42)))"
    closed = 'exec "$@" <&- >&- 2>&-'
    command = ["sh", "-c", closed, "sh", sys.executable, "-c", script]
    done = subprocess.run(command, timeout=50, check=False)
    assert (said.read_text(), done.returncode) == ("42", 0)


def test_what_a_host_is_isolated_from_its_workers_are_too(tmp_path: Path) -> None:
    (tmp_path / "msgspec.py").write_text("raise ImportError('shadowed')")
    package = str(Path(errors.__file__).parents[1])
    script = f"import sys; sys.path.insert(0, {package!r})" + PREAMBLE
    script += "print(pool.call('echo', 'echo', 42))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-I", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("42\n", "")


def test_a_folder_that_may_not_be_looked_at_is_passed_over(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in an import; too long a name stands for what only other users are denied.
    monkeypatch.setattr(sys, "path", ["/" + "x" * 300, *sys.path])
    assert pool.call("echo", "echo", 1) == 1


def test_a_module_folder_whose_name_is_not_utf_8_is_passed_over(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    os.mkdir(folder)
    monkeypatch.setattr(sys, "path", [folder, *sys.path])
    assert pool.call("echo", "echo", 1) == 1


def test_relative_paths_stay_what_they_were_when_the_host_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model.gguf").symlink_to(resolve("smollm2"))
    monkeypatch.chdir(tmp_path)
    with Pool(chat="model.gguf", log_dir="logs", policy=Policy(backoff=0.0)) as pool:
        monkeypatch.chdir("elsewhere")
        for incarnation in (1, 2):
            pool.chat("hello", max_tokens=1)
            pid = pool.status()["chat"].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            assert eventually(lambda: pool.status()["chat"].state == "dead")
            assert pool.status()["chat"].incarnation == incarnation
        (tmp_path / "elsewhere" / "other.gguf").symlink_to(resolve("smollm2"))
        pool.chat("hello", max_tokens=1, model="other.gguf")
    assert "(incarnation 3)" in (tmp_path / "logs" / "worker-chat.log").read_text()
    assert os.listdir() == ["other.gguf"]


@pytest.mark.parametrize("level", ["basic", "confined"])
def test_so_do_relative_module_folders(
    level: SandboxLevel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "modules").mkdir()
    shutil.copy(Path(__file__).with_name("echo_role.py"), tmp_path / "modules" / "moved_role.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["modules", *sys.path])
    role = Role("moved_role:make_session", "moved_role:HANDLERS", sandbox=level)
    with Pool(echo=role) as pool:
        monkeypatch.chdir("/")
        assert pool.call("echo", "echo", 1) == 1


def test_a_host_may_be_in_a_folder_that_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "removed").mkdir()
    monkeypatch.chdir(tmp_path / "removed")
    with Pool(echo=echo_role()) as early:
        os.rmdir(tmp_path / "removed")
        with Pool(echo=echo_role()) as late:
            assert (early.call("echo", "echo", 1), late.call("echo", "echo", 2)) == (1, 2)


def test_programs_that_a_handler_starts_inherit_no_channel(pool: Pool) -> None:
    assert pool.call("echo", "inherited") == ["0", "1", "2", "3"]


@pytest.mark.parametrize(("how", "status"), [("return", 0), ("exit", 7), ("raise", 1)])
def test_a_process_that_a_handler_forks_does_not_become_a_worker(
    pool: Pool, how: str, status: int
) -> None:
    pid = pool.call("echo", "facts")["pid"]
    assert pool.call("echo", "fork", how, timeout=10) == status
    assert pool.call("echo", "facts")["pid"] == pid


def test_a_signal_s_handler_in_an_idle_worker_holds_no_others_back(pool: Pool) -> None:
    pool.call("echo", "note_signals")
    time.sleep(0.3)  # from the 50th millisecond on the worker sleeps until there is a request
    signal_worker(pool, "echo", "SIGUSR1")
    # Programs that the handler starts would inherit that, and nobody could end them.
    assert eventually(lambda: pool.call("echo", "facts")["options"]["masks"] == [0])


def test_a_script_with_dash_c_works() -> None:
    done = run_host("", "-c", PREAMBLE + "print(pool.call('echo', 'echo', 42)); pool.close()")
    assert (done.stdout, done.stderr) == ("42\n", "")


@pytest.mark.parametrize("kind", ["sleep", "hold_gil", "count"])
def test_workers_die_with_a_killed_host(kind: str) -> None:
    before = shared_memory()
    script = (
        "print(pool.call('echo', 'facts')['pid'], flush=True)\n"
        f"stream = pool.stream('echo', {kind!r}, {None if kind == 'count' else 30})\n"
        "time.sleep(30)\n"
    )
    with started_host(script) as (host, pid):
        assert is_running(pid)
        host.kill()
        host.wait()
        assert eventually(lambda: not is_running(pid), seconds=2)
        assert shared_memory() <= before


def test_workers_die_with_a_host_killed_during_inference() -> None:
    before = shared_memory()
    script = (
        "from inferpool import ChatConfig\n"
        "pool = Pool(chat=ChatConfig('smollm2', n_threads=1)).start()\n"
        "print(pool.status()['chat'].pid, flush=True)\n"
        "pool.chat('word ' * 4000, max_tokens=1)\n"
    )
    with started_host(script) as (host, pid):
        # The prompt takes many seconds; this much CPU time is in the middle of it.
        assert eventually(lambda: cpu_seconds(pid) > 1.5)
        host.kill()
        host.wait()
        assert eventually(lambda: not is_running(pid), seconds=2)
        assert shared_memory() <= before


def test_workers_die_with_a_host_that_left_by_os_exit() -> None:
    script = "print(pool.call('echo', 'facts')['pid'], flush=True)\nos._exit(3)\n"
    with started_host(script) as (host, pid):
        assert host.wait(10) == 3
        assert eventually(lambda: not is_running(pid), seconds=2)


def test_workers_die_with_the_host_though_a_fork_of_it_lives() -> None:
    script = (
        "worker = pool.call('echo', 'facts')['pid']\n"
        "if os.fork() == 0:\n"
        "    print(worker, flush=True); os.close(1); time.sleep(5); os._exit(0)\n"
        "time.sleep(30)\n"
    )
    with started_host(script) as (host, pid):
        host.kill()
        host.wait()
        assert eventually(lambda: not is_running(pid), seconds=2)


@pytest.mark.parametrize(
    "start",
    [
        "threading.Thread(target=work, daemon=True).start()",
        "[threading.Thread(target=work, daemon=True).start() for _ in range(8)]",
        "_thread.start_new_thread(work, ())",
    ],
    ids=["daemon", "daemons", "raw"],
)
def test_the_interpreter_exits_with_calls_in_flight(start: str) -> None:
    done = run_host(
        "def work():\n"
        "    try: pool.call('echo', 'sleep', 30)\n"
        "    except PoolClosed: pass\n"
        f"pool.start()\n{start}\n"
        "while not pool.status()['echo'].in_flight: time.sleep(0.01)\n"
        "print('in flight')\n"
    )
    assert (done.stdout, done.stderr, done.returncode) == ("in flight\n", "", 0)


def test_the_interpreter_exits_with_a_stream_open_on_the_main_thread() -> None:
    done = run_host("stream = pool.stream('echo', 'count', None)\nprint(next(stream))\n")
    assert (done.stdout, done.stderr, done.returncode) == ("0\n", "", 0)


def test_the_interpreter_exits_with_a_task_waiting() -> None:
    done = run_host(
        "import asyncio\n"
        "async def main():\n"
        "    task = asyncio.create_task(pool.as_async().call('echo', 'sleep', 30))\n"
        "    await asyncio.sleep(0.5)\n"
        "asyncio.run(main())\nprint('done')\n"
    )
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)


def test_a_forked_child_is_refused_and_harms_nothing(pool: Pool) -> None:
    pool.call("echo", "echo")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        verdict = b"no error"
        try:
            pool.call("echo", "echo", 1)
        except PoolClosed:
            verdict = b"PoolClosed"
        pool.close()
        os.write(write, verdict)
        os._exit(0)
    os.close(write)
    assert os.read(read, 100) == b"PoolClosed"
    os.close(read)
    os.waitpid(child, 0)
    assert pool.call("echo", "echo", 2) == 2
    assert pool.status()["echo"].incarnation == 1


def test_a_pool_belongs_to_the_process_that_first_uses_it() -> None:
    done = run_host(
        "child = os.fork()\n"
        "for number in range(2):\n"
        "    assert pool.call('echo', 'echo', number) == number\n"
        "worker = pool.status()['echo'].pid\n"
        "pool.close()\n"
        # In one write, whether or not the interpreter buffers: another process writes as well.
        "os.write(1, f'{os.path.exists(f\"/proc/{worker}\")}\\n'.encode())\n"
        "if child:\n"
        "    os.waitpid(child, 0)\n"
    )
    assert (done.stdout, done.stderr, done.returncode) == ("False\nFalse\n", "", 0)


def test_a_forked_child_may_drop_a_stream_of_its_parent() -> None:
    done = run_host(
        "stream = pool.stream('echo', 'count', None)\n"
        "next(stream)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    del stream\n"
        "    os._exit(0)\n"
        "os.waitpid(child, 0)\n"
        "print(next(stream))\n"
    )
    assert (done.stdout, done.stderr, done.returncode) == ("1\n", "", 0)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_forked_while_a_lock_is_held_is_refused_too(pool: Pool) -> None:
    pool.start()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with pool._core.supervisors["echo"]._lock:
            held.set()
            done.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(10)
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        refused = 0
        for use in (pool.status, pool.start, lambda: pool.reset("echo"), lambda: pool.ping("echo")):
            with contextlib.suppress(PoolClosed):
                use()
                os._exit(1)
            refused += 1
        os._exit(refused)
    done.set()
    holder.join(10)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_forked_amid_a_stream_is_refused_too(pool: Pool) -> None:
    stream = pool.stream("echo", "flood", 3900)

    def read() -> None:
        for _ in stream:
            pass

    reader = threading.Thread(target=read)
    with contextlib.closing(stream):
        next(stream)
        # Its locks are often taken meanwhile, and in a child stay so for good.
        reader.start()
        for _ in range(20):
            child = os.fork()
            if child == 0:
                signal.alarm(10)
                try:
                    pool.call("echo", "echo", 1)
                except PoolClosed:
                    pool.close()
                    os._exit(7)
                finally:
                    os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    reader.join(10)
    assert pool.call("echo", "echo", 2) == 2
    assert pool.status()["echo"].incarnation == 1


@pytest.mark.parametrize("busy", [False, True], ids=["leading", "following"])
def test_ctrl_c_ends_a_waiting_call(pool: Pool, busy: bool) -> None:
    pool.start()
    other = pool.stream("echo", "sleep", 20)

    def lead() -> None:
        with contextlib.suppress(PoolClosed):
            list(other)

    leader = threading.Thread(target=lead)
    if busy:
        leader.start()
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        pool.call("echo", "echo")
    timer.join()
    pid = pool.status()["echo"].pid
    pool.close(timeout=0.1)
    assert pid is not None
    assert not is_running(pid)
    if busy:
        leader.join(10)


def interrupted_from_another_thread(wait: Callable[[], object]) -> None:
    def get_signal() -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    timer = threading.Timer(0.3, get_signal)
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        wait()
    assert time.monotonic() - began < 10  # so it was not the wait's own end, after 20 s or more
    timer.join()


@pytest.mark.parametrize("blocking", ["call", "ping", "close"])
def test_a_signal_that_another_thread_gets_ends_a_wait_too(pool: Pool, blocking: str) -> None:
    pool.start()
    pid = signal_worker(pool, "echo", "SIGSTOP")
    waits = {
        "call": lambda: pool.call("echo", "echo", timeout=20),
        "ping": lambda: pool.ping(timeout=20),
        "close": lambda: pool.close(timeout=20),
    }

    interrupted_from_another_thread(waits[blocking])
    pool.close(timeout=0.1)
    assert not is_running(pid)


def test_a_worker_that_a_close_did_not_wait_for_ends_with_its_pool() -> None:
    def close_in_vain() -> int:
        pool = Pool(echo=echo_role(), close_timeout=0.1).start()
        pid = signal_worker(pool, "echo", "SIGSTOP")
        interrupted_from_another_thread(lambda: pool.close(timeout=20))
        assert is_running(pid)
        return pid

    pid = close_in_vain()
    gc.collect()
    assert not is_running(pid)


def test_a_signal_that_another_thread_gets_ends_a_pause_before_a_restart() -> None:
    with Pool(echo=echo_role(), policy=Policy(backoff=60.0)) as pool:
        for code in (1, 2):
            pool.call("echo", "echo")
            with pytest.raises(WorkerCrashed):
                pool.call("echo", "exit", code)
        interrupted_from_another_thread(lambda: pool.call("echo", "echo"))


def test_ctrl_c_at_a_terminal_does_not_reach_the_worker() -> None:
    script = (
        "try:\n"
        "    print(pool.call('echo', 'facts')['pid'], flush=True)\n"
        "    pool.call('echo', 'sleep', 30)\n"
        "except KeyboardInterrupt: print(pool.ping() < 5, flush=True)\n"
    )
    with started_host(script) as (host, pid):
        assert eventually(lambda: os.getpgid(pid) != os.getpgid(host.pid))
        assert pid not in children()
        host.send_signal(signal.SIGINT)
        assert host.stdout is not None
        assert host.stdout.read() == "True\n"
        assert host.wait(10) == 0
