"""What differs between tasks: pairs, evaluation sets, objectives."""

from clippo.tasks.typographic import TypographicTask

__all__ = ["TASKS", "TypographicTask"]

TASKS = {"typographic": TypographicTask}
