"""The whole life of a sweep on an autoscaling cluster; `make rehearse` prints its timeline and plots it."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import altair as alt
import pytest

from clippo.results import ResultStore
from clippo.train.checkpoint import STATE
from tests.conftest import S3Server
from tests.integration.nodes import RayCluster, ray_cluster

pytestmark = [pytest.mark.alone, pytest.mark.timeout(900)]  # four minutes, but for a machine that is slow

NAME = "rehearsal"
EPOCHS = 24  # so many that a trial outlives the time that Ray needs to notice a lost node
FLAGS = ["--search.trials", "6", "--search.concurrency", "3", "--search.epochs", f"{EPOCHS}", f"{EPOCHS}"]
FLAGS += ["--autoscaling"]


class Timeline:
    """What happened when, and how many workers there were."""

    def __init__(self, cluster: RayCluster) -> None:
        self._cluster, self._began, self._ended = cluster, time.monotonic(), threading.Event()
        self.events: list[tuple[float, str]] = []
        self.workers: list[tuple[float, int]] = []
        self._awaited = 0

    def note(self, event: str) -> None:
        seconds = time.monotonic() - self._began
        self.events.append((seconds, event))
        print(f"{seconds:6.1f} s  {event}", flush=True)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Notes every change of the number of workers."""
        watcher = threading.Thread(target=self._watch)
        watcher.start()
        try:
            yield
        finally:
            self._ended.set()
            watcher.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            now = self._cluster.workers()
            if not self.workers or self.workers[-1][1] != now:
                self.workers.append((time.monotonic() - self._began, now))
                self.note(f"{now} worker{'s' * (now != 1)}")

    def wait_for(self, workers: int, seconds: float = 60) -> None:
        """Returns when there were so many after what was waited for last, however short."""
        deadline = time.monotonic() + seconds
        while workers not in (since := [n for _, n in self.workers[self._awaited :]]):
            assert time.monotonic() < deadline, f"not {workers} workers: {self.workers}"
            time.sleep(0.2)
        self._awaited += since.index(workers) + 1

    def plot(self, path: Path) -> None:
        steps = [*self.workers, (time.monotonic() - self._began, self.workers[-1][1])]
        counts = alt.Data(values=[{"s": s, "workers": n} for s, n in steps])
        what = alt.Data(values=[{"s": s, "event": e} for s, e in self.events if "worker" not in e])
        axis = alt.X("s:Q", title="seconds")
        line = (
            alt.Chart(counts)
            .mark_line(interpolate="step-after")
            .encode(x=axis, y=alt.Y("workers:Q", axis=alt.Axis(tickMinStep=1)))
        )
        rules = alt.Chart(what).mark_rule(strokeDash=[3, 3]).encode(x=axis)
        texts = alt.Chart(what).mark_text(angle=270, align="left", dx=4, dy=10).encode(x=axis, text="event:N")
        (line + rules + texts.encode(y=alt.value(200))).properties(width=800, height=200).save(path, ppi=120)


def test_from_nothing_to_three_workers_and_back(s3_env: S3Server, tmp_path: Path) -> None:
    results = f"s3://{s3_env.bucket}/{NAME}"
    flags = ["--results", results, "--name", NAME, *FLAGS]
    with ray_cluster(s3_env, autoscaled=True) as cluster:
        timeline = Timeline(cluster)
        with timeline.watching():
            timeline.wait_for(0)
            timeline.note("submitted")
            assert cluster.submit_installed(*flags, options=("--no-wait",)).returncode == 0
            timeline.wait_for(3, seconds=120)
            states = f"{s3_env.bucket}/{NAME}/checkpoints/sweep={NAME}/*/{STATE}"
            _wait_until(lambda: len(s3_env.filesystem().glob(states)) >= 3)
            timeline.note("a node is killed")
            cluster.lose_autoscaled_node()
            timeline.wait_for(2)
            timeline.wait_for(3)  # another one in its place
            _wait_until(lambda: len(_ended(results)) >= 2)  # the reference and a trial
            timeline.note("the driver is killed, the job submitted again")
            cluster.kill_driver(NAME)
            before = _ended(results)
            done = cluster.submit_installed(*flags)
            assert done.returncode == 0, done.stdout + done.stderr
            timeline.note("the sweep has ended")
            timeline.wait_for(0, seconds=60)
        timeline.plot(Path(os.environ.get("REHEARSAL", tmp_path / "rehearsal.png")))
    print(done.stdout[done.stdout.index("Pareto front of") :].partition("\n2026")[0])
    assert max(n for _, n in timeline.workers) == 3
    trials = {t["trial_id"]: t for t in ResultStore(results).trials(NAME).to_pylist()}
    assert trials.keys() == {"reference", *(f"{i:05}" for i in range(6))}
    assert {t["status"] for t in trials.values()} == {"completed"}
    assert all(trials[i]["finished_at"] == at for i, at in before.items()), "no finished trial was run again"
    assert sum(t["preemptions"] > 0 for t in trials.values()) >= 2, (
        "by the lost node and by the driver's death"
    )
    losses = [m for m in ResultStore(results).metrics(NAME).to_pylist() if m["name"] == "loss"]
    epochs = [(m["trial_id"], m["epoch"]) for m in losses]
    assert sorted(epochs) == [(f"{i:05}", e) for i in range(6) for e in range(1, EPOCHS + 1)]


def _ended(results: str) -> dict[str, datetime]:
    """When each trial ended that has its rows."""
    return {t["trial_id"]: t["finished_at"] for t in ResultStore(results).trials(NAME).to_pylist()}


def _wait_until(so: Callable[[], bool], seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not so():
        assert time.monotonic() < deadline, "it did not come so far"
        time.sleep(0.2)
