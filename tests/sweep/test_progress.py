"""What a person sees while a sweep runs: in a log, and on a terminal."""

import io
import math
import re

from rich.console import Console

from clippo.evaluate import Goal, Objectives
from clippo.sweep.progress import ProgressView
from tests.front.sweeps import OBJECTIVES


def at(robustness: float, retention: float) -> dict[str, float]:
    return {"robustness": robustness, "retention": retention}


def test_a_log_gets_one_line_a_trial_with_all_that_matters() -> None:
    log = io.StringIO()
    with ProgressView(Console(file=log, width=300), 3, OBJECTIVES, at(0.3, 1.0)) as view:
        view.resumed([at(0.5, 0.97)], failed=0)
        view.started()
        view.started()
        view.finished("00001", "dpo", at(0.7, 0.96))
        view.finished("00002", "kto", None, "the loss became nan")
    first, second = log.getvalue().splitlines()
    assert first.startswith("   2/3  00001  dpo  robustness 0.700  retention 0.960")
    # 0.3 x 1 for the untouched model, and (0.5 - 0.3) x 0.97 and (0.7 - 0.5) x 0.96 above it
    assert "running 1  best@0.95 0.700  best@0.99 0.300  hypervolume 0.6860" in first
    assert "left" in first
    assert "failed: the loss became nan" in second
    assert "running 0  best@0.95 0.700" in second


def test_a_terminal_gets_a_live_view() -> None:
    screen = io.StringIO()
    with ProgressView(
        Console(file=screen, width=100, force_terminal=True), 3, OBJECTIVES, at(0.3, 1.0)
    ) as view:
        view.started()
        view.finished("00000", "ipo", at(0.6, 0.995))
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "1 done, 0 running, 0 failed" in shown
    assert "best robustness at retention >= 0.99" in shown
    assert "best@" not in shown


def test_of_a_minimised_goal_less_is_best() -> None:
    log = io.StringIO()
    own = Objectives(goal=Goal(name="mean_skew", measure="max_skew", sets=()), retention_sets=())
    untouched = {"mean_skew": 0.4, "retention": 1.0}
    with ProgressView(Console(file=log, width=300), 2, own, untouched) as view:
        view.started()
        view.finished("00000", "dpo", {"mean_skew": 0.2, "retention": 0.99})
    line = log.getvalue()
    assert "00000  dpo  mean skew 0.200  retention 0.990" in line
    volume = math.exp(-0.4) + 0.99 * (math.exp(-0.2) - math.exp(-0.4))
    assert f"best@0.95 0.200  best@0.99 0.200  hypervolume {volume:.4f}" in line
