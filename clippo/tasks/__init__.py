"""What differs between tasks: pairs, evaluation sets, objectives."""

from clippo.tasks.typographic import EvaluationSet, TypographicTask

__all__ = ["TASKS", "EvaluationSet", "TypographicTask"]

TASKS = {"typographic": TypographicTask}
