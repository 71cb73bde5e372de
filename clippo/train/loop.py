"""The fine-tuning of one trial: a policy, a prepared set and settings go in, reports come out.

Nothing here knows of Ray. Where a process group exists (``torch.distributed``) the ranks share each global
batch and each evaluation set; the result does not depend on their number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clippo.config import TrainConfig
from clippo.errors import ConfigError, DivergedError
from clippo.evaluate import Counts
from clippo.evaluate.counts import count_predictions, rank_and_world, sum_over_ranks
from clippo.model import BetaAverage, Policy
from clippo.prepared import EvalData, PreparedSet
from clippo.train.checkpoint import Checkpoints, load_state, save_policy, save_state
from clippo.train.step import Batch, class_logps, pick, preference_step

EVAL_BATCH = 128

Report = Callable[[dict[str, Any]], None]
"""Called by every rank after every epoch."""

FAILURE = "failure"
"""Key of a report that says why a trial failed."""


@dataclass(frozen=True, kw_only=True)
class TrialSettings:
    """What the search chooses for one trial.

    Attributes:
        beta: preference temperature; None for a loss that has none.
    """

    loss: str
    beta: float | None
    kl_weight: float
    learning_rate: float
    epochs: int
    seed: int


@dataclass(frozen=True)
class Frozen:
    """What every step uses and no step changes: text features of all classes (C, D), and the logit scale."""

    text_CD: Tensor
    logit_scale: float


def fit(
    policy: Policy, prepared: PreparedSet, frozen: Frozen, settings: TrialSettings, config: TrainConfig,
    *, report: Report, checkpoints: Checkpoints, device: torch.device | None = None,
) -> None:  # fmt: skip
    """Tunes a policy; resumes from its last checkpoint when there is one.

    After every epoch ``report`` gets the epoch, the training metrics and the counts of the validation sets,
    for the averaged weights; after the last one for all variants and the test sets too, and the tuned weights
    are saved.

    Args:
        policy: holds the reference's weights; it is trained in place.

    Raises:
        DivergedError: the loss became NaN or infinite; the message says at which step.
    """
    device = device or torch.device("cpu")
    rank, world = rank_and_world()
    policy.to(device).eval()  # batch norm keeps the pretrained statistics
    reference = {n: w.detach().clone() for n, w in policy.trainable_weights().items()}
    wrapped: nn.Module = policy
    if world > 1:
        wrapped = DistributedDataParallel(policy, device_ids=[device] if device.type == "cuda" else None)
    pairs = Pairs.of(prepared, frozen)
    steps_per_epoch = math.ceil(len(prepared.attacked) / config.batch_size)
    total_steps = steps_per_epoch * settings.epochs
    if len(prepared.attacked) // steps_per_epoch < world:
        raise ConfigError(
            f"{len(prepared.attacked)} pairs in batches of {config.batch_size} leave one of {world} workers "
            "without a pair; raise train.batch_size or lower workers"
        )
    optimizer = _optimizer(policy, settings, config)
    average = BetaAverage(reference, total_steps, config.average_beta)
    precision = resolved_precision(config.precision, device)
    cast = autocast(precision, device)
    seen_text_CD = frozen.text_CD[list(prepared.seen)].to(device)
    loss_settings = {"label_smoothing": config.label_smoothing} if settings.loss == "dpo" else {}

    reports: list[dict[str, Any]] = []
    spent = 0.0
    if (state := load_state(checkpoints)) is not None:
        reports, spent = state["reports"], state["train_s"]
        for earlier in reports:  # whoever listened to them may be gone
            report(earlier)
        if len(reports) < settings.epochs:
            policy.load_weights(state["weights"])
            optimizer.load_state_dict(state["optimizer"])
            average.load_state_dict(state["average"])

    for epoch in range(len(reports), settings.epochs):
        began = time.perf_counter()
        sums = torch.zeros(3, device=device)
        batches = epoch_batches(pairs, config.batch_size, settings.seed, epoch, rank, world, device)
        for step, batch in enumerate(batches, start=epoch * steps_per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / total_steps))
            with cast():
                embeddings = wrapped(batch.inputs)
            loss = preference_step(
                embeddings, batch, seen_text_CD, frozen.logit_scale, loss=settings.loss,
                beta=settings.beta or 1.0, kl_weight=settings.kl_weight, **loss_settings,
            )  # fmt: skip
            optimizer.zero_grad(set_to_none=True)
            # DDP averages over ranks; the factor makes that the mean over the global batch.
            (loss.total * (batch.share * world)).backward()
            optimizer.step()
            average.update(policy.trainable_weights())
            # Over all ranks, so that all of them stop at the same step.
            parts = torch.stack([loss.total.detach(), loss.preference, loss.kl])
            values = sum_over_ranks(parts * batch.share)
            if not torch.isfinite(values).all():
                raise DivergedError(
                    f"the loss became {values[0].item()} at step {step + 1} of {total_steps}; "
                    f"lower the learning rate ({settings.learning_rate:g}) or beta"
                )
            sums += values
        means = (sums / steps_per_epoch).tolist()
        spent += time.perf_counter() - began

        last = epoch + 1 == settings.epochs
        tuned = {n: w.detach().clone() for n, w in policy.trainable_weights().items()}
        variants = {"averaged": average.weights, **({"last": tuned} if last else {})}
        sets = list(prepared.evaluation) if last else prepared.evaluation_of("validation")
        began = time.perf_counter()
        counts = []
        for name, weights in variants.items():
            policy.load_weights(weights)
            counts += evaluate_policy(policy, sets, frozen, name, cast, device)
        policy.load_weights(tuned)
        metrics = dict(zip(("loss", "preference_loss", "kl"), means, strict=True))
        metrics |= {"train_s": spent, "eval_s": time.perf_counter() - began}
        step = (epoch + 1) * steps_per_epoch
        reports.append(
            {
                "epoch": epoch + 1,
                "step": step,
                "metrics": metrics,
                "precision": precision,
                "evals": [asdict(c) for c in counts],
            }
        )
        if rank == 0:
            if last:  # nothing is left to train, so the state need not hold what training needs
                save_policy(checkpoints, variants)
                save_state(checkpoints, {"reports": reports, "train_s": spent})
            elif (epoch + 1) % config.epochs_between_checkpoints == 0:
                state = {"reports": reports, "train_s": spent, "weights": tuned,
                         "optimizer": optimizer.state_dict(), "average": average.state_dict()}  # fmt: skip
                save_state(checkpoints, state)
        report(reports[-1])


@dataclass(frozen=True)
class Pairs:
    """The pairs of a prepared set with what the reference makes of them, computed once and not per step.

    ``N`` clean pictures, ``M`` attacked ones, ``C`` seen classes; labels are columns among the seen classes.
    """

    prepared: PreparedSet
    chosen_M: Tensor
    rejected_M: Tensor
    reference_clean_logps_NC: Tensor
    reference_chosen_logps_M: Tensor
    reference_rejected_logps_M: Tensor

    @classmethod
    def of(cls, prepared: PreparedSet, frozen: Frozen) -> Pairs:
        text_CD = frozen.text_CD[list(prepared.seen)]
        columns = torch.full((len(prepared.classes),), -1)
        columns[list(prepared.seen)] = torch.arange(len(prepared.seen))
        chosen, rejected = columns[prepared.attacked.labels], columns[prepared.attacked.attack_labels]
        attacked_MC = class_logps(prepared.attacked.reference, text_CD, frozen.logit_scale)
        clean_NC = class_logps(prepared.clean.reference, text_CD, frozen.logit_scale)
        return cls(
            prepared, chosen, rejected, clean_NC, pick(attacked_MC, chosen), pick(attacked_MC, rejected)
        )


def epoch_batches(
    pairs: Pairs, batch_size: int, seed: int, epoch: int, rank: int, world: int, device: torch.device
) -> Iterator[Batch]:
    """This rank's part of each global batch of an epoch; each pair comes once, in an order the seed sets.

    Batches differ by at most one pair, so none is dropped and none is tiny.
    """
    n, prepared = len(pairs.chosen_M), pairs.prepared
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
    for whole in order.tensor_split(math.ceil(n / batch_size)):
        mine = whole.tensor_split(world)[rank]
        picture = mine // prepared.copies
        inputs = torch.cat([prepared.clean.inputs(picture.tolist()), prepared.attacked.inputs(mine.tolist())])
        yield Batch(
            inputs=_to(inputs, device),
            chosen=pairs.chosen_M[mine].to(device),
            rejected=pairs.rejected_M[mine].to(device),
            reference_clean_logps=pairs.reference_clean_logps_NC[picture].to(device),
            reference_chosen_logps=pairs.reference_chosen_logps_M[mine].to(device),
            reference_rejected_logps=pairs.reference_rejected_logps_M[mine].to(device),
            share=len(mine) / len(whole),
        )


@torch.no_grad()
def evaluate_policy(
    policy: Policy, sets: Sequence[EvalData], frozen: Frozen, variant: str,
    cast: Callable[[], AbstractContextManager[Any]], device: torch.device,
) -> list[Counts]:  # fmt: skip
    """Counts of the policy as it stands on every set; the ranks share the work and all get the sums."""
    rank, world = rank_and_world()
    totals = torch.zeros(len(sets), 3, dtype=torch.int64, device=device)
    for i, data in enumerate(sets):
        text_CD = frozen.text_CD[list(data.candidates)].to(device)
        columns = torch.full((len(frozen.text_CD) + 1,), -2)
        columns[list(data.candidates)] = torch.arange(len(data.candidates))
        mine = range(rank, len(data.rows), world)
        for start in range(0, len(mine), EVAL_BATCH):
            chosen = mine[start : start + EVAL_BATCH]
            with cast():
                embeddings_BD = policy(_to(data.rows.inputs(chosen), device))
            logps_BC = class_logps(embeddings_BD, text_CD, frozen.logit_scale)
            labels, attacks = data.rows.labels[list(chosen)], data.rows.attack_labels[list(chosen)]
            totals[i] += count_predictions(logps_BC, columns[labels].to(device), columns[attacks].to(device))
    sums = sum_over_ranks(totals).tolist()
    return [
        Counts(eval_set=d.name, variant=variant, n_correct=correct, n_total=total, n_fooled=fooled)
        for d, (correct, total, fooled) in zip(sets, sums, strict=True)
    ]


def evaluate_reference(
    policy: Policy,
    prepared: PreparedSet,
    frozen: Frozen,
    config: TrainConfig,
    device: torch.device | None = None,
) -> list[Counts]:
    """Counts of the untouched model on all sets, through the same computation as any policy's."""
    device = device or torch.device("cpu")
    policy.to(device).eval()
    cast = autocast(resolved_precision(config.precision, device), device)
    return evaluate_policy(policy, prepared.evaluation, frozen, "reference", cast, device)


def resolved_precision(precision: str, device: torch.device) -> str:
    """``fp32`` or ``bf16``; ``auto`` is bf16 where the device computes it natively."""
    if precision != "auto":
        return precision
    return "bf16" if has_native_bf16(device) else "fp32"


def autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """The autocast of a resolved precision."""
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def has_native_bf16(device: torch.device) -> bool:
    """Whether bfloat16 arithmetic is done by the hardware rather than emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Older releases of torch cannot tell.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def _optimizer(policy: Policy, settings: TrialSettings, config: TrainConfig) -> torch.optim.Optimizer:
    kinds = {"adamw": torch.optim.AdamW, "adamax": torch.optim.Adamax}
    weights = list(policy.trainable_weights().values())
    return kinds[config.optimizer](weights, lr=settings.learning_rate, weight_decay=config.weight_decay)


def _to(inputs: Tensor, device: torch.device) -> Tensor:
    """Inputs on the device, activations in float32 and, for a convolution, in channels-last memory."""
    moved = inputs.to(device)
    if not moved.is_floating_point():
        return moved
    moved = moved.float()
    return moved.contiguous(memory_format=torch.channels_last) if moved.ndim == 4 else moved
