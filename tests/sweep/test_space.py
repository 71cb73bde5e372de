"""What may be drawn together, and with which pairs a baseline is tuned."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from clippo.config import SearchConfig, SweepConfig
from clippo.errors import ConfigError
from clippo.sweep.checks import check_settings
from clippo.sweep.space import baseline
from clippo.tasks import GenderTask, TypographicTask
from sweeps.gender_sweep import gender_sweep
from tests.conftest import ROOT


def with_search(losses: tuple[str, ...], pairs: tuple[str, ...], baselines: tuple[str, ...]) -> SweepConfig:
    sweep = gender_sweep()
    return replace(sweep, search=replace(sweep.search, losses=losses, pairs=pairs, baselines=baselines))


@pytest.mark.parametrize(
    ("losses", "pairs", "baselines"),
    [
        (("dpo", "kto"), ("image", "correct+image"), ()),
        (("dpo", "cross_entropy"), ("correct", "reverse"), ("cross_entropy",)),
        (("dpo",), ("image", "correct"), ("cross_entropy",)),
        (("dpo", "cross_entropy"), (), ("cross_entropy",)),  # the task's first kind, correct
    ],
)
def test_what_can_be_tuned_may_be_searched(
    losses: tuple[str, ...], pairs: tuple[str, ...], baselines: tuple[str, ...]
) -> None:
    check_settings(with_search(losses, pairs, baselines))


@pytest.mark.parametrize(
    ("losses", "pairs", "baselines", "message"),
    [
        (
            ("dpo", "cross_entropy"), ("correct", "image"), (),
            r"^search\.losses has 'cross_entropy', which cannot be tuned on search\.pairs 'image': .* leave "
            r"one of the two out \(pairs of one picture are: correct, reverse\)$",
        ),
        (("cross_entropy",), ("correct+image",), (), r"on search\.pairs 'correct\+image'"),
        (
            ("dpo",), ("counter+image", "image"), ("cross_entropy",),
            r"^search\.baselines has 'cross_entropy', .* none of search\.pairs \(counter\+image, image\): .* "
            r"add other pairs \(pairs of one picture are: correct, reverse\)$",
        ),
        (("dpo",), ("pictures",), (), r"search\.pairs has 'pictures'; it must be of: correct, image"),
    ],
)  # fmt: skip
def test_what_would_fail_in_a_trial_is_refused_before(
    losses: tuple[str, ...], pairs: tuple[str, ...], baselines: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        check_settings(with_search(losses, pairs, baselines))
    assert "\n" not in str(raised.value)


def test_a_baseline_has_the_first_pairs_that_it_can_be_tuned_on() -> None:
    search = SearchConfig(pairs=("image", "reverse", "correct"))
    assert baseline("cross_entropy", search, "transform", GenderTask)["pairs"] == "reverse"
    assert "pairs" not in baseline("cross_entropy", SearchConfig(), "last:2", TypographicTask)


def test_the_command_says_it_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "sweeps/gender_sweep.py", "--results", str(tmp_path / "results")]
    done = subprocess.run(
        [*command, "--baselines", "cross_entropy"],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: search.baselines has 'cross_entropy'")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "results").exists(), "nothing has begun"
