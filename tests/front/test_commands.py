"""``clippo front`` and ``clippo report``, as a person runs them."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clippo.results import ENDED, RUNNING, ResultStore
from tests.conftest import clippo
from tests.front.sweeps import Sweep, make_sweep


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
        (("compact", "--sweep", "other"), "has no sweep 'other'; its sweeps are: made"),
        (("front", "--follow", "--every", "0"), "every is 0; it must be above 0"),
        (("report", "--out", "made.pdf"), "end it in .html"),
    ],
)
def test_what_can_be_mended_is_one_line(results: Path, flags: tuple[str, ...], complaint: str) -> None:
    done = clippo(flags[0], str(results), *flags[1:])
    assert done.returncode == 2
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@contextlib.contextmanager
def follower(store: str, *flags: str, stdout: int = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
    """``clippo front STORE --follow`` in a process of its own, dead afterwards."""
    command = [sys.executable, "-m", "clippo", "front", store, "--follow", "--every", "0.1", *flags]
    with subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def write(store: ResultStore, made: Sweep, *trial_ids: str) -> None:
    """Some trials of a sweep."""
    trials = [row for row in made.trials if row["trial_id"] in trial_ids]
    Sweep(trials, made.evals).write_rows(store)


def test_a_sweep_is_followed_until_it_ends(store_uri: str) -> None:
    store, made = ResultStore(store_uri), make_sweep(3)
    made.write_config(store)
    store.write_state("made", RUNNING, trials=4)
    write(store, made, "reference", "cross_entropy")
    with follower(store_uri, "--json") as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["completed"] == 1
        write(store, made, "00000")
        assert json.loads(process.stdout.readline())["completed"] == 2
        write(store, made, "00001", "00002")
        store.write_state("made", ENDED, trials=4)
        rest, said = process.communicate(timeout=60)
    # Perhaps it looked between the last two trials, but never twice at the same ones.
    fronts = [json.loads(line) for line in rest.splitlines()]
    assert [f["completed"] for f in fronts] in ([4], [3, 4])
    assert fronts[-1] == json.loads(clippo("front", store_uri, "--json").stdout)
    assert process.returncode == 0
    assert said.startswith("sweep made: ended at ")
    again = clippo("front", store_uri, "--follow", "--json")
    assert json.loads(again.stdout) == fronts[-1], "an ended sweep is shown once"


def test_rows_of_a_sweep_whose_settings_are_lost_can_be_sealed(tmp_path: Path) -> None:
    make_sweep(3).write(ResultStore(tmp_path))
    (tmp_path / "sweeps" / "made.json").unlink()
    done = clippo("front", str(tmp_path), "--sweep", "made")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "has rows of 'made', but not what it was started with" in done.stderr
    sealed = clippo("compact", str(tmp_path), "--sweep", "made")
    assert sealed.returncode == 0, sealed.stderr


def test_what_is_no_sweep_is_not_waited_for(tmp_path: Path) -> None:
    make_sweep(3).write(ResultStore(tmp_path))
    done = clippo("front", str(tmp_path), "--sweep", "mada", "--follow")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "has no sweep 'mada'; its sweeps are: made" in done.stderr


def test_a_terminal_shows_how_far_the_sweep_is_until_ctrl_c(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    make_sweep(3).write(store)
    store.write_state("made", RUNNING, trials=9)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "clippo", "front", str(tmp_path), "--follow"]
    terminal = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "env": os.environ | {"TERM": "xterm"}}
    with subprocess.Popen(command, start_new_session=True, **terminal) as process:
        os.close(theirs)
        shown = b""
        while b"Ctrl-C leaves" not in shown:
            shown += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    os.close(ours)
    assert b"\x1b[2J" in shown, "a table takes the place of the one before"
    assert b"4 of 9 trials, nothing new since" in shown
    assert b"Traceback" not in shown
