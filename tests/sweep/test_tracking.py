"""What TensorBoard and MLflow hold of a sweep, read back with their own formats."""

import importlib.util
import json
import os
import re
import struct
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.tune.experiment import Trial
from tensorboardX.proto.event_pb2 import Event

from clippo.config import SweepConfig
from clippo.errors import ConfigError
from clippo.results import ResultStore
from clippo.sweep.tracking import TRACKERS, Tracking, check_tracking

SETTINGS = ("loss", "beta", "kl_weight", "learning_rate", "epochs", "seed")
NUMBERS = {"robustness", "retention", "device_s", "loss", "preference_loss", "kl"}


def metrics_of(results: Path) -> dict[str, dict[str, float]]:
    """The metrics of the last epoch by trial, from the rows."""
    found: dict[str, dict[str, float]] = {}
    for row in sorted(ResultStore(results).metrics("four").to_pylist(), key=lambda r: r["epoch"]):
        found.setdefault(row["trial_id"], {})[row["name"]] = row["value"]
    return found


def robustness_of(results: Path) -> dict[str, float]:
    """Of the averaged weights on validation pictures, from the rows."""
    counted: dict[str, list[tuple[int, int]]] = {}
    for row in ResultStore(results).evals("four").to_pylist():
        if row["variant"] == "averaged" and row["eval_set"].startswith("validation/attacked"):
            counted.setdefault(row["trial_id"], []).append((row["n_correct"], row["n_total"]))
    return {i: sum(c for c, _ in counts) / sum(n for _, n in counts) for i, counts in counted.items()}


def events(folder: Path) -> Iterator[Event]:
    """The records of TensorBoard's files: length, checksum of it, data, checksum of it."""
    for file in folder.glob("events.*"):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_tensorboard_shows_the_curve_of_every_trial(finished: tuple[Path, str]) -> None:
    results, printed = finished
    [folder] = re.findall(r"tracked by tensorboard: tensorboard --logdir (\S+)", printed)
    expected, robustness = metrics_of(results), robustness_of(results)
    assert {f.name for f in Path(folder).iterdir()} == set(expected)
    for trial_id, metrics in expected.items():
        scalars = {
            value.tag.removeprefix("ray/tune/"): (event.step, value.simple_value)
            for event in events(Path(folder) / trial_id)
            for value in event.summary.value
            if value.tag.startswith("ray/tune/")
        }
        assert scalars.keys() >= NUMBERS
        assert scalars["loss"] == (1, pytest.approx(metrics["loss"], rel=1e-6))
        assert scalars["robustness"] == (1, pytest.approx(robustness[trial_id], rel=1e-6))
        assert not {"pid", "time_total_s", "evals"} & scalars.keys(), "Ray and the rows have these"


def test_mlflow_has_settings_and_numbers_and_nothing_else(finished: tuple[Path, str]) -> None:
    results, printed = finished
    [uri] = re.findall(r"tracked by mlflow: mlflow ui --backend-store-uri (\S+)", printed)
    assert uri == f"sqlite:///{results}/mlflow.db"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mlflow's own
        from mlflow.tracking import MlflowClient

        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name("four")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id])
    rows = {t["trial_id"]: t for t in ResultStore(results).trials("four").to_pylist()}
    assert sorted(run.info.run_name for run in runs) == sorted(rows.keys() - {"reference"})
    expected = metrics_of(results)
    for run in runs:
        trial_id = run.info.run_name
        settings = {n: str(v) for n in SETTINGS if (v := rows[trial_id][n]) is not None}
        assert run.data.params == {"trial_id": trial_id, "attempt": "0", **settings}
        assert run.info.status == "FINISHED"
        assert run.data.metrics["loss"] == pytest.approx(expected[trial_id]["loss"])
        known = NUMBERS | expected[trial_id].keys() | {"training_iteration"}
        assert NUMBERS <= run.data.metrics.keys() <= known
        assert run.data.tags == {"sweep": "four", "trial_name": trial_id, "mlflow.runName": trial_id}


def score(report: Any) -> dict[str, float] | None:
    return report.get("numbers")


def tracking(results: Path, **fields: Any) -> tuple[Tracking, list[str]]:
    """Trackers of a sweep, and what they say."""
    said: list[str] = []
    return Tracking(SweepConfig(name="s1", results=str(results), **fields), score, said.append), said


def a_trial(number: int) -> Trial:
    config = {"trial_id": f"{number:05d}", "attempt": 0, "settings": {"loss": "dpo", "beta": 0.1}}
    return Trial("tune_trial", config=config, stub=True)


def two_epochs(tracker: Tracking) -> None:
    """A whole trial."""
    trial = a_trial(0)
    tracker.on_trial_start(0, [], trial)
    for epoch in (1, 2):
        tracker.on_trial_result(0, [], trial, a_report(epoch))
    trial.run_metadata.last_result = a_report(2)
    tracker.on_trial_complete(0, [], trial)


def a_report(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "numbers": {"robustness": 0.5 + epoch / 10}, "metrics": {"loss": 1.0 / epoch}}


def test_a_tracker_that_fails_does_not_end_the_sweep(tmp_path: Path) -> None:
    tracker, said = tracking(tmp_path, track=("tensorboard",))
    first, second = a_trial(0), a_trial(1)
    tracker.on_trial_start(0, [], first)
    tracker.on_trial_result(0, [], first, a_report(1))
    (tmp_path / "tensorboard/s1/00001").write_text("in the way")
    for trial in (second, a_trial(2)):
        tracker.on_trial_start(0, [], trial)
    assert len(said) == 2
    assert said[1].startswith("tensorboard is told no more of this sweep: ")
    tracker.on_trial_complete(0, [], second)


def test_a_trial_that_goes_on_elsewhere_has_no_epoch_twice(tmp_path: Path) -> None:
    tracker, _ = tracking(tmp_path, track=("tensorboard",))
    trial = a_trial(0)
    for _ in range(2):  # its worker dies after two epochs, and the next one reports them again
        tracker.on_trial_start(0, [], trial)
        for epoch in (1, 2):
            tracker.on_trial_result(0, [], trial, a_report(epoch))
    tracker.close()
    steps = [
        event.step
        for event in events(tmp_path / "tensorboard/s1/00000")
        for value in event.summary.value
        if value.tag == "ray/tune/loss"
    ]
    assert steps == [1, 2]


def test_mlflow_in_a_local_file_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which MLflow keeps for those who ask for it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "runs").as_uri())
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with pytest.raises(ConfigError, match=r"^--track mlflow: The filesystem tracking backend .*MLFLOW_ALLOW"):
        tracking(tmp_path, track=("mlflow",))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracker, said = tracking(tmp_path, track=("mlflow",))
    two_epochs(tracker)
    tracker.close()
    assert said == ["tracked by mlflow: at MLFLOW_TRACKING_URI"]
    (run,) = (tmp_path / "runs").glob("*/*/params/trial_id")
    assert run.read_text() == "00000"
    folder = run.parents[1]
    losses = [line.split() for line in (folder / "metrics" / "loss").read_text().splitlines()]
    assert [(float(value), int(step)) for _, value, step in losses] == [(1.0, 1), (0.5, 2)]
    assert "status: 3" in (folder / "meta.yaml").read_text(), "finished"


def session_of_ray() -> str:
    node = ray._private.worker._global_node
    assert node is not None
    return str(node.get_session_dir_path())


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of wandb's file: LevelDB's log format in blocks of 32 KiB, after 7 bytes of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = file.read_bytes(), 7, b""
    while at < len(data):
        if (left := -at % 32768) < 7 and left:  # too little for the header of a part
            at += left
            continue
        _, length, part = struct.unpack_from("<IHB", data, at)  # checksum, length, which part of a record
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # the whole, or the last
            yield Record.FromString(record)
            record = b""


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline(own_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its runs are processes of Ray, each with a file of its own."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", key := "0123456789" * 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # wandb's own
        tracker, said = tracking(tmp_path, track=("wandb",))
        two_epochs(tracker)
        tracker.on_experiment_end([])  # waits for the process
    assert said == [f"tracked by wandb: wandb sync {tmp_path}/wandb/offline-run-*"]
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    records = list(wandb_records(file))
    (run,) = {r.run.run_id: r.run for r in records if r.WhichOneof("record_type") == "run"}.values()
    assert (run.display_name, run.run_group, run.project) == ("00000", "s1", "clippo")
    config = {item.key: item.value_json for item in run.config.update}
    assert config.items() >= {"trial_id": '"00000"', "attempt": "0", "loss": '"dpo"', "beta": "0.1"}.items()
    epochs = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in r.history.item}
        for r in records
        if r.WhichOneof("record_type") == "history"
    ]
    assert [(e["training_iteration"], e["robustness"], e["loss"]) for e in epochs] == [
        (1, 0.6, 1.0),
        (2, 0.7, 0.5),
    ]
    assert [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"] == [0]
    logs = [path for path in Path(session_of_ray()).glob("logs/**/*") if path.is_file()]
    assert any(path.name == "runtime_env_agent.log" for path in logs)
    assert not [path for path in (*logs, file) if key.encode() in path.read_bytes()]
    assert os.environ["WANDB_API_KEY"] == key


def test_a_server_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter2@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match="--track mlflow: ") as caught:
        tracking(tmp_path, track=("mlflow",))
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRACKERS, "wandb", replace(TRACKERS["wandb"], package="clippo_has_no_such"))
    with pytest.raises(ConfigError, match=r"pip install 'clippo\[wandb\]'"):
        check_tracking(SweepConfig(track=("wandb",)))


def test_results_of_a_file_uri_are_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    check_tracking(SweepConfig(track=("mlflow",), results=f"file://{tmp_path}"))
    with pytest.raises(ConfigError, match="s3://bucket/x are not local"):
        check_tracking(SweepConfig(track=("mlflow",), results="s3://bucket/x"))
