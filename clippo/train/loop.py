"""The fine-tuning of one trial: a policy, a prepared set and settings go in, reports come out.

Nothing here knows of Ray. Where a process group exists (``torch.distributed``) the ranks share each global
batch and each evaluation set; the result does not depend on their number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from clippo.config import TrainConfig
from clippo.errors import DivergedError
from clippo.evaluate import Counts
from clippo.evaluate.counts import rank_and_world
from clippo.model import BetaAverage, Policy, Weights
from clippo.prepared import EvalData, PreparedSet
from clippo.train.batches import Pairs, check_batches, epoch_batches
from clippo.train.checkpoint import Checkpoints, load_state, save_policy, save_state, weights_after
from clippo.train.measure import AVERAGED, LAST, WorthTesting, all_variants, evaluate_policy, evaluate_tuned
from clippo.train.step import Frozen, Step, TrialSettings

Report = Callable[[dict[str, Any]], None]
"""Called by every rank after every epoch."""

AGAIN = "again"
"""Key of a report that a resumed trial repeats, and after which it had gone on."""

FAILURE = "failure"
"""Key of a report that says why a trial failed."""


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
    pairs = Pairs.of(prepared, frozen, settings.pairs)
    steps_per_epoch = math.ceil(len(pairs) / config.batch_size)
    total_steps, ends_after = steps_per_epoch * settings.epochs, settings.stopped_after or settings.epochs
    check_batches(len(pairs), config.batch_size, world)
    step_of = Step(policy, frozen, settings, config, pairs.captions, device)
    average = BetaAverage(reference, total_steps, config.average_beta)

    def measure(sets: Sequence[EvalData], variants: Mapping[str, Weights]) -> list[Counts]:
        return evaluate_policy(policy, sets, frozen, variants, step_of.cast, device)

    reports: list[dict[str, Any]] = []
    busy, part = 0.0, None
    if (state := load_state(checkpoints)) is not None:
        reports, part = state["reports"], state.get("part")
        busy = part["busy_s"] if part else reports[-1]["busy_s"]
        for earlier in reports:  # whoever listened to them may be gone
            report(earlier | {AGAIN: part is not None or earlier is not reports[-1]})
        if len(reports) < ends_after:
            policy.load_weights(state["weights"])
            step_of.load_state_dict(state["optimizer"])
            average.load_state_dict(state["average"])

    def save(part: dict[str, Any] | None = None) -> None:
        weights = {n: w.detach() for n, w in policy.trainable_weights().items()}
        state = {"reports": reports, "part": part, "weights": weights,
                 "optimizer": step_of.state_dict(), "average": average.state_dict()}  # fmt: skip
        save_state(checkpoints, state)

    def is_due() -> bool:
        minutes = config.minutes_between_checkpoints
        return is_leaving() or 0 < 60 * minutes <= time.monotonic() - saved

    saved = time.monotonic()
    for epoch in range(len(reports), ends_after):
        end = (epoch + 1) * steps_per_epoch
        first, sums, before, waited = end - steps_per_epoch, torch.zeros(3), 0.0, 0.0
        if part is not None:
            first, sums, before, waited = (part[n] for n in ("step", "sums", "train_s", "data_s"))
        part, sums = None, sums.to(device)
        batches = epoch_batches(
            pairs, config.batch_size, settings.seed, epoch, rank, world, device,
            skipped=first % steps_per_epoch,
        )  # fmt: skip
        began = time.perf_counter()
        for step in range(first, end):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            rate = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / total_steps))
            values = step_of(batch, rate)
            average.update(policy.trainable_weights())
            now = values.tolist()
            if not all(map(math.isfinite, now)):
                raise DivergedError(
                    f"the loss became {now[0]} at step {step + 1} of {total_steps}; "
                    f"lower the learning rate ({settings.learning_rate:g}) or beta"
                )
            sums += values
            if rank == 0 and is_due():  # all ranks have the same weights and sums
                spent = time.perf_counter() - began
                save({"step": step + 1, "sums": sums, "train_s": before + spent, "data_s": waited,
                      "busy_s": busy + world * spent})  # fmt: skip
                saved = time.monotonic()
        means = (sums / steps_per_epoch).tolist()
        spent = time.perf_counter() - began

        last = epoch + 1 == ends_after
        may_stop = not last and may_stop_after is not None and epoch + 1 >= may_stop_after
        tuned = {n: w.detach().clone() for n, w in policy.trainable_weights().items()}
        began = time.perf_counter()
        variants = {AVERAGED: average.weights}
        if last:
            variants[LAST] = tuned
            counts = evaluate_tuned(
                measure, prepared, variants,
                lambda: policy.curve(reference, average.weights, config.alphas, config.powers),
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
                "precision": step_of.precision,
                "evals": [asdict(c) for c in counts],
            }
        )
        if rank == 0:
            if may_stop:
                save_policy(checkpoints, variants, weights_after(epoch + 1))
            if last:  # nothing is left to train, so the state need not hold what training needs
                save_policy(checkpoints, variants)
                save_state(checkpoints, {"reports": reports})
            elif (epoch + 1) % config.epochs_between_checkpoints == 0 or is_due():
                save()
                saved = time.monotonic()
        report(reports[-1])
