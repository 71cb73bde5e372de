"""The Ray cluster that a sweep runs on: joining it, and what a trial takes of it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator

import ray
from ray._private.state import state as ray_state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]  # generated
from ray.tune.execution import class_cache
from ray.util.placement_group import PlacementGroup, remove_placement_group

from clippo.config import SweepConfig
from clippo.errors import ResourceError
from clippo.sweep.autoscaler import most_resources

logger = logging.getLogger(__name__)

DRIVER_CPU = 0.01
FREE_S = 1.0  # between two looks for what dead trials have left reserved
DYING_S = 5.0  # how long the last look waits for the controllers of trials that have been stopped
RAY = "2.60"  # pyproject.toml fixes it; what is used of it besides its public API may be gone in another
MAX_PREPARING = 4  # processes that prepare pictures; each holds a model


@contextlib.contextmanager
def joined_ray(config: SweepConfig) -> Iterator[None]:
    """Joins the cluster that this process belongs to, or starts Ray on this machine for the time."""
    if not ray.__version__.startswith(f"{RAY}."):
        raise ResourceError(
            f"Ray is {ray.__version__}; a sweep leans on what {RAY} does: pip install 'ray=={RAY}.*'"
        )
    _keep_environment()
    if ray.is_initialized():
        yield
        return
    level = logging.INFO if config.verbose else logging.ERROR
    # Drivers of trials with workers reserve this instead of a CPU, which they would take from their workers.
    address = os.environ.get("RAY_ADDRESS", "local")
    drivers = {"trial_driver": float(config.search.concurrency)} if address == "local" else None
    ended_by = signal.getsignal(signal.SIGTERM)
    try:  # from here on, as who is interrupted while Ray starts has half of it
        ray.init(
            address,
            resources=drivers,
            include_dashboard=False,
            log_to_driver=config.verbose,
            logging_level=level,
        )
        # Ray's own ends the process at once, with a stack trace.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ended_by)
        yield
    finally:
        ray.shutdown()


def _keep_environment() -> None:
    """Has Ray Tune not give trials an environment of their own where they need none.

    Trials may then start in processes that Ray has ready, and need no agent to make an environment. AWS's
    credentials are never handed on, as Ray logs and shows such environments; every machine has credentials of
    its own, as all but Tune's trials need them there anyway.
    """
    # Not public; ``test_a_job_is_followed_to_its_rows_in_the_bucket`` looks for credentials in Ray's logs,
    # ``test_a_trial_has_no_environment_of_its_own`` at what a trial is given.
    class_cache.DEFAULT_ENV_VARS.clear()  # a variable for PyTorch Lightning
    handed_on = class_cache.ENV_VARS_TO_PROPAGATE
    handed_on -= {name for name in handed_on if name.startswith("AWS_")}


@contextlib.contextmanager
def leftovers_freed() -> Iterator[None]:
    """Frees, while it lasts, what is reserved for workers whose controller has died.

    It would last as long as the job, and the next attempt of the trial would wait for it. Ray Train's own
    clean-up, which ``LeanTrainer`` does without, learns of a reservation only when all workers have started
    (Ray 2.60).
    """
    ended = threading.Event()

    def watch() -> None:
        warned = False
        while not ended.wait(FREE_S):
            try:
                _free_leftovers()
            except Exception:  # such as a head that starts again
                if not warned:
                    logger.warning("what dead trials have reserved could not be freed", exc_info=True)
                warned = True

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()
        with contextlib.suppress(Exception):  # such as a head that is gone
            deadline = time.monotonic() + DYING_S
            while _free_leftovers() and time.monotonic() < deadline:
                time.sleep(FREE_S / 10)


def _free_leftovers() -> bool:
    """Removes this job's placement groups of dead actors; returns whether there were any of actors."""
    job, found = ray.JobID.from_hex(ray.get_runtime_context().get_job_id()), False
    # No public table tells who has created a group. pyproject.toml fixes the release of Ray; where another
    # one has another table, `test_a_confirming_trial_outlives_its_driver` fails.
    for row in ray_state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(row)
        is_there = group.state != PlacementGroupTableData.REMOVED and not group.is_detached
        by_actor = not ray.ActorID(group.creator_actor_id).is_nil()
        if is_there and by_actor and group.creator_job_id == job.binary():
            found = True
            if group.creator_actor_dead:
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
    return found


def trial_resources(config: SweepConfig) -> dict[str, float]:
    """What the trial itself reserves; worker processes reserve their own."""
    if config.max_workers == 0:
        return {"cpu": 1.0} | ({"gpu": config.gpus_per_worker} if config.gpus_per_worker else {})
    # A driver that reserved a CPU could starve its own workers, silently.
    return {"trial_driver": 1.0} if "trial_driver" in ray.cluster_resources() else {"cpu": DRIVER_CPU}


def resources_of_a_trial(config: SweepConfig) -> dict[str, float]:
    """What a trial and its workers need of the cluster that this process has joined, to start with."""
    processes = max(1, config.min_workers)
    wanted = {"CPU": float(processes), "GPU": processes * config.gpus_per_worker}
    if config.max_workers:
        own = trial_resources(config)
        wanted["CPU"] += own.get("cpu", 0.0)
        wanted["trial_driver"] = own.get("trial_driver", 0.0)
    return wanted


def check_resources(config: SweepConfig) -> str:
    """Refuses more trials at once than the cluster can run, all its nodes added; returns the arithmetic.

    With ``autoscaling`` what counts is what the cluster may grow to; where nothing tells that, only the
    places of trial drivers, which are on the head.

    Raises:
        ResourceError: with the arithmetic.
    """
    now, at_once = ray.cluster_resources(), config.search.concurrency
    most = most_resources() if config.autoscaling else {}
    if config.is_elastic and not now.get("trial_driver"):
        # Ray Train counts whole nodes when it asks how many workers fit, whatever drivers have taken of them.
        raise ResourceError(
            f"workers is {config.workers}, for which the cluster must have a place for each trial's driver; "
            f"start its head with --resources='{{\"trial_driver\": {at_once}}}' or fix the number of workers"
        )
    sums = []
    for kind, each in resources_of_a_trial(config).items():
        if not each:
            continue
        have = max(now.get(kind, 0.0), most.get(kind, 0.0))
        grows = config.autoscaling and kind != "trial_driver"
        if at_once * each > have + 1e-9 and (most or not grows):
            if kind == "trial_driver":
                remedy = f"start its head with --resources='{{\"trial_driver\": {at_once}}}'"
            elif grows:
                remedy = "raise its max_workers"
            else:
                remedy = "add nodes (--autoscaling where the cluster does so itself)"
            raise ResourceError(
                f"{at_once} trials at once x {each:g} {kind} are {at_once * each:g} {kind}, the cluster "
                f"{'may grow to' if grows else 'has'} {have:g}; lower search.concurrency or workers, "
                f"or {remedy}"
            )
        told = f" now, at most {have:g}" if most else " now; what the cluster may grow to is not known"
        sums.append(
            f"{at_once} trials at once x {each:g} {kind} = {at_once * each:g} of {now.get(kind, 0.0):g}"
            + told * grows
        )
    return ", ".join(sums)


def preparing_workers(config: SweepConfig) -> int:
    """As many processes as trials will use; each holds a model."""
    if config.gpus_per_worker:
        return config.search.concurrency * max(1, config.min_workers)
    return max(1, min(MAX_PREPARING, int(ray.cluster_resources().get("CPU", 1))))
