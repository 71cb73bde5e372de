"""Logs of a process that runs trials: every line says which one it is about."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

logger = logging.getLogger(__name__)

Report = Callable[[Mapping[str, Any]], object]


def log_as(trial: str) -> None:
    """Puts the name of a trial before every line that this process logs from now on.

    What clippo logs goes to the standard error, which Ray keeps by process and shows with ``--verbose``.
    """
    logging.setLogRecordFactory(partial(_record, trial))
    ours = logging.getLogger("clippo")
    if not ours.handlers:
        ours.addHandler(logging.StreamHandler())
        ours.setLevel(logging.INFO)
        ours.propagate = False


def _record(trial: str, *args: Any, **more: Any) -> logging.LogRecord:
    record = logging.LogRecord(*args, **more)
    record.msg = f"[{trial}] {record.msg}"
    return record


def logged(report: Report) -> Report:
    """A report that also leaves a line in the log."""

    def told(content: Mapping[str, Any]) -> None:
        if "metrics" in content:
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in content["metrics"].items())
            logger.info("epoch %d, step %d: %s", content["epoch"], content["step"], numbers)
        report(content)

    return told
