"""How a task's numbers are called where people read them: in tables, charts, the report and the model card.

They are kept with a sweep, since whoever reads its rows knows no tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from clippo.evaluate.objectives import Objectives


@dataclass(frozen=True, kw_only=True)
class Words:
    """What a reader sees.

    Attributes:
        task: in the report's title.
        goal: the goal in running text.
        axis: the goal with what it is, in a chart.
        heading, short: the goal over a column of 6 characters (lines broken), and behind "test".
        best: of a point with the best goal: "most robust".
        explained: the goal, in a sentence of its own.
        unseen: what of the test pictures neither tuning nor search saw.
        numbers: names of other numbers on test pictures.
        tiles: those of them that the report shows first.
        columns: those of them that have a column in the printed front, with its heading and what that means.
        gallery: what the report says over its pictures.
        tuned: what the model card says was done, and ``meaning`` what the goal is, in a bracket.
        card: what the card must say besides.
    """

    task: str
    goal: str
    axis: str
    heading: str
    short: str
    best: str = "best"
    explained: str = ""
    unseen: str = "pictures"
    numbers: Mapping[str, str] = field(default_factory=dict)
    tiles: tuple[str, ...] = ()
    columns: tuple[tuple[str, str, str], ...] = ()
    gallery: str = ""
    tuned: str = "tuned"
    meaning: str = ""
    card: str = ""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Words:
        """Those of a sweep's stored configuration; an older one has none, and gets plain ones."""
        kept = config.get("words")
        if kept is not None:
            known = {f.name for f in fields(cls)}
            lists = {"tiles": tuple(kept["tiles"]), "columns": tuple(map(tuple, kept["columns"]))}
            return cls(**{n: v for n, v in kept.items() if n in known} | lists)
        name = Objectives.of(config).goal.name.replace("_", " ")
        return cls(task=config.get("task", ""), goal=name, axis=name, heading=name[:6], short=f"{name[:3]}.")

    def to_json(self) -> dict[str, Any]:
        """What `of` reads."""
        return asdict(self)
