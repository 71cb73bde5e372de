"""The losses by name, and one way to call any of them.

A loss is added by one entry in `LOSSES`: a function of the four log-probability vectors whose keyword
parameters are its settings.

Shapes: B batch.
"""

from collections.abc import Callable
from functools import lru_cache
from inspect import Parameter, signature

from torch import Tensor

from clippo.errors import ConfigError
from clippo.losses.preference import cross_entropy, dpo, ipo, kto

LOSSES: dict[str, Callable[..., Tensor]] = {
    "dpo": dpo,
    "ipo": ipo,
    "kto": kto,
    "cross_entropy": cross_entropy,
}

OF_ONE_PICTURE = ("cross_entropy",)
"""Losses that know only the right caption of a picture, so a pair of two pictures has nothing for them."""


def resolve_loss(name: str) -> Callable[..., Tensor]:
    """The loss called ``name``; a ConfigError that lists the valid names if there is none.

    >>> resolve_loss("ppo")
    Traceback (most recent call last):
    clippo.errors.ConfigError: unknown loss 'ppo'; choose one of: cross_entropy, dpo, ipo, kto
    """
    try:
        return LOSSES[name]
    except KeyError:
        raise ConfigError(f"unknown loss {name!r}; choose one of: {', '.join(sorted(LOSSES))}") from None


@lru_cache
def _setting_names(loss: Callable[..., Tensor]) -> frozenset[str]:
    parameters = signature(loss).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is Parameter.KEYWORD_ONLY)


def has_setting(name: str, setting: str) -> bool:
    """Whether the loss called ``name`` depends on ``setting``.

    >>> has_setting("kto", "kl_baseline"), has_setting("dpo", "kl_baseline")
    (True, False)
    """
    return setting in _setting_names(resolve_loss(name))


def preference_loss(
    name: str,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    kl_baseline: Tensor | float,
    **settings: float,
) -> Tensor:
    """Any loss of `LOSSES`, called in the same way.

    Whoever trains hands in ``beta`` and ``kl_baseline``, and a loss that has no use for them goes without.
    Whatever else is set (``label_smoothing``, ``desirable_weight``, ``undesirable_weight``) was set on
    purpose: a loss that does not know it is an error, never a setting that is silently dropped.

    Takes the name; four (B,) tensors of log-probabilities; ``kl_baseline``, the scalar KL on clean images.

    Returns:
        a scalar.

    Raises:
        ConfigError: for an unknown loss or a setting that the loss does not have or allow.

    >>> import torch
    >>> preference_loss("ipo", *[torch.zeros(3)] * 4, beta=0.5, kl_baseline=0.0).item()
    1.0
    """
    loss = resolve_loss(name)
    known = _setting_names(loss)
    if unknown := settings.keys() - known:
        raise ConfigError(
            f"loss {name!r} has no setting {', '.join(sorted(unknown))}; "
            f"it has: {', '.join(sorted(known)) or 'none'}"
        )
    offered = {"beta": beta, "kl_baseline": kl_baseline}
    return loss(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        **settings,
        **{key: value for key, value in offered.items() if key in known},
    )
