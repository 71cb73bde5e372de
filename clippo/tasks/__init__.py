"""What differs between tasks: pairs, evaluation sets, objectives, words."""

from clippo.errors import ConfigError
from clippo.tasks.base import Task
from clippo.tasks.typographic import TypographicTask

__all__ = ["TASKS", "Task", "TypographicTask", "task_named"]

TASKS: dict[str, type[Task]] = {"typographic": TypographicTask}


def task_named(name: str) -> type[Task]:
    """The task called ``name``; a ConfigError that lists the valid names if there is none.

    >>> task_named("typography")
    Traceback (most recent call last):
    clippo.errors.ConfigError: task is 'typography'; it must be one of: typographic
    """
    try:
        return TASKS[name]
    except KeyError:
        raise ConfigError(f"task is {name!r}; it must be one of: {', '.join(TASKS)}") from None
