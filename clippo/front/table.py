"""The front as text: what to choose, and what speaks for it, on 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from clippo.front.counts import REFERENCE
from clippo.front.front import CHANCE, Bounds, Front, Point, describe, well_spread
from clippo.front.nearest import NEAREST

ROWS = 12
SURE = f"{100 * CHANCE:.0f} %"


def print_front(front: Front, console: Console, *, everything: bool = False) -> None:
    """The front as a table, what is recommended and why, and what the other methods offer.

    Args:
        everything: print all of the front and not some well-spread points.
    """
    wanted = [p for p in front.points if p.on_front or p is front.reference]
    shown = wanted if everything else well_spread(front, ROWS)
    own = [heading for _, heading, _ in front.words.columns]
    titles = ("", "trial\nweights", "setting", *_headings(front, "p\n="), *own, "cost")
    table = _table(f"Pareto front of {front.sweep}", titles, left=3)
    for point in shown:
        table.add_row(*_cells(point, front))
    console.print(table)
    stopped = f"{front.stopped} stopped early, " if front.stopped else ""
    hidden = f", {len(wanted) - len(shown)} of them not shown (--all)" if len(shown) < len(wanted) else ""
    lines = [
        f"{len(front.front)} of {len(front.points)} points are on the front{hidden}; {front.completed} "
        f"trials completed, {stopped}{front.failed} failed.",
        *([left_out_of(front)] if front.left_out else []),
        "",
        f"Recommended (R): {recommendation(front)}",
        f"Knee (K): {knee(front)}",
        "",
    ]
    console.print("\n".join(lines), highlight=False)
    if confirmed := _confirmed(front, shown):
        console.print(_confirmation(confirmed, front))
        console.print()
    if front.searched:
        console.print(_searched(front))
        console.print()
    console.print(_comparison(front))
    console.print("\n".join([_gain(front), _seeds(front), "", _notes(front)]), highlight=False)


def _notes(front: Front) -> str:
    """What the tables need to be understood."""
    words = front.words
    own = "".join(
        f"{heading.replace('-', '').replace(chr(10), '')}: {meaning}; "
        for _, heading, meaning in words.columns
    )
    return (
        "Below a number: its 90 % interval. p: probability of being on the front; =: points of one number "
        "cannot be told apart; <: keeps less than --min-retention. "
        f"{_capital(words.goal)} and retention are of validation pictures, which steered the search; test: "
        f"{words.unseen} that neither tuning nor search saw; fresh: the same of a model trained once more "
        f"with another seed, since the best of a search is too good. {own}cost: device time of the trial."
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _headings(front: Front, *between: str) -> tuple[str, ...]:
    """Over goal and retention, and over those of test pictures."""
    words = front.words
    return (words.heading, "reten-\ntion", *between, f"test\n{words.short}", "test\nret.")


def left_out_of(front: Front) -> str:
    """What is not shown of a very large sweep."""
    return (
        f"{front.left_out:,} completed trials are only counted: of so large a sweep the {NEAREST:,} closest "
        "to the front are looked at, and as many baselines."
    )


def recommendation(front: Front) -> str:
    """What to ship and why, in two sentences or less."""
    point = front.recommended
    keep = f"{front.min_retention:g} of what the model could do"
    if point.trial_id == REFERENCE:
        return (
            f"the untouched model. No tuned one keeps {keep} with a chance of {SURE} "
            "or more; see what less retention buys with --min-retention."
        )
    counted = f"{len(front.alike)} other point{'s' * (len(front.alike) > 1)} cannot"
    others = counted if front.alike else "all other points can"
    low, goal = front.min_retention, front.words.goal
    below = "" if round(point.test.get("retention", 1), 3) >= low else f", which is below {low:g}"
    return (
        f"trial {point.trial_id}, weights {point.variant}, the {front.words.best} point that keeps "
        f"{keep} with a chance of {SURE} or more (here {100 * (point.chance or 0):.0f} %, on pictures like "
        "those of validation, and leaving out that it was picked among many). On test pictures, which chose "
        f"nothing, its {goal} is {_tested(point, front.goal.name)} and its retention "
        f"{_tested(point, 'retention')}{below}; {others} be told from it."
    )


def _table(title: str | None, titles: Iterable[str], left: int) -> Table:
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False, pad_edge=False,
    )  # fmt: skip
    for i, name in enumerate(titles):
        table.add_column(name, justify="left" if i < left else "right", no_wrap=True)
    return table


def _cells(point: Point, front: Front) -> list[str]:
    marks = [m for m, p in (("R", front.recommended), ("K", front.knee)) if point is p]
    marks.append(_mark(point))
    untouched = point.trial_id == REFERENCE
    names = (*front.objectives.names, *(name for name, _, _ in front.words.columns))
    return [
        "\n".join(filter(None, marks)),
        "untouched" if untouched else f"{point.trial_id}\n{point.variant}",
        "" if untouched else _setting(point.settings),
        f"{_share(point.goal)}\n{shown_interval(point.goal_interval)}",
        f"{_share(point.retention)}\n{shown_interval(point.retention_interval)}",
        f"{_brief(point.probability)}\n{point.group or ''}",
        *(_share(point.test[n]) if n in point.test else "" for n in names),
        "" if untouched else _duration(point.device_s),
    ]


def _setting(settings: Mapping[str, Any]) -> str:
    """A setting in lines of at most 16 characters.

    >>> print(_setting({"loss": "ipo", "beta": 0.1, "kl_weight": 1.0, "learning_rate": 2e-4, "epochs": 8}))
    ipo beta 0.1 x8
    kl 1 lr 2e-4
    """
    lines = describe(settings).replace(" kl", "\nkl")
    pairs = settings.get("pairs")
    return lines.removesuffix(f" {pairs}") + f"\n{pairs}" if pairs else lines


def _mark(point: Point) -> str:
    return "" if point.feasible else "<"


def knee(front: Front) -> str:
    """Where the front bends, and what a better goal costs from there on."""
    if front.knee is None:
        return "the front has too few points for one."
    rest: Sequence[Point] = front.front[front.front.index(front.knee) + 1 :]
    at = f"trial {front.knee.trial_id}, weights {front.knee.variant}"
    if front.knee.trial_id == REFERENCE:
        at = "the untouched model"
    if not rest:
        return f"{at}."
    end, better = rest[-1], "of" if front.goal.is_maximised else "less"
    gained, lost = abs(end.goal - front.knee.goal), front.knee.retention - end.retention
    return (
        f"{at}; from there to the end of the front, {gained:.3f} {better} {front.words.goal} costs "
        f"{lost:.3f} of retention."
    )


def _comparison(front: Front) -> Table:
    titles = (
        f"the {front.words.best} that\nkeeps {front.min_retention:g}", "trial\nweights",
        *_headings(front), "hyper-\nvolume",
    )  # fmt: skip
    table = _table(None, titles, left=2)
    for c in front.comparisons:
        cells = _cells(c.best, front)
        tuned, own = c.best.trial_id != REFERENCE, c is front.comparisons[0]
        table.add_row(
            c.method,
            cells[1] if tuned else "" if own else "none",
            *([cells[i] for i in (3, 4, 6, 7)] if tuned or own else [""] * 4),
            f"{_share(c.hypervolume)}\n{shown_interval(c.hypervolume_interval)}",
        )
    return table


def _confirmed(front: Front, shown: Sequence[Point]) -> list[Point]:
    """The confirmed points that the front's table shows; of a trial that it shows none of, the first."""
    confirmed = [p for p in front.front if p.confirmed]
    there = {p.trial_id for p in confirmed if p in shown}
    firsts = [p for i, p in {p.trial_id: p for p in reversed(confirmed)}.items() if i not in there]
    return [p for p in confirmed if p in shown or p in firsts]


def _confirmation(confirmed: Sequence[Point], front: Front) -> Table:
    """What the search says of some points, and what a model trained once more says."""
    titles = (
        "confirmed with\na fresh seed", "weights", *_headings(front), f"fresh\n{front.words.short}",
        "fresh\nret.",
    )  # fmt: skip
    table = _table(None, titles, left=2)
    for point in confirmed:
        again = [
            f"{_share(point.confirmed[n])}\n{shown_interval(point.confirmed_intervals[n])}"
            for n in front.objectives.names
        ]
        cells = _cells(point, front)
        table.add_row(point.trial_id, point.variant, *(cells[i] for i in (3, 4, 6, 7)), *again)
    return table


def _searched(front: Front) -> Table:
    """What no other trial beats in the objectives of the search."""
    table = _table("front of the search's own objectives", ("", "trial", *front.searched[0][1]), left=2)
    for point, values in front.searched:
        name = "untouched" if point.trial_id == REFERENCE else point.trial_id
        table.add_row(_mark(point), name, *(f"{value:.3g}" for value in values.values()))
    return table


def _gain(front: Front) -> str:
    spent = f"{front.device_s / 3600:.3g} device-hours"
    per_hour = front.gained_per_device_hour
    rate = "" if per_hour is None else f" ({per_hour:.3g} above the untouched model's for each)"
    return (
        f"All together: hypervolume {front.hypervolume:.3f} ({shown_interval(front.hypervolume_interval)}) "
        f"in {spent}{rate}. Preference optimisation adds {front.gain:.3f} "
        f"({shown_interval(front.gain_interval)}) to what the other methods reach."
    )


def _seeds(front: Front) -> str:
    if not front.repeated:
        return "No setting was repeated, so what another seed would give is not in the intervals."
    settings = "1 setting was" if front.repeated == 1 else f"{front.repeated} settings were"
    return (
        f"{settings} repeated; another seed moves {front.words.goal} by {front.seed_sd[0]:.3f} and retention "
        f"by {front.seed_sd[1]:.3f} (standard deviations), which the intervals hold."
    )


def _tested(point: Point, name: str) -> str:
    if name not in point.test:
        return "not measured"
    return f"{point.test[name]:.3f} ({shown_interval(point.test_intervals[name])})"


def shown_interval(interval: Bounds) -> str:
    return "-".join(_brief(bound) for bound in interval)


def _brief(share: float) -> str:
    """``.93`` or ``1``: there is little room in 80 columns.

    >>> _brief(0.934), _brief(0.996), _brief(0.0)
    ('.93', '1', '0')
    """
    return {"1.00": "1", "0.00": "0"}.get(text := f"{share:.2f}", text.removeprefix("0"))


def _share(share: float) -> str:
    return "1" if share == 1 else f"{share:.3f}".removeprefix("0")


def _duration(seconds: float) -> str:
    """Three or four characters.

    >>> [_duration(s) for s in (4.2, 59, 61, 3599, 7300, 400_000)]
    ['4s', '59s', '1m', '60m', '2.0h', '111h']
    """
    if seconds < 60:
        return f"{seconds:.0f}s"
    if seconds < 3600:
        return f"{seconds / 60:.0f}m"
    return f"{seconds / 3600:.1f}h" if seconds < 360_000 else f"{seconds / 3600:.0f}h"
