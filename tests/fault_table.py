"""Tries every fault of `fault_rows` and `fault_hosts` many times, and writes what came of it.

Used by ``make faults``: ``python tests/fault_table.py --repeats 20 docs/reliability.md``.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from fault_hosts import host_trials
from fault_rows import Trial, worker_trials

BEGIN, END = "<!-- faults: begin -->\n", "<!-- faults: end -->\n"


@functools.cache
def trials() -> list[Trial]:
    return [*worker_trials(), *host_trials(long=True)]


def attempt(index: int, times: int) -> list[float | str]:
    """Seconds that each try took, or why it failed."""
    trial = trials()[index]

    def once(_: int) -> float | str:
        try:
            took = trial.run()
            assert took <= trial.bound, f"took {took:.3f} s"
        except Exception:  # noqa: BLE001
            return traceback.format_exc()
        return took

    if trial.at_rest:
        with ThreadPoolExecutor(times) as threads:
            return list(threads.map(once, range(times)))
    return [once(number) for number in range(times)]


@dataclass
class Tally:
    """What became of one row."""

    phases: dict[str, int] = field(default_factory=dict)
    """How often each was tried."""
    bounds: set[float] = field(default_factory=set)
    worst: float = 0.0
    failures: int = 0

    def cells(self) -> Iterator[str]:
        """Phases, bound, worst, repeats, failures."""
        calls = sum(phase.startswith("call ") for phase in self.phases)
        yield f"each of {calls} system calls" if calls else ", ".join(self.phases)
        yield " or ".join(f"{bound:g}" for bound in sorted(self.bounds))
        yield f"{self.worst:.3f}"
        yield str(sum(self.phases.values()) if calls else min(self.phases.values()))
        yield str(self.failures)


def run(only: str, repeats: int, jobs: int) -> dict[str, Tally]:
    """Try the rows whose name holds ``only``, in so many processes."""
    spawn = multiprocessing.get_context("spawn")
    began = time.monotonic()
    tallies: dict[str, Tally] = defaultdict(Tally)
    with ProcessPoolExecutor(jobs, spawn) as processes:
        running = {}
        for index, trial in enumerate(trials()):
            if only in trial.row:
                tally = tallies[trial.row]
                # Many system calls make one row.
                times = repeats if not trial.phase.startswith("call ") else max(1, repeats // 20)
                tally.phases[trial.phase] = times
                tally.bounds.add(trial.bound)
                running[processes.submit(attempt, index, times)] = trial
        for done in as_completed(running):
            trial = running[done]
            results = done.result()
            tally = tallies[trial.row]
            worst = max((each for each in results if isinstance(each, float)), default=0.0)
            tally.worst = max(tally.worst, worst)
            problems = [each for each in results if isinstance(each, str)]
            tally.failures += len(problems)
            print(
                f"{time.monotonic() - began:7.1f} s  {trial.row} / {trial.phase}: "
                f"worst {worst:.3f} s, {len(problems)} of {len(results)} failed",
                flush=True,
            )
            for problem in problems:
                print(problem, flush=True)
    return tallies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("table", type=Path, nargs="?", help="file whose table is replaced")
    arguments = parser.parse_args()
    tallies = run(arguments.only, arguments.repeats, arguments.jobs)
    rows = [
        ["fault", "phases", "bound, s", "worst, s", "repeats", "failures"],
        ["---"] * 6,
        *([name, *tally.cells()] for name, tally in tallies.items()),
    ]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    print(table)
    if arguments.table is not None:
        before, _, rest = arguments.table.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        arguments.table.write_text(f"{before}{BEGIN}{table}{END}{after}")
    raise SystemExit(any(tally.failures for tally in tallies.values()))


if __name__ == "__main__":
    main()
