"""The fine-tuning of one trial: a policy, a prepared set and settings go in, reports come out.

Nothing here knows of Ray. Where a process group exists (``torch.distributed``) the ranks share each global
batch and each evaluation set; the result does not depend on their number.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from clippo.config import TrainConfig
from clippo.errors import DivergedError
from clippo.evaluate import Counts
from clippo.evaluate.counts import rank_and_world
from clippo.losses import OF_ONE_PICTURE
from clippo.model import BetaAverage, Policy, Weights
from clippo.prepared import EvalData, PreparedSet
from clippo.train.batches import Pairs, check_batches, epoch_batches
from clippo.train.checkpoint import Checkpoints, load_state, save_policy, save_state, weights_after
from clippo.train.measure import (
    AVERAGED,
    LAST,
    Tuned,
    WorthTesting,
    all_variants,
    evaluate_folds,
    evaluate_tuned,
)
from clippo.train.step import Frozen, Step, TrialSettings

Report = Callable[[dict[str, Any]], None]
"""Called by every rank after every epoch."""

AGAIN = "again"
"""Key of a report that a resumed trial repeats, and after which it had gone on."""

FAILURE = "failure"
"""Key of a report that says why a trial failed."""

UNFINISHED = "unfinished"
"""Key of a report that says why a trial could not go on, where that says nothing of its settings."""


class _Tuning:
    """A policy that is tuned, on all pairs or without those of a fold."""

    def __init__(
        self, policy: Policy, prepared: PreparedSet, frozen: Frozen, settings: TrialSettings,
        config: TrainConfig, device: torch.device, without: int | None = None,
    ) -> None:  # fmt: skip
        self.policy, self._settings, self._config, self._device = policy, settings, config, device
        self.pairs = Pairs.of(prepared, frozen, settings.pairs, without)
        of_one = settings.loss not in OF_ONE_PICTURE or self.pairs.across_P is None
        assert of_one, f"{settings.loss} on pairs {settings.pairs!r}, which a sweep refuses before it starts"
        check_batches(len(self.pairs), config.batch_size, rank_and_world()[1])
        self.steps_per_epoch = math.ceil(len(self.pairs) / config.batch_size)
        self._total_steps = self.steps_per_epoch * settings.epochs
        self.step = Step(policy, frozen, settings, config, self.pairs.captions, device)
        self.average = BetaAverage(policy.trainable_weights(), self._total_steps, config.average_beta)

    @property
    def weights(self) -> Weights:
        return {n: w.detach() for n, w in self.policy.trainable_weights().items()}

    def epoch(self, epoch: int, skipped: int = 0) -> Iterator[tuple[list[float], float]]:
        """Trains for an epoch; after each step its numbers, and the seconds that its batch was waited for.

        Raises:
            DivergedError: the loss became NaN or infinite.
        """
        batches = epoch_batches(
            self.pairs, self._config.batch_size, self._settings.seed, epoch, *rank_and_world(), self._device,
            skipped=skipped,
        )  # fmt: skip
        first = epoch * self.steps_per_epoch
        for step in range(first + skipped, first + self.steps_per_epoch):
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            rate = self._settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / self._total_steps))
            values = self.step(batch, rate)
            self.average.update(self.policy.trainable_weights())
            now = [value.item() for value in values]
            if not all(map(math.isfinite, now)):
                raise DivergedError(
                    f"the loss became {now[0]} at step {step + 1} of {self._total_steps}; "
                    f"lower the learning rate ({self._settings.learning_rate:g}) or beta"
                )
            yield now, waited

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "optimizer": self.step.state_dict(),
                "average": self.average.state_dict()}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.policy.load_weights(state["weights"])
        self.step.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])


def fit(
    policy: Policy, prepared: PreparedSet, frozen: Frozen, settings: TrialSettings, config: TrainConfig,
    *, report: Report, checkpoints: Checkpoints, curve_sets: Sequence[str] = (),
    reference_counts: Sequence[Counts] = (), worth_testing: WorthTesting = all_variants,
    may_stop_after: int | None = None, device: torch.device | None = None,
    is_leaving: Callable[[], bool] = lambda: False,
) -> None:  # fmt: skip
    """Tunes a policy; resumes from its last checkpoint when there is one, in the middle of an epoch, too.

    After every epoch ``report`` gets the epoch, its metrics and the counts of the validation sets, for the
    averaged weights; after the last one for all variants and the test sets too (`evaluate_tuned`), and the
    tuned weights are saved. Seconds are those of the epoch: ``train_s``, of which ``data_s`` waiting for
    data, and ``eval_s``; ``busy_s`` is their sum over all ranks and all epochs so far, those before a
    restart included.

    Where the prepared set has folds, copies of the policy are tuned in step with it, each without the pairs
    of a fold; all that is kept of them is what they make of the sets of their folds.

    Args:
        policy: holds the reference's weights; it is trained in place.
        curve_sets: the sets, without their split, on which the curve between reference and averaged weights
            is measured after the last epoch.
        reference_counts: of the untouched model, where they are known.
        worth_testing: which variants are measured on test pictures.
        may_stop_after: from this epoch on the trial may be stopped, so its averaged weights are saved, and
            measured on test pictures where they are worth it; None: it is not stopped.
        is_leaving: asked by rank 0 after every step; a checkpoint is written when it says yes.

    Raises:
        ConfigError: a batch has fewer pairs than there are ranks.
        DivergedError: the loss became NaN or infinite; the message says at which step.
    """
    device = device or torch.device("cpu")
    rank, world = rank_and_world()
    policy.to(device).eval()  # batch norm keeps the pretrained statistics
    reference = {n: w.detach().clone() for n, w in policy.trainable_weights().items()}
    copies = [copy.deepcopy(policy) for _ in range(prepared.folds)]
    tuning = _Tuning(policy, prepared, frozen, settings, config, device)
    folds = [_Tuning(p, prepared, frozen, settings, config, device, fold) for fold, p in enumerate(copies)]
    steps_per_epoch, ends_after = tuning.steps_per_epoch, settings.stopped_after or settings.epochs

    def measure(sets: Sequence[EvalData], variants: Mapping[str, Tuned]) -> list[Counts]:
        return evaluate_folds(policy, sets, frozen, variants, tuning.step.cast, device)

    def curve() -> Iterator[tuple[str, Tuned]]:
        curves = [policy.curve(reference, t.average.weights, config.alphas, config.powers)
                  for t in (tuning, *folds)]  # fmt: skip
        for points in zip(*curves, strict=True):
            yield points[0][0], [weights for _, weights in points]

    reports: list[dict[str, Any]] = []
    busy, part = 0.0, None
    if (state := load_state(checkpoints)) is not None:
        reports, part = state["reports"], state.get("part")
        busy = part["busy_s"] if part else reports[-1]["busy_s"]
        for earlier in reports:  # whoever listened to them may be gone
            report(earlier | {AGAIN: part is not None or earlier is not reports[-1]})
        if len(reports) < ends_after:
            tuning.load_state_dict(state)
            for fold, kept in zip(folds, state.get("folds", ()), strict=True):
                fold.load_state_dict(kept)

    def save(part: dict[str, Any] | None = None) -> None:
        state = {"reports": reports, "part": part, "folds": [fold.state_dict() for fold in folds]}
        save_state(checkpoints, state | tuning.state_dict())

    def is_due() -> bool:
        minutes = config.minutes_between_checkpoints
        return is_leaving() or 0 < 60 * minutes <= time.monotonic() - saved

    saved = time.monotonic()
    for epoch in range(len(reports), ends_after):
        step, sums, before, waited = epoch * steps_per_epoch, [0.0, 0.0, 0.0], 0.0, 0.0
        if part is not None:
            step, sums, before, waited = (part[n] for n in ("step", "sums", "train_s", "data_s"))
        part, sums = None, [float(s) for s in sums]
        began = time.perf_counter()
        for values, waited_now in tuning.epoch(epoch, skipped=step - epoch * steps_per_epoch):
            step, waited = step + 1, waited + waited_now
            sums = [s + v for s, v in zip(sums, values, strict=True)]
            if rank == 0 and is_due():  # all ranks have the same weights and sums
                spent = time.perf_counter() - began
                save({"step": step, "sums": sums, "train_s": before + spent, "data_s": waited,
                      "busy_s": busy + world * spent})  # fmt: skip
                saved = time.monotonic()
        for fold in folds:
            waited += sum(waited_now for _, waited_now in fold.epoch(epoch))
        means = [s / steps_per_epoch for s in sums]
        spent = time.perf_counter() - began

        last = epoch + 1 == ends_after
        may_stop = not last and may_stop_after is not None and epoch + 1 >= may_stop_after
        tuned = {n: w.clone() for n, w in tuning.weights.items()}
        began = time.perf_counter()
        kept = {AVERAGED: tuning.average.weights} | ({LAST: tuned} if last else {})
        variants: dict[str, Tuned] = {AVERAGED: [t.average.weights for t in (tuning, *folds)]}
        if last:
            variants[LAST] = [tuned, *(fold.weights for fold in folds)]
            counts = evaluate_tuned(
                measure, prepared, variants, curve,
                curve_sets=curve_sets, reference=reference_counts, worth_testing=worth_testing,
            )  # fmt: skip
        else:
            counts = measure(prepared.evaluation_of("validation"), variants)
            if may_stop and AVERAGED in worth_testing(counts):
                counts += measure(prepared.evaluation_of("test"), variants)
        policy.load_weights(tuned)
        metrics = dict(zip(("loss", "preference_loss", "kl"), means, strict=True))
        eval_s = time.perf_counter() - began
        metrics |= {"train_s": before + spent, "data_s": waited, "eval_s": eval_s, "workers": float(world)}
        busy += world * (spent + eval_s)
        reports.append(
            {
                "epoch": epoch + 1,
                "step": (epoch + 1) * steps_per_epoch,
                "metrics": metrics,
                "busy_s": busy,
                "precision": tuning.step.precision,
                "evals": [asdict(c) for c in counts],
            }
        )
        if rank == 0:
            if may_stop:
                save_policy(checkpoints, kept, weights_after(epoch + 1))
            if last:  # nothing is left to train, so the state need not hold what training needs
                save_policy(checkpoints, kept)
                save_state(checkpoints, {"reports": reports})
            elif (epoch + 1) % config.epochs_between_checkpoints == 0 or is_due():
                save()
                saved = time.monotonic()
        report(reports[-1])
