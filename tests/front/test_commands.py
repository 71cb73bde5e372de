"""``clippo front`` and ``clippo report``, as a person runs them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from clippo.results import ResultStore
from tests.conftest import clippo
from tests.front.sweeps import make_sweep


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    make_sweep(30).write(ResultStore(folder))
    return folder


def test_the_bound_on_retention_is_asked_for(results: Path) -> None:
    by_bound = {}
    for bound in ("0.95", "0.99"):
        printed = clippo("front", str(results), "--min-retention", bound, "--json")
        assert printed.returncode == 0, printed.stderr
        by_bound[bound] = json.loads(printed.stdout)
        assert by_bound[bound]["min_retention"] == float(bound)
    assert by_bound["0.95"]["recommended"]["robustness"] > by_bound["0.99"]["recommended"]["robustness"]
    assert by_bound["0.95"]["points"][0]["robustness"] == by_bound["0.99"]["points"][0]["robustness"]


def test_the_table_and_the_picture(results: Path, tmp_path: Path) -> None:
    done = clippo("front", str(results), "--all", "--plot", str(tmp_path / "front.svg"))
    assert done.returncode == 0, done.stderr
    assert "Pareto front of made" in done.stdout
    assert "not shown" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "recommended" in (tmp_path / "front.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("flag", ["--json", "--all"])
def test_a_reader_that_has_enough_hears_no_complaint(results: Path, flag: str) -> None:
    """As ``clippo front STORE --json | head -1``, whose head leaves before the rest is written."""
    command = [sys.executable, "-m", "clippo", "front", str(results), flag]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as front:
        assert front.stdout is not None
        front.stdout.close()
        _, complaints = front.communicate(timeout=100)
    assert (front.returncode, complaints) == (141, b"")


def test_a_report_is_written(results: Path, tmp_path: Path) -> None:
    done = clippo("report", str(results), "--out", str(tmp_path / "made.html"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote {tmp_path / 'made.html'}\n"
    page = (tmp_path / "made.html").read_text(encoding="utf-8")
    assert f"clippo export {results} --sweep made" in page, "the store as it was called"


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("front", "--min-retention", "1.5"), "min_retention is 1.5; it must be above 0 and at most 1"),
        (("front", "--sweep", "other"), "has no sweep 'other'; its sweeps are: made"),
        (("report", "--out", "made.pdf"), "end it in .html"),
    ],
)
def test_what_can_be_mended_is_one_line(results: Path, flags: tuple[str, ...], complaint: str) -> None:
    done = clippo(flags[0], str(results), *flags[1:])
    assert done.returncode == 2
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
