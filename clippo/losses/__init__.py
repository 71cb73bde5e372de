"""Preference losses and the regulariser: pure functions of log-probabilities."""

from clippo.losses.preference import cross_entropy, dpo, ipo, kto
from clippo.losses.registry import LOSSES, OF_ONE_PICTURE, has_setting, preference_loss, resolve_loss
from clippo.losses.regularizer import kl_reference_to_policy

__all__ = [
    "LOSSES",
    "OF_ONE_PICTURE",
    "cross_entropy",
    "dpo",
    "has_setting",
    "ipo",
    "kl_reference_to_policy",
    "kto",
    "preference_loss",
    "resolve_loss",
]
