"""How soon supervision acts: ``python -m benchmarks.supervision [row ...]``.

The figures are in docs/reliability.md.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

from benchmarks.measure import summed
from benchmarks.waiting import busy
from inferpool import (
    CallTimeout,
    ChatConfig,
    Policy,
    Pool,
    Role,
    WorkerCrashed,
    WorkerStuck,
)
from inferpool.testing import Fault, scripted_embed, signal_worker

TIRELESS = Policy(max_crashes=1 << 16, backoff=0.0)
STUCK_AFTER = 1.0
_number = itertools.count()
GRACE = 0.5


def _ready(pool: Pool) -> int:
    pid = pool.start().status()["embed"].pid
    if pid is None:
        raise RuntimeError("no worker")
    return pid


def crash_to_error(pool: Pool, name: str) -> float:
    """Seconds from a signal to the error that a waiting thread gets for it."""
    pid = _ready(pool)
    ended: list[float] = []
    text = f"x{next(_number)}"  # the same request twice would be poisonous

    def wait() -> None:
        try:
            pool.embed([text])
        except WorkerCrashed:
            ended.append(time.perf_counter())

    caller = threading.Thread(target=wait)
    caller.start()
    while not pool.status()["embed"].in_flight:
        time.sleep(0.001)
    time.sleep(0.02)
    began = time.perf_counter()
    os.kill(pid, signal.Signals[name])
    caller.join()
    return ended[0] - began


def stuck_verdict(pool: Pool, *, stopped: bool) -> float:
    """Seconds from the freeze to the verdict, beyond the bound."""
    _ready(pool)
    began = time.perf_counter()
    if stopped:
        signal_worker(pool, "embed", "SIGSTOP")
    try:
        pool.embed(["x"])
    except WorkerStuck:
        return time.perf_counter() - began - STUCK_AFTER
    raise RuntimeError("no verdict")


def next_call_after_a_timeout(pool: Pool) -> float:
    """Seconds from the timeout of a hanging call to the next answer, beyond the grace."""
    _ready(pool)
    try:
        pool.embed(["x"], timeout=0.05)
    except CallTimeout:
        began = time.perf_counter()
    pool.call("embed", "inferpool.ready", timeout=60)
    return time.perf_counter() - began - GRACE


def close(role: Role, *, stopped: bool, timeout: float) -> float:
    """Seconds that closing takes."""
    pool = Pool(embed=role, close_timeout=timeout)
    _ready(pool)
    if stopped:
        signal_worker(pool, "embed", "SIGSTOP")
    began = time.perf_counter()
    pool.close()
    return time.perf_counter() - began


def long_prefill() -> str:
    """Whether a prompt of minutes, on CPUs that are busy with other things too, is held stuck."""
    policy = Policy(stuck_after=STUCK_AFTER)
    config = ChatConfig("smollm2", n_ctx=8192, n_threads=1, policy=policy)
    with Pool(chat=config).start() as pool, busy(os.cpu_count() or 1):
        began = time.perf_counter()
        try:
            tokens = pool.chat("word " * 7_900, max_tokens=1).usage.prompt_tokens
        except WorkerStuck as error:
            return f"stuck after {time.perf_counter() - began:.1f} s: {error}"
        restarts = pool.status()["chat"].restarts
        return f"{tokens} tokens in {time.perf_counter() - began:.1f} s, {restarts} verdicts"


def main() -> None:
    """Print a table of medians and worst values, in milliseconds."""
    slow = Pool(embed=scripted_embed(8, [60.0]), policy=TIRELESS)
    strict = Policy(max_crashes=1 << 16, backoff=0.0, stuck_after=STUCK_AFTER, cancel_grace=GRACE)
    hangs = Pool(embed=scripted_embed(8, [Fault("hang")]), policy=strict)
    holds = Pool(embed=scripted_embed(8, [Fault("hold_gil")]), policy=strict)
    plain = Pool(embed=scripted_embed(8), policy=strict)
    rows: list[tuple[str, int, Callable[[], float]]] = [
        ("SIGKILL to error", 200, partial(crash_to_error, slow, "SIGKILL")),
        ("SIGSEGV to error", 200, partial(crash_to_error, slow, "SIGSEGV")),
        ("stuck, handler hangs: beyond bound", 20, partial(stuck_verdict, hangs, stopped=False)),
        ("stuck, GIL held: beyond bound", 20, partial(stuck_verdict, holds, stopped=False)),
        ("stuck, SIGSTOP: beyond bound", 20, partial(stuck_verdict, plain, stopped=True)),
        ("timeout to next answer: beyond grace", 20, partial(next_call_after_a_timeout, hangs)),
        ("close, idle", 50, partial(close, scripted_embed(8), stopped=False, timeout=2.0)),
        (
            "close, stopped, timeout 0.5 s",
            20,
            partial(close, scripted_embed(8), stopped=True, timeout=0.5),
        ),
    ]
    for name, repeats, measure in rows:
        if not name.startswith(tuple(sys.argv[1:]) or name):
            continue
        values = [measure() * 1e3 for _ in range(repeats)]
        row = summed("supervision", name, values, unit="ms")
        print(
            f"{name:38} n={repeats:3}  p50 {row.p50:7.1f} ms  p99 {row.p99:7.1f} ms"
            f"  worst {max(values):7.1f} ms",
            flush=True,
        )
    for pool in (slow, hangs, holds, plain):
        pool.close()
    if "prefill".startswith(tuple(sys.argv[1:]) or ""):
        print(f"{'prefill, stuck_after 1 s':38} {long_prefill()}")


if __name__ == "__main__":
    main()
