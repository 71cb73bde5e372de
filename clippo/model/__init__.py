"""Models: open_clip in, policy and reference out."""

from clippo.model.averaging import BetaAverage, interpolate
from clippo.model.towers import ClipModel, Policy, load_clip

__all__ = ["BetaAverage", "ClipModel", "Policy", "interpolate", "load_clip"]
