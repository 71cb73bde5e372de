"""What a sweep also tells TensorBoard, MLflow and Weights & Biases, through Ray Tune's own callbacks.

Ray's callbacks name a run after Ray's random trial id and log all that a trial reports. Here they see a
stand-in of each trial, with the sweep's id and settings, and of a report only its numbers.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.air.constants import TRAINING_ITERATION
from ray.tune.experiment import Trial
from ray.tune.logger import LoggerCallback, TBXLoggerCallback

from clippo.config import SweepConfig
from clippo.data.files import is_remote
from clippo.errors import ConfigError
from clippo.sweep.search import Score

UPLOAD_S = 120  # how long the end of a sweep waits for uploads to Weights & Biases
MLFLOW_RETRIES = "2"  # MLflow's own 7 hold the driver up for minutes when its server is away


@dataclass(frozen=True)
class Tracker:
    """How one of them is used.

    Attributes:
        package: what must be installed, by ``requirement``.
        begin: makes Ray's callback.
        read: how a person sees what was logged.
    """

    package: str
    requirement: str
    begin: Callable[[SweepConfig, Path], LoggerCallback]
    read: Callable[[SweepConfig, Path], str]


@dataclass(eq=False)
class Run:
    """What Ray's callbacks ask of a trial; its name is the sweep's trial id."""

    name: str
    trial_id: str
    config: dict[str, Any]
    local_path: str
    experiment_dir_name: str
    epoch: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def evaluated_params(self) -> dict[str, Any]:
        return self.config

    def init_local_path(self) -> None:
        Path(self.local_path).mkdir(parents=True, exist_ok=True)


class Tracking(tune.Callback):
    """Tells the trackers of ``--track`` of every trial.

    One that fails is told no more, and the sweep goes on.

    Args:
        report: gets one line for each tracker, and one when it fails.

    Raises:
        ConfigError: a tracker cannot be used.
    """

    def __init__(self, config: SweepConfig, score: Score, report: Callable[[str], object]) -> None:
        check_tracking(config)
        self._config, self._score, self._report = config, score, report
        self._runs: dict[str, Run] = {}  # by Ray's id
        self._callbacks: dict[str, LoggerCallback] = {}
        folder = _folder(config)
        folder.mkdir(parents=True, exist_ok=True)
        for name in config.track:
            place = TRACKERS[name].read(config, folder)  # first: mlflow sets its own variable
            try:
                callback = TRACKERS[name].begin(config, folder)
                callback.setup()
            except Exception as error:  # whatever a client says
                raise ConfigError(f"--track {name}: {_one_line(error)}") from None
            self._callbacks[name] = callback
            report(f"tracked by {name}: {place}")

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks to restore them; a sweep is resumed from its tables instead

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        if trial.trial_id in self._runs:  # its process has died, and it goes on
            return
        sweep, (name, attempt) = self._config.name, (trial.config["trial_id"], trial.config["attempt"])
        settings = {n: v for n, v in trial.config["settings"].items() if v is not None}
        self._runs[trial.trial_id] = run = Run(
            name=name,
            trial_id=f"{sweep}-{name}-{attempt}",
            config={"trial_id": name, "attempt": attempt, **settings},
            local_path=str(_own_folder(self._config, name)),
            experiment_dir_name=sweep,
        )
        self._tell("log_trial_start", run)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        run = self._runs[trial.trial_id]
        # A trial that goes on reports again what it had reported.
        if (numbers := self._score(result)) is None or result["epoch"] <= run.epoch:
            return
        run.epoch = result["epoch"]
        self._tell(
            "log_trial_result",
            iteration,
            run,
            {TRAINING_ITERATION: run.epoch, **numbers, **result["metrics"]},
        )

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._end(trial.trial_id, failed=self._score(trial.last_result or {}) is None)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._end(trial.trial_id, failed=True)

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        self._tell("on_experiment_end", list(self._runs.values()))

    def close(self) -> None:
        """Ends the runs of trials that were interrupted, or they would look as if they still ran."""
        for ray_id in list(self._runs):
            self._end(ray_id, failed=True)

    def _end(self, ray_id: str, *, failed: bool) -> None:
        if (run := self._runs.pop(ray_id, None)) is not None:
            self._tell("log_trial_end", run, failed=failed)

    def _tell(self, method: str, *args: Any, **options: Any) -> None:
        for name, callback in list(self._callbacks.items()):
            try:
                getattr(callback, method)(*args, **options)
            except Exception as error:  # whatever a client says; a tracker must not end a sweep
                del self._callbacks[name]
                self._report(f"{name} is told no more of this sweep: {_one_line(error)}")


def check_tracking(config: SweepConfig) -> None:
    """Refuses trackers whose package is missing, or that have no place to log to.

    Raises:
        ConfigError: with the remedy.
    """
    for name in config.track:
        tracker = TRACKERS[name]
        spec = importlib.util.find_spec(tracker.package)
        if spec is None or spec.origin is None:  # a folder of runs may have the package's name
            raise ConfigError(
                f"--track {name} needs the package {tracker.package}; pip install '{tracker.requirement}'"
            )
    if "mlflow" in config.track and is_remote(config.results) and "MLFLOW_TRACKING_URI" not in os.environ:
        raise ConfigError(
            f"--track mlflow logs beside local results, and {config.results} are not local; "
            "set MLFLOW_TRACKING_URI"
        )


def _folder(config: SweepConfig) -> Path:
    """Where a tracker logs that was told of no other place: beside local results, else here."""
    if is_remote(config.results):
        return Path.cwd()
    return Path(config.results.removeprefix("file://")).expanduser().resolve()


def _own_folder(config: SweepConfig, trial_id: str) -> Path:
    """Where Ray's callbacks put files of a trial; only TensorBoard's does."""
    folder = _folder(config)
    return folder / "tensorboard" / config.name / trial_id if "tensorboard" in config.track else folder


def _tensorboard(config: SweepConfig, folder: Path) -> LoggerCallback:
    return TBXLoggerCallback()


def _mlflow(config: SweepConfig, folder: Path) -> LoggerCallback:
    from ray.air.integrations.mlflow import MLflowLoggerCallback  # mlflow takes seconds to import

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", MLFLOW_RETRIES)
    return MLflowLoggerCallback(
        tracking_uri=_mlflow_uri(folder),
        experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME", config.name),
        tags={"sweep": config.name},
    )


def _mlflow_uri(folder: Path) -> str:
    return os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")


def _wandb(config: SweepConfig, folder: Path) -> LoggerCallback:
    from ray.air.integrations.wandb import WandbLoggerCallback  # wandb takes seconds to import

    class Callback(WandbLoggerCallback):
        def _start_logging_actor(self, *args: Any, **options: Any) -> None:
            # Ray would hand the key on as a runtime environment, which it logs. The process is on this
            # machine, and has the environment of its Ray.
            key = os.environ.pop("WANDB_API_KEY", None)
            try:
                super()._start_logging_actor(*args, **options)
            finally:
                if key is not None:
                    os.environ["WANDB_API_KEY"] = key

    # The runs are processes of Ray, which need not have this process's environment.
    mode, place = os.environ.get("WANDB_MODE"), os.environ.get("WANDB_DIR", str(folder))
    return Callback(
        project=os.environ.get("WANDB_PROJECT", "clippo"),
        group=os.environ.get("WANDB_RUN_GROUP", config.name),
        upload_timeout=UPLOAD_S,
        dir=place,
        mode=mode,
    )


TRACKERS = {
    "tensorboard": Tracker(
        "tensorboardX", "clippo", _tensorboard,
        lambda config, folder: f"tensorboard --logdir {folder / 'tensorboard' / config.name}",
    ),
    "mlflow": Tracker(
        "mlflow", "clippo[mlflow]", _mlflow,
        lambda config, folder: (
            "at MLFLOW_TRACKING_URI"  # which may hold a password
            if "MLFLOW_TRACKING_URI" in os.environ
            else f"mlflow ui --backend-store-uri {_mlflow_uri(folder)}"
        ),
    ),
    "wandb": Tracker(
        "wandb", "clippo[wandb]", _wandb,
        lambda config, folder: (
            f"wandb sync {folder / 'wandb' / 'offline-run-*'}"
            if os.environ.get("WANDB_MODE") == "offline"
            else f"project {os.environ.get('WANDB_PROJECT', 'clippo')}"
        ),
    ),
}  # fmt: skip


def _one_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"//[^/@\s]*@", "//", line)  # names and passwords in URLs
