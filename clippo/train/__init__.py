"""The fine-tuning of one trial. Only ``ray_train`` knows of Ray."""

from clippo.train.checkpoint import Checkpoints, FileCheckpoints
from clippo.train.loop import TrialSettings, evaluate_policy, evaluate_reference, fit

__all__ = ["Checkpoints", "FileCheckpoints", "TrialSettings", "evaluate_policy", "evaluate_reference", "fit"]
