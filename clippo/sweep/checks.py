"""Refuses a sweep's names that nothing has, before anything is begun."""

from __future__ import annotations

from clippo.config import DataConfig, SweepConfig
from clippo.errors import ConfigError
from clippo.losses import resolve_loss
from clippo.sweep.mirror import check_mirror
from clippo.sweep.space import baseline, check_pairs
from clippo.sweep.tracking import check_tracking
from clippo.tasks import task_named


def check_settings(config: SweepConfig) -> None:
    """Refuses names that nothing has; what a single field may be, the configuration itself checks.

    Raises:
        ConfigError: an unknown task, loss, baseline or kind of pairs, a setting that the task does not use, a
            loss or baseline that cannot be tuned on the pairs, a mirror that is none or has a password, or a
            tracker that is not installed.
    """
    task = task_named(config.task)
    check_unused(config)
    if config.data.folds and config.model.trainable != "transform":
        raise ConfigError(
            f"data.folds is {config.data.folds} with model.trainable {config.model.trainable!r}; only a "
            "transform is cross-validated, set it to 0"
        )
    for loss in config.search.losses:
        resolve_loss(loss)
    check_pairs(config.search, task)
    for name in config.search.baselines:
        baseline(name, config.search, config.model.trainable, task)
    check_mirror(config.search.mirror)
    check_tracking(config)


def check_unused(config: SweepConfig) -> None:
    """Refuses settings of the pictures that mean nothing to the task.

    Raises:
        ConfigError: an unknown task, or such a setting.
    """
    for name in task_named(config.task).unused:
        if (value := getattr(config.data, name)) != getattr(DataConfig(), name):
            raise ConfigError(f"data.{name} is {value!r}; the task {config.task} has no use for it")
