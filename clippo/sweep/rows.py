"""What a sweep keeps: the rows of each trial, and what a resumed sweep reads back from them."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from clippo.config import SweepConfig
from clippo.evaluate import Counts, objectives
from clippo.front.points import REFERENCE
from clippo.prepared import PreparedSet
from clippo.results import ResultStore
from clippo.results.checkpoints import checkpoint_folder
from clippo.train.checkpoint import POLICY

SETTINGS = ("loss", "beta", "kl_weight", "learning_rate", "epochs", "orthogonality", "seed")
"""The settings that have a column of their own; others go to params_json."""

SELECTED = "averaged"
"""The variant whose objectives steer the search, as in the published procedure."""


class TrialRows:
    """Turns what a trial reports into the rows that are kept."""

    def __init__(self, config: SweepConfig, store: ResultStore, prepared: PreparedSet) -> None:
        self.config, self.store = config, store
        self._provenance = _provenance() | {
            "model_digest": prepared.model_digest,
            "data_digest": prepared.data_digest,
            "prepared_digest": prepared.digest,
        }

    def score(self, counts: list[Counts], reference: list[Counts]) -> list[float]:
        """Robustness and retention on validation pictures."""
        found = objectives(
            counts, reference, split="validation",
            robustness_sets=self.config.robustness_sets, retention_sets=self.config.retention_sets,
        )  # fmt: skip
        return [found["robustness"], found["retention"]]

    def write(
        self, trial_id: str, attempt: int, settings: Mapping[str, Any], reports: list[dict[str, Any]], *,
        began: float, failure: str | None = None, preemptions: int = 0,
    ) -> None:  # fmt: skip
        """Keeps one finished trial; writing it again changes nothing.

        Args:
            began: when it was started [seconds since the epoch].
            failure: why it failed, None if it did not.
            preemptions: how often it was restarted.
        """
        # Earlier attempts count too: the reports of a resumed trial go back to its first epoch.
        spent = [r["metrics"] for r in reports if r["metrics"]]
        busy = sum(m["train_s"] + m["eval_s"] for m in spent)
        devices = max(1, self.config.workers) * (self.config.gpus_per_worker or 1.0)
        known = {n: settings.get(n) for n in SETTINGS}
        folder = checkpoint_folder(self.config.name, trial_id)
        tuned = trial_id != REFERENCE and failure is None
        trial = {
            **known,
            **self._provenance,
            "status": "failed" if failure else "completed",
            "error": failure,
            "started_at": datetime.fromtimestamp(began, timezone.utc),
            "finished_at": datetime.now(timezone.utc),
            "batch_size": self.config.train.batch_size,
            "workers": self.config.workers,
            "trainable": self.config.model.trainable,
            "optimizer": self.config.train.optimizer,
            "precision": reports[-1]["precision"] if reports else self.config.train.precision,
            "params_json": json.dumps({n: v for n, v in settings.items() if n not in known}),
            "wall_s": time.time() - began,
            "device_s": busy * devices,
            "device_type": "gpu" if self.config.gpus_per_worker else "cpu",
            "preemptions": preemptions,
            "checkpoint_uri": self.store.uri_of(f"{folder}/{POLICY}") if tuned else None,
        }
        metrics = [
            {"epoch": r["epoch"], "step": r["step"], "name": name, "value": value}
            for r in reports
            for name, value in r["metrics"].items()
        ]
        seed = settings.get("seed")
        evals = [{"epoch": r["epoch"], "seed": seed, **row} for r in reports for row in r["evals"]]
        self.store.write_trial(self.config.name, trial_id, attempt, trial, metrics, evals)


@dataclass(frozen=True)
class FinishedTrial:
    """A trial that the store holds; ``counts`` are those that steer the search, none if it failed."""

    settings: dict[str, Any]
    counts: list[Counts]
    prepared_digest: str


def finished_trials(store: ResultStore, sweep: str) -> dict[str, FinishedTrial]:
    """What a resumed sweep starts from, by trial id."""
    counts: dict[str, dict[int, list[Counts]]] = {}
    for row in store.evals(sweep).to_pylist():
        if row["variant"] in (SELECTED, REFERENCE):
            measured = Counts(**{f.name: row[f.name] for f in fields(Counts)})
            counts.setdefault(row["trial_id"], {}).setdefault(row["epoch"], []).append(measured)
    finished = {}
    for row in store.trials(sweep).to_pylist():
        by_epoch = counts.get(row["trial_id"], {}) if row["status"] == "completed" else {}
        settings = {n: row[n] for n in SETTINGS} | json.loads(row["params_json"] or "{}")
        finished[row["trial_id"]] = FinishedTrial(
            settings, by_epoch[max(by_epoch)] if by_epoch else [], row["prepared_digest"]
        )
    return finished


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
