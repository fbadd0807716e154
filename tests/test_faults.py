"""Every fault in every phase, once; ``make faults`` tries each twenty times."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fault_hosts import host_trials
from fault_rows import Trial, bystander, worker_trials


@pytest.fixture(scope="module", autouse=True)
def one_bystander() -> Iterator[None]:
    bystander()
    yield
    bystander().close()
    bystander.cache_clear()


@pytest.mark.parametrize(
    "trial",
    [
        pytest.param(trial, id=f"{trial.row}/{trial.phase}")
        for trial in [*worker_trials(), *host_trials(long=False)]
    ],
)
def test_a_fault_has_its_outcome_and_leaves_nothing(trial: Trial) -> None:
    trial.run()
