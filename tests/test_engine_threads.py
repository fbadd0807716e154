"""How many threads compute while others need the CPUs."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing

import numpy as np
import pytest

from inferpool.engine.backend import lib
from inferpool.engine.context import Batch, Context
from inferpool.engine.model import Model
from inferpool.engine.threads import ThreadCount
from inferpool.models import resolve

STEP = 0.03  # seconds, longer than what is looked at together


class Computing:
    """Steps of `STEP` seconds, one after the other.

    Attributes:
        history: the numbers of threads that computed them.
    """

    def __init__(self, most: int) -> None:
        self.threads = ThreadCount(most)
        self.history: list[int] = []
        self._now = 0.0

    def run(self, seconds: float, cpus: Callable[[int], float], step: float = STEP) -> None:
        """Compute while so many of some threads get a CPU."""
        end = self._now + seconds
        while self._now < end:
            number = self.threads.now
            self.history.append(number)
            began, self._now = self._now, self._now + step
            changed = self.threads.took(began=began, ended=self._now, cpu=step * cpus(number))
            assert changed is (self.threads.now != number)


def test_all_threads_compute_on_a_quiet_machine() -> None:
    computing = Computing(4)
    computing.run(10, lambda number: 0.8 * number)
    assert set(computing.history) == {4}


def test_one_thread_computes_beside_a_busy_process() -> None:
    computing = Computing(2)
    computing.run(20, lambda number: 1.0)
    assert computing.history[:2] == [2, 1]
    # It is tried again, ever more seldom: after 0.1 s, 0.2 s … 1.6 s.
    waits = np.diff(np.flatnonzero(np.array(computing.history) == 2)) * STEP
    assert waits[0] == pytest.approx(0.1, abs=2 * STEP)
    assert waits[-1] == pytest.approx(1.6, abs=3 * STEP)
    assert (np.diff(waits) > -STEP).all()


def test_all_threads_compute_again_when_the_others_have_gone() -> None:
    computing = Computing(8)
    computing.run(5, lambda number: min(number, 3.0))
    assert np.median(computing.history[20:]) == 3
    computing.history.clear()
    computing.run(5, float)
    assert computing.history[-1] == 8
    # And a new disturbance is as soon over as the first one was.
    computing.run(0.05, lambda number: 1.0)
    computing.history.clear()
    computing.run(0.5, float)
    assert max(computing.history) > 2


def test_a_hiccup_changes_nothing() -> None:
    computing = Computing(2)
    for _ in range(100):
        computing.run(0.016, lambda number: 2.0, step=0.004)
        computing.run(0.004, lambda number: 0.5, step=0.004)
    assert set(computing.history) == {2}


def test_a_single_thread_stays() -> None:
    computing = Computing(1)
    computing.run(5, lambda number: 0.1)
    assert set(computing.history) == {1}


@pytest.mark.parametrize(("n_gpu_layers", "expected"), [(0, 1), (1, 2)])
def test_a_context_computes_with_fewer_threads_unless_it_waits_for_an_accelerator(
    n_gpu_layers: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if the process got no CPU at all.
    monkeypatch.setattr(time, "process_time", lambda: 0.0)
    with (
        closing(Model(resolve("smollm2"), n_gpu_layers=n_gpu_layers)) as model,
        closing(Context(model, n_ctx=512, n_batch=512, n_threads=2)) as context,
    ):
        batch = Batch(512)
        batch.add(np.full(256, 7, np.int32), output=False)
        batch.want_last()
        context.decode(batch)
        assert lib.llama_n_threads(context.handle) == expected
        assert lib.llama_n_threads_batch(context.handle) == expected
        assert np.isfinite(context.logits()).all()
        context.clear()
        context.decode(batch)
        assert np.isfinite(context.logits()).all()
