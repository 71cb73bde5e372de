"""A number of workers that may change: what may be asked for, what is needed, and what is kept."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.train._internal.session import get_session, init_session
from ray.train._internal.storage import StorageContext

from clippo.config import SearchConfig, SweepConfig, TrainConfig
from clippo.errors import ConfigError, ResourceError
from clippo.prepared import PreparedSet
from clippo.results import ResultStore
from clippo.sweep.cluster import check_resources, joined_ray, resources_of_a_trial
from clippo.sweep.rows import TrialRows
from clippo.train.ray_train import READ_S, _wait_until_read

ONE = SearchConfig(concurrency=1)


@pytest.mark.parametrize("workers", ["4:1", "0:2", "many", "1:2:3", "", ":2", "-1:2", -1])
def test_what_is_no_number_of_workers(workers: Any) -> None:
    with pytest.raises(ConfigError, match=r"^workers is .*FEWEST:MOST such as 1:4$"):
        SweepConfig(workers=workers)


def test_a_batch_has_a_pair_for_each_worker_that_there_may_be() -> None:
    with pytest.raises(ConfigError, match=r"at least the number of workers \(4\)"):
        SweepConfig(workers="1:4", train=TrainConfig(batch_size=3))


def test_the_fewest_workers_must_fit(own_ray: None) -> None:
    with joined_ray(SweepConfig()):
        assert resources_of_a_trial(SweepConfig(workers="2:4"))["CPU"] == 2
        check_resources(SweepConfig(workers="1:400", search=ONE, train=TrainConfig(batch_size=400)))
        with pytest.raises(ResourceError, match=r"1 trials at once x 400 CPU"):
            check_resources(SweepConfig(workers="400:401", search=ONE, train=TrainConfig(batch_size=401)))


UNREAD_S = 1.0


def ended_with_an_unread_report(folder: str) -> float:
    """How long a trial waits at its end, whose last report is read after `UNREAD_S` [seconds]."""
    nobody = dict.fromkeys(("world_rank", "local_rank", "node_rank", "local_world_size", "world_size"))
    storage = StorageContext(folder, "sweep", trial_dir_name="trial")
    init_session(training_func=lambda: None, storage=storage, **nobody)
    session = get_session()
    assert session is not None
    reports = session._get_or_create_inter_actor_queue()
    reports.put({"epoch": 1})
    began = time.monotonic()
    threading.Timer(UNREAD_S, reports.get).start()
    _wait_until_read()
    return time.monotonic() - began


def test_a_trial_ends_when_its_last_report_was_read(own_ray: None, tmp_path: Path) -> None:
    with joined_ray(SweepConfig()):
        waited = ray.get(ray.remote(ended_with_an_unread_report).remote(str(tmp_path)))
    assert waited >= UNREAD_S + READ_S


def test_a_row_says_how_many_workers_there_were_at_most(small_set: PreparedSet, tmp_path: Path) -> None:
    reports = [
        {
            "epoch": epoch, "step": epoch, "metrics": {"workers": workers}, "busy_s": 10.0 * epoch,
            "precision": "fp32", "evals": [],
        }
        for epoch, workers in [(1, 1.0), (2, 3.0), (3, 2.0)]
    ]  # fmt: skip
    store = ResultStore(str(tmp_path))
    for trial, workers in [("grown", "1:4"), ("fixed", 2), ("alone", 0)]:
        config = SweepConfig(name="rows", workers=workers, gpus_per_worker=0.5)
        TrialRows(config, store, small_set).write(trial, 0, {}, reports, began=0.0)
    rows = {t["trial_id"]: (t["workers"], t["device_s"]) for t in store.trials("rows").to_pylist()}
    assert rows == {"grown": (3, 15.0), "fixed": (2, 15.0), "alone": (0, 15.0)}
