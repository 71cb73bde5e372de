"""One step: from a batch of pairs to the loss, and from there to new weights.

B pairs of the batch, C captions that tuning tells apart, D embedding
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from clippo.config import TrainConfig
from clippo.evaluate.counts import rank_and_world, sum_over_ranks
from clippo.losses import has_setting, kl_reference_to_policy, preference_loss
from clippo.model import Policy


@dataclass(frozen=True, kw_only=True)
class TrialSettings:
    """What the search chooses for one trial.

    Attributes:
        beta: preference temperature; None for a loss that has none.
        orthogonality: weight of the penalty on a trained transform; None for a tower.
        pairs: kind of the task's preference pairs; '': its first.
        stopped_after: the epoch after which training ends; its schedules are those of ``epochs``. None: it
            goes on to the last one.
    """

    loss: str
    beta: float | None
    kl_weight: float
    learning_rate: float
    epochs: int
    seed: int
    orthogonality: float | None = None
    pairs: str = ""
    stopped_after: int | None = None


@dataclass(frozen=True)
class Frozen:
    """What every step uses and no step changes: text features of all classes (C, D), and the logit scale."""

    text_CD: Tensor
    logit_scale: float


class Layout(NamedTuple):
    """Which block of a batch's pictures is on the clean side, and which in the two cells of the pairs."""

    clean: int
    chosen: int
    rejected: int

    @property
    def blocks(self) -> int:
        """How many there are."""
        return max(self) + 1


@dataclass(frozen=True)
class Batch:
    """Pairs as the policy takes them: cells of the table of pictures by captions.

    Attributes:
        inputs: blocks of B pictures each, one after the other: (blocks B, ...).
        chosen, rejected: columns of the captions, int64 (B,).
        across: which pairs compare two pictures, bool (B,); None: none does.
        near: columns of the captions that the KL term is over, int64; None: all.
        reference_clean_logps: the reference's log-probabilities of these on the clean pictures, float32
            (B, C).
        reference_chosen_logps, reference_rejected_logps: its own in the two cells, float32 (B,).
        share: this rank's share of the pairs of the global batch, in (0, 1].
    """

    inputs: Tensor
    layout: Layout
    chosen: Tensor
    rejected: Tensor
    across: Tensor | None
    near: Tensor | None
    reference_clean_logps: Tensor
    reference_chosen_logps: Tensor
    reference_rejected_logps: Tensor
    share: float

    def split(self, size: int) -> list[Batch]:
        """The same pairs in parts of at most ``size``; their shares add up to this one's.

        >>> some = torch.arange(3)
        >>> whole = Batch(torch.arange(6), Layout(0, 1, 1), some, some, None, None, some, some, some, 1.0)
        >>> parts = whole.split(2)
        >>> [(p.inputs.tolist(), round(p.share, 3)) for p in parts]
        [([0, 1, 3, 4], 0.667), ([2, 5], 0.333)]
        """
        if not size or size >= len(self.chosen):
            return [self]
        blocks = self.inputs.chunk(self.layout.blocks)
        parts = []
        for start in range(0, len(self.chosen), size):
            some = slice(start, start + size)
            chosen = self.chosen[some]
            parts.append(
                Batch(
                    inputs=torch.cat([block[some] for block in blocks]),
                    layout=self.layout,
                    chosen=chosen,
                    rejected=self.rejected[some],
                    across=None if self.across is None else self.across[some],
                    near=self.near,
                    reference_clean_logps=self.reference_clean_logps[some],
                    reference_chosen_logps=self.reference_chosen_logps[some],
                    reference_rejected_logps=self.reference_rejected_logps[some],
                    share=self.share * len(chosen) / len(self.chosen),
                )
            )
        return parts


@dataclass(frozen=True)
class StepLoss:
    """The three numbers of a step, over this rank's pairs; ``total`` is what is minimised."""

    total: Tensor
    preference: Tensor
    kl: Tensor


def class_logps(embeddings_BD: Tensor, text_CD: Tensor, logit_scale: float) -> Tensor:
    """log pi(y | image) = log_softmax_y(s cos(image, text_y)), float32 (B, C)."""
    return F.log_softmax(logit_scale * embeddings_BD @ text_CD.T, dim=-1)


def pick(logps_BC: Tensor, columns_B: Tensor) -> Tensor:
    """One log-probability of each row: (B,)."""
    return logps_BC.gather(1, columns_B[:, None])[:, 0]


def among(logps_BC: Tensor, columns: Tensor | None) -> Tensor:
    """The log-probabilities where only some of the classes can be chosen; None: all of them can."""
    return logps_BC if columns is None else logps_BC[:, columns].log_softmax(-1)


def preference_step(
    image_BD: Tensor, text_CD: Tensor, batch: Batch, logit_scale: float, *,
    loss: str, beta: float, kl_weight: float, kl_baseline: Tensor | None = None, **loss_settings: float,
) -> StepLoss:  # fmt: skip
    """preference loss in the cells of the pairs + kl_weight * KL(reference || policy) on the clean pictures.

    Afzali et al., arXiv 2411.08923, equation 8.

    Args:
        image_BD: the policy's embeddings of ``batch.inputs``, unit length, float32 (blocks B, D). Call this
            outside of autocast: a margin is a small difference of large numbers, bfloat16 has three digits.
        text_CD: its embeddings of the prompts, unit length, float32.
        kl_baseline: KTO's, the detached KL of the whole global batch, where ``batch`` is only a part of this
            rank's; None: that of this batch, averaged over the ranks, if the loss has a use for it.
    """
    layout = batch.layout
    logits_BC = logit_scale * image_BD @ text_CD.T
    blocks = F.log_softmax(logits_BC, dim=-1).chunk(layout.blocks)
    clean = among(blocks[layout.clean], batch.near)
    kl = kl_reference_to_policy(clean, batch.reference_clean_logps)
    chosen = pick(blocks[layout.chosen], batch.chosen)
    rejected = pick(blocks[layout.rejected], batch.rejected)
    if batch.across is not None:
        raw = logits_BC.chunk(layout.blocks)
        chosen = torch.where(batch.across, pick(raw[layout.chosen], batch.chosen), chosen)
        rejected = torch.where(batch.across, pick(raw[layout.rejected], batch.rejected), rejected)
    if kl_baseline is None and has_setting(loss, "kl_baseline"):
        kl_baseline = sum_over_ranks(kl.detach() * batch.share)
    preference = preference_loss(
        loss,
        chosen,
        rejected,
        batch.reference_chosen_logps,
        batch.reference_rejected_logps,
        beta=beta,
        kl_baseline=0.0 if kl_baseline is None else kl_baseline,
        **loss_settings,
    )
    return StepLoss(preference + kl_weight * kl, preference.detach(), kl.detach())


class Step:
    """One optimizer step over a global batch: forward, loss, backward in micro-batches, update.

    Args:
        captions: the classes that tuning tells apart.
    """

    def __init__(
        self, policy: Policy, frozen: Frozen, settings: TrialSettings, config: TrainConfig,
        captions: Sequence[int], device: torch.device,
    ) -> None:  # fmt: skip
        self._policy, self._settings, self._config = policy, settings, config
        self._world = rank_and_world()[1]
        self.precision = resolved_precision(config.precision, device)
        self.cast = autocast(self.precision, device)
        self._forward: nn.Module = policy
        self._synchronizing: DistributedDataParallel | None = None
        if self._world > 1:
            ids = [device] if device.type == "cuda" else None
            self._forward = self._synchronizing = DistributedDataParallel(policy, device_ids=ids)
        if config.compile:
            self._forward = torch.compile(self._forward)  # type: ignore[assignment]  # it stays a module
        self._optimizer = _optimizer(policy, settings, config)
        # float16 has few exponents: the loss is scaled up, and the gradients down again.
        self._scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=self.precision == "fp16")
        self._text_CD, self._logit_scale = frozen.text_CD[list(captions)].to(device), frozen.logit_scale
        self._loss_settings = {"label_smoothing": config.label_smoothing} if settings.loss == "dpo" else {}

    def __call__(self, batch: Batch, learning_rate: float) -> Sequence[Tensor]:
        """Makes one step with this rank's part of a batch.

        Returns:
            loss, preference loss and KL of the whole global batch, scalars, the same on all ranks.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.zero_grad(set_to_none=True)
        parts, chosen = batch.split(self._config.micro_batch), self._settings
        wants_baseline = self._config.micro_batch and has_setting(chosen.loss, "kl_baseline")
        baseline = self._kl_baseline(parts) if wants_baseline else None
        values: list[Sequence[Tensor]] = []
        for number, part in enumerate(parts, start=1):
            with self._synchronized(last=number == len(parts)):
                with self.cast():
                    image_BD, text_CD = self._forward(part.inputs, self._text_CD)
                loss = preference_step(
                    image_BD, text_CD, part, self._logit_scale, loss=chosen.loss, beta=chosen.beta or 1.0,
                    kl_weight=chosen.kl_weight, kl_baseline=baseline, **self._loss_settings,
                )  # fmt: skip
                total = loss.total
                if chosen.orthogonality:
                    total = total + chosen.orthogonality * self._policy.penalty()
                # DDP averages over ranks; the factor makes that the mean over the global batch.
                self._scaler.scale(_times(total, part.share * self._world)).backward()
            values.append([_times(v, part.share) for v in (total.detach(), loss.preference, loss.kl)])
        self._scaler.step(self._optimizer)
        self._scaler.update()
        # One tensor only where it is needed: on a CPU it takes longer to make than three are read.
        sums = values[0] if len(values) == 1 else [torch.stack(v).sum() for v in zip(*values, strict=True)]
        if self._world > 1:  # all ranks get the same, so that they stop at the same step
            sums = sum_over_ranks(torch.stack(list(sums))).unbind()
        return sums

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state["optimizer"])
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])

    @torch.no_grad()
    def _kl_baseline(self, parts: list[Batch]) -> Tensor:
        """KTO's KL of the whole batch, which no part of it knows: one more forward pass of clean pictures."""
        kl = torch.zeros((), device=self._text_CD.device)
        for part in parts:
            with self.cast():
                clean = part.inputs.chunk(part.layout.blocks)[part.layout.clean]
                image_BD, text_CD = self._policy(clean, self._text_CD)
            clean_BC = among(class_logps(image_BD, text_CD, self._logit_scale), part.near)
            kl += kl_reference_to_policy(clean_BC, part.reference_clean_logps) * part.share
        return sum_over_ranks(kl)

    def _synchronized(self, *, last: bool) -> AbstractContextManager[Any]:
        """The ranks exchange gradients once a step, with the last micro-batch."""
        if last or self._synchronizing is None:
            return nullcontext()
        context: AbstractContextManager[Any] = self._synchronizing.no_sync()
        return context


def _times(value: Tensor, factor: float) -> Tensor:
    """The product; one with 1, forward and back, takes 1 % of a step of a trained transform."""
    return value if factor == 1 else value * factor


def resolved_precision(precision: str, device: torch.device) -> str:
    """``fp32``, ``bf16`` or ``fp16``; ``auto`` is bf16 where the device computes it natively."""
    if precision != "auto":
        return precision
    return "bf16" if has_native_bf16(device) else "fp32"


def autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """The autocast of a resolved precision."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    if device.type == "cpu" and precision == "bf16":
        return _bf16_on_cpu
    return lambda: torch.autocast(device.type, dtype, enabled=precision != "fp32")


@contextmanager
def _bf16_on_cpu() -> Iterator[None]:
    # There flash attention takes twice the time of plain matrix products.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


def has_native_bf16(device: torch.device) -> bool:
    """Whether bfloat16 arithmetic is done by the hardware rather than emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Older releases of torch cannot tell.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def _optimizer(policy: Policy, settings: TrialSettings, config: TrainConfig) -> torch.optim.Optimizer:
    weights, decay = list(policy.trainable_weights().values()), config.weight_decay
    if config.optimizer == "adamax":
        return torch.optim.Adamax(weights, lr=settings.learning_rate, weight_decay=decay)
    return torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=decay, fused=True)
