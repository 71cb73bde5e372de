"""What a sweep keeps: the rows of each trial, and what a resumed sweep reads back from them."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from clippo.config import SweepConfig
from clippo.evaluate import Counts
from clippo.evaluate.objectives import COST, share_of
from clippo.evaluate.rankings import Ranking
from clippo.front.counts import EVAL_COLUMNS, REFERENCE, SETTINGS, STOPPED, STOPPED_AFTER
from clippo.prepared import PreparedSet
from clippo.results import ResultStore, View
from clippo.results.checkpoints import checkpoint_folder
from clippo.sweep.search import Outcome
from clippo.tasks import objectives_of
from clippo.train.checkpoint import POLICY, weights_after

RANKING_KEY = ("trial_id", "epoch", "eval_set", "variant")
"""What rankings belong to, in the tables."""

SELECTED = "averaged"
"""The variant whose objectives steer the search, as in the published procedure."""


class Scorer:
    """What the trials of a sweep reached, from their counts."""

    def __init__(self, config: SweepConfig) -> None:
        self._config, self.objectives = config, objectives_of(config)

    def numbers(
        self, counts: Sequence[Counts], reference: Sequence[Counts], device_s: float = 0.0
    ) -> dict[str, float]:
        """Goal, retention and the other objectives of a trial by name, on validation pictures.

        Raises:
            ConfigError: an objective that is none, or that is measured on no validation set.
        """
        found = self.objectives.values(counts, reference, split="validation")
        found[COST] = device_s
        wanted = [o for o in self._config.search.objectives if o not in found]
        names = self.objectives.names
        return found | {o: share_of(o, counts, split="validation", names=names) for o in wanted}

    def of_report(self, report: Mapping[str, Any], reference: Sequence[Counts]) -> dict[str, float] | None:
        """The same of a report, for the variant that steers the search; None where it has no counts."""
        if "evals" not in report:
            return None
        counts = [Counts.of(e) for e in report["evals"] if e["variant"] == SELECTED]
        return self.numbers(counts, reference, device_s(report, self._config))

    def outcome(self, trial: FinishedTrial, reference: Sequence[Counts]) -> Outcome:
        """How a trial of the store ended."""
        if not trial.counts:
            return Outcome(None, reason=trial.error or "no counts")
        numbers = self.numbers(trial.counts, reference, trial.device_s)
        return Outcome(numbers, stopped=trial.status == STOPPED)


def device_s(report: Mapping[str, Any], config: SweepConfig) -> float:
    """Device time of a trial up to a report [s]."""
    return float(report["busy_s"]) * (config.gpus_per_worker or 1.0)


class TrialRows:
    """Turns what a trial reports into the rows that are kept."""

    def __init__(self, config: SweepConfig, store: ResultStore, prepared: PreparedSet) -> None:
        self.config, self.store = config, store
        self._provenance = _provenance() | {
            "model_digest": prepared.model_digest,
            "data_digest": prepared.data_digest,
            "prepared_digest": prepared.digest,
        }

    def write(
        self, trial_id: str, attempt: int, settings: Mapping[str, Any], reports: list[dict[str, Any]], *,
        began: float, failure: str | None = None, stopped: bool = False, preemptions: int = 0,
    ) -> None:  # fmt: skip
        """Keeps one finished trial; writing it again changes nothing.

        Args:
            began: when it was started [seconds since the epoch].
            failure: why it failed, None if it did not.
            stopped: whether the scheduler stopped it early.
            preemptions: how often it was restarted.
        """
        known = {n: settings.get(n) for n in SETTINGS}
        others = {n: v for n, v in settings.items() if n not in known}
        if stopped:
            others[STOPPED_AFTER] = reports[-1]["epoch"]
        weights = weights_after(reports[-1]["epoch"]) if stopped else POLICY
        folder = checkpoint_folder(self.config.name, trial_id)
        tuned = trial_id != REFERENCE and failure is None
        trial = {
            **known,
            **self._provenance,
            "status": "failed" if failure else STOPPED if stopped else "completed",
            "error": failure,
            "started_at": datetime.fromtimestamp(began, timezone.utc),
            "finished_at": datetime.now(timezone.utc),
            "batch_size": self.config.train.batch_size,
            "workers": self._workers(reports),
            "trainable": self.config.model.trainable,
            "optimizer": self.config.train.optimizer,
            "precision": reports[-1]["precision"] if reports else self.config.train.precision,
            "params_json": json.dumps(others),
            "wall_s": time.time() - began,
            "device_s": device_s(reports[-1], self.config) if reports else 0.0,
            "device_type": "gpu" if self.config.gpus_per_worker else "cpu",
            "preemptions": preemptions,
            "checkpoint_uri": self.store.uri_of(f"{folder}/{weights}") if tuned else None,
        }
        metrics = [
            {"epoch": r["epoch"], "step": r["step"], "name": name, "value": value}
            for r in reports
            for name, value in r["metrics"].items()
        ]
        seed = settings.get("seed")
        measured = [({"epoch": r["epoch"], "seed": seed}, row) for r in reports for row in r["evals"]]
        evals = [key | {n: v for n, v in row.items() if n != "rankings"} for key, row in measured]
        rankings = [
            key | {"eval_set": row["eval_set"], "variant": row["variant"], **ranking}
            for key, row in measured
            for ranking in row.get("rankings", ())
        ]
        self.store.write_trial(self.config.name, trial_id, attempt, trial, metrics, evals, rankings)

    def _workers(self, reports: list[dict[str, Any]]) -> int:
        """The most worker processes that a trial had at a time; what each epoch had is among its metrics."""
        if not self.config.is_elastic:
            return self.config.max_workers
        return max((int(r["metrics"].get("workers", 0)) for r in reports), default=self.config.min_workers)


@dataclass(frozen=True)
class FinishedTrial:
    """A trial that the store holds.

    Attributes:
        by_epoch: the counts that steer the search; none if it failed.
    """

    settings: dict[str, Any]
    by_epoch: dict[int, list[Counts]]
    status: str
    error: str | None
    device_s: float
    started_at: datetime
    finished_at: datetime
    prepared_digest: str

    @property
    def counts(self) -> list[Counts]:
        """Those of its last epoch."""
        return self.by_epoch[max(self.by_epoch)] if self.by_epoch else []


def finished_trials(store: ResultStore, sweep: str) -> dict[str, FinishedTrial]:
    """What a resumed sweep starts from, by trial id."""
    counts: dict[str, dict[int, list[Counts]]] = {}
    where = {"variant": [SELECTED, REFERENCE]}
    rankings: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    columns = (*RANKING_KEY, *(f.name for f in fields(Ranking)))
    for row in store.rankings(sweep, View(columns=columns, where=where)).to_pylist():
        rankings[tuple(row.pop(n) for n in RANKING_KEY)].append({n: _plain(v) for n, v in row.items()})
    for row in store.evals(sweep, View(columns=EVAL_COLUMNS, where=where)).to_pylist():
        measured = Counts.of(row | {"rankings": rankings[tuple(row[n] for n in RANKING_KEY)]})
        counts.setdefault(row["trial_id"], {}).setdefault(row["epoch"], []).append(measured)
    finished = {}
    for row in store.trials(sweep).to_pylist():
        finished[row["trial_id"]] = FinishedTrial(
            settings={n: row[n] for n in SETTINGS} | json.loads(row["params_json"] or "{}"),
            by_epoch=counts.get(row["trial_id"], {}) if row["status"] != "failed" else {},
            device_s=row["device_s"] or 0.0,
            **{n: row[n] for n in ("status", "error", "started_at", "finished_at", "prepared_digest")},
        )
    return finished


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _provenance() -> dict[str, str | None]:
    packages = {
        n: importlib.metadata.version(n) for n in ("ray", "torch", "open_clip_torch", "optuna", "numpy")
    }
    return {
        "code_version": importlib.metadata.version("clippo"),
        "git_commit": _git_commit(),
        "packages_json": json.dumps(packages | {"python": platform.python_version()}),
    }


def _git_commit() -> str | None:
    """The commit of this checkout; None where there is no git or the package is installed elsewhere."""
    package = Path(__file__).parents[1]
    command = ["git", "-C", str(package), "rev-parse", "HEAD", "--show-toplevel"]
    try:
        commit, top = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[
            :2
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit if Path(top) == package.parent else None
