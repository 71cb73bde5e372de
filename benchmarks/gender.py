"""Which pairs, losses and ranges the gender sweep should search: many random settings in one process.

    python -m benchmarks.gender --settings 100 --split-seed 1

A trial of a transform takes seconds, so Ray would cost as much as the trials. Only numbers on validation
pictures are used: of each setting the least skewed point of its curve that keeps enough. Printed are the
losses and pairs that reached most, and where the best quarter of the settings lies within each range.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import optuna
import torch
import tyro
from rich.progress import track

from clippo.config import SearchConfig, SweepConfig
from clippo.evaluate import Counts
from clippo.model import policy_of
from clippo.prepared import Location, prepare
from clippo.remote import node_cache
from clippo.sweep.space import draw
from clippo.tasks import objectives_of
from clippo.train import TrialSettings, fit
from clippo.train.ray_train import measure_reference
from clippo.train.shared import Shared, load_shared
from sweeps.gender_sweep import gender_sweep

WIDE = SearchConfig(
    losses=("dpo", "ipo", "kto"),
    pairs=("counter+image", "correct+image", "image"),
    beta_dpo=(0.02, 1.0),
    beta_ipo=(0.05, 0.5),
    beta_kto=(0.02, 1.0),
    kl_weight=(2.0, 100.0),
    learning_rate=(1e-3, 1e-2),
    orthogonality=(0.003, 0.1),
    epochs=(6, 32),
)
RANGES = ("beta", "kl_weight", "learning_rate", "orthogonality", "epochs")


@dataclass(frozen=True)
class Found:
    """The settings of a trial, and the best goal on its curve that keeps enough (NaN: none does)."""

    settings: dict[str, Any]
    goal: float


class _Nowhere:
    """Checkpoints that nobody needs."""

    def read(self, name: str) -> bytes | None:
        return None

    def write(self, name: str, data: bytes) -> None:
        pass


def main(*, settings: int = 60, split_seed: int = 0, keeps: float = 0.995, seed: int = 0) -> None:
    """Which settings of a transform make rankings even.

    Args:
        settings: how many are drawn.
        split_seed: of the occupations that are seen.
        keeps: retention that a point must have to count.
    """
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sweep = gender_sweep()
    sweep = replace(sweep, data=replace(sweep.data, split_seed=split_seed))
    found = measured(sweep, Location(node_cache() / "prepared"), settings, keeps, seed)
    by_kind: dict[tuple[str, str], list[float]] = defaultdict(list)
    for one in found:
        by_kind[one.settings["loss"], one.settings["pairs"]].append(one.goal)
    print(f"goal where {keeps} is kept: best, median (settings, of which so many keep it)")
    for (loss, pairs), goals in sorted(by_kind.items(), key=lambda kind: np.nanmin([*kind[1], np.inf])):
        kept = [g for g in goals if not np.isnan(g)] or [np.nan]
        n_kept = sum(not np.isnan(g) for g in goals)
        print(f"  {loss:4} {pairs:14} {min(kept):.3f} {np.median(kept):.3f}  ({len(goals)}, {n_kept})")
    best = sorted((one for one in found if not np.isnan(one.goal)), key=lambda one: one.goal)
    if not best:
        print("no setting is better than the untouched model")
        return
    best = best[: max(1, len(best) // 4)]
    print(f"ranges of the best {len(best)}, 10 to 90 %, goal up to {best[-1].goal:.3f}")
    for name in RANGES:
        low, high = np.quantile([one.settings[name] for one in best], (0.1, 0.9))
        print(f"  {name:14} {low:.3g} to {high:.3g}")


def measured(sweep: SweepConfig, location: Location, settings: int, keeps: float, seed: int) -> list[Found]:
    """Random settings, each tuned and measured on validation pictures."""
    name = prepare(sweep.task, sweep.data, sweep.model, location)
    shared = Shared(model=sweep.model, train=sweep.train, prepared=name, location=location)
    clip, prepared, frozen = load_shared(shared)
    reference, objectives = measure_reference(shared, gpus=0), objectives_of(sweep)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
    found = []
    for number in track(range(settings), description="settings"):
        drawn = draw(study.ask(), WIDE, sweep.model.trainable)
        reports: list[dict[str, Any]] = []
        fit(
            policy_of(clip, sweep.model.trainable), prepared, frozen, TrialSettings(seed=number, **drawn),
            sweep.train, report=reports.append, checkpoints=_Nowhere(), curve_sets=objectives.curve_sets,
            reference_counts=reference, worth_testing=lambda counts: (),
        )  # fmt: skip
        by_variant: dict[str, list[Counts]] = defaultdict(list)
        for plain in reports[-1]["evals"]:
            by_variant[plain["variant"]].append(Counts.of(plain))
        numbers = [objectives.values(c, reference, split="validation") for c in by_variant.values()]
        goals = [n[objectives.goal.name] for n in numbers if n["retention"] >= keeps]
        # The untouched model, which every curve has, keeps all; what is no better than it is no find.
        untouched = objectives.values(reference, reference, split="validation")[objectives.goal.name]
        best = min(goals, default=untouched)
        found.append(Found(drawn, best if best < untouched else float("nan")))
    return found


if __name__ == "__main__":
    tyro.cli(main)
