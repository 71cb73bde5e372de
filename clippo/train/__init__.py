"""The fine-tuning of one trial. Only ``ray_train`` knows of Ray."""

from clippo.train.checkpoint import Checkpoints, FileCheckpoints
from clippo.train.loop import fit
from clippo.train.measure import evaluate_policy, evaluate_reference
from clippo.train.step import TrialSettings

__all__ = ["Checkpoints", "FileCheckpoints", "TrialSettings", "evaluate_policy", "evaluate_reference", "fit"]
