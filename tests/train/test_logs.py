"""Lines of a log carry the name of their trial."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from clippo.train.logs import log_as, logged


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    ours = logging.getLogger("clippo")
    before = list(ours.handlers), ours.level, ours.propagate
    yield
    logging.setLogRecordFactory(logging.LogRecord)
    ours.handlers, ours.level, ours.propagate = before


def test_the_trial_that_runs_now_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    reports: list[Any] = []
    report = logged(reports.append)
    for trial in ("s1-00000-0", "s1-00001-0"):  # a process is reused
        log_as(trial)
        report({"epoch": 1, "step": 16, "metrics": {"loss": 0.51234567, "kl": 2.0}})
        logging.getLogger("clippo.results.objects").warning("%d %% full", 99)
    assert capsys.readouterr().err.splitlines() == [
        "[s1-00000-0] epoch 1, step 16: loss 0.5123, kl 2",
        "[s1-00000-0] 99 % full",
        "[s1-00001-0] epoch 1, step 16: loss 0.5123, kl 2",
        "[s1-00001-0] 99 % full",
    ]
    report({"failure": "nan"})
    assert len(reports) == 3
