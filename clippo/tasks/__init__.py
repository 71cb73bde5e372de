"""What differs between tasks: pairs, evaluation sets, objectives, words."""

from dataclasses import replace

from clippo.config import SweepConfig
from clippo.errors import ConfigError
from clippo.evaluate.objectives import Objectives
from clippo.tasks.base import Task
from clippo.tasks.gender import GenderTask
from clippo.tasks.typographic import TypographicTask

__all__ = ["TASKS", "GenderTask", "Task", "TypographicTask", "objectives_of", "resolved", "task_named"]

TASKS: dict[str, type[Task]] = {"typographic": TypographicTask, "gender": GenderTask}


def task_named(name: str) -> type[Task]:
    """The task called ``name``; a ConfigError that lists the valid names if there is none.

    >>> task_named("typography")
    Traceback (most recent call last):
    clippo.errors.ConfigError: task is 'typography'; it must be one of: typographic, gender
    """
    try:
        return TASKS[name]
    except KeyError:
        raise ConfigError(f"task is {name!r}; it must be one of: {', '.join(TASKS)}") from None


def objectives_of(config: SweepConfig) -> Objectives:
    """The objectives of a sweep: its task's, on the sets that the configuration names."""
    own = task_named(config.task).objectives(config.data)
    goal = replace(own.goal, sets=config.goal_sets or own.goal.sets)
    return replace(own, goal=goal, retention_sets=config.retention_sets or own.retention_sets)


def resolved(config: SweepConfig) -> SweepConfig:
    """The configuration with what it leaves to the task written out."""
    objectives = objectives_of(config)
    search = replace(config.search, objectives=config.search.objectives or objectives.names)
    return replace(
        config, search=search, goal_sets=objectives.goal.sets, retention_sets=objectives.retention_sets
    )
