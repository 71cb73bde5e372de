"""Models: open_clip in, policy and reference out."""

from clippo.model.averaging import BetaAverage, Weights, interpolate
from clippo.model.towers import ClipModel, Policy, TowerPolicy, load_clip
from clippo.model.transform import TransformPolicy


def policy_of(clip: ClipModel, trainable: str) -> Policy:
    """The policy of a model with ``image``, ``last:K`` or ``transform`` trained; it starts as the reference.

    Raises:
        ConfigError: no such cut; the message says which there are.
    """
    return TransformPolicy(clip) if trainable == "transform" else TowerPolicy(clip, trainable)


__all__ = [
    "BetaAverage", "ClipModel", "Policy", "TowerPolicy", "TransformPolicy", "Weights", "interpolate",
    "load_clip", "policy_of",
]  # fmt: skip
