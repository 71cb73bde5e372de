"""Builds shards of a prepared set in several processes.

A large set is streamed through Ray Data. Of a small one this process builds its share while actors start for
the rest: what Ray Data needs besides would take a good part of the time.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
import threading
import warnings
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from itertools import chain
from queue import SimpleQueue
from typing import Any, cast

from clippo.errors import ResourceError
from clippo.prepared.shard import Recipe, ShardBuilder, Summary

FEW = 16  # shards that this process helps to build
RETRIES = 3  # of what a process was doing when it died
LOOK_S = 0.1  # between two looks of who waits for a process whether it still matters


def built_by_workers(
    recipe: Recipe, shards: Sequence[dict[str, Any]], here: ShardBuilder, *, workers: int, gpus: float,
    verbose: bool,
) -> Generator[Summary, None, None]:  # fmt: skip
    """Builds shards in several processes; gives their summaries in any order.

    Args:
        here: builds in this process.
        workers: processes, this one included where it builds [count].
        gpus: of each worker; this process may have none.
        verbose: show the logs of Ray Data.

    Raises:
        ResourceError: a worker died again and again, or this machine, where Ray is started, lacks the GPUs of
            a single one.
        DataError, StoreError: as ``ShardBuilder.build``.
    """
    import ray  # takes seconds, and most processes find their set prepared

    n = min(workers, len(shards))
    with _ray_started(gpus, verbose):
        if gpus or len(shards) > FEW:
            built = _built_by_ray_data(recipe, shards, n, gpus, verbose)
        else:
            built = _built_here_and_by_actors(recipe, shards, here, n - 1)
        try:
            with closing(built):  # left open, it would end after Ray, and start or wait for another one
                for row in built:
                    if row["error"]:
                        raise pickle.loads(row["error"])
                    yield json.loads(row["summary"])
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
            raise ResourceError(
                f"a process that prepares pictures died {RETRIES + 1} times, perhaps out of memory ({n} at "
                "once); use fewer or a larger machine, what was finished is kept"
            ) from error


Rows = Generator[dict[str, Any], None, None]
"""What a ``ShardBuilder`` returns of each shard when it is called."""


def _built_here_and_by_actors(
    recipe: Recipe, shards: Sequence[dict[str, Any]], here: ShardBuilder, n_actors: int
) -> Rows:
    import ray

    builder: Any = ray.remote(num_cpus=1, max_restarts=RETRIES, max_task_retries=RETRIES)(ShardBuilder)
    todo, built = iter(shards), SimpleQueue[dict[str, Any]]()  # both serve several threads
    all_taken, ended = threading.Event(), threading.Event()

    def came(result: ray.ObjectRef[Any], given_up: threading.Event) -> bool:
        while not ray.wait([result], timeout=LOOK_S)[0]:
            if given_up.is_set():
                return False
        return True

    def feed(actor: Any) -> None:
        # Who takes a shard before its process has started lets all others wait for it, perhaps for a node.
        if not came(ready := actor.__ray_ready__.remote(), all_taken):
            return
        ray.get(ready)
        for shard in todo:
            if not came(row := actor.__call__.remote(shard), ended):
                return
            built.put(ray.get(row))

    with ThreadPoolExecutor(n_actors) as threads:
        try:
            feeding = [threads.submit(feed, builder.remote(recipe)) for _ in range(n_actors)]
            for shard in todo:
                yield here(shard)
                while not built.empty():
                    yield built.get()
                for fed in feeding:
                    if fed.done():
                        fed.result()  # raises what went wrong
            all_taken.set()
            for fed in feeding:
                fed.result()
            while not built.empty():
                yield built.get()
        finally:
            all_taken.set()
            ended.set()


def _built_by_ray_data(
    recipe: Recipe, shards: Sequence[dict[str, Any]], n: int, gpus: float, verbose: bool
) -> Rows:
    import ray.data

    with _quiet_data_context(verbose):
        pool = ray.data.ActorPoolStrategy(
            min_size=1, max_size=n, initial_size=n, max_tasks_in_flight_per_actor=1
        )
        # A block a shard, or Ray Data would hand out several at once.
        described = ray.data.from_items(list(shards), override_num_blocks=len(shards))
        with warnings.catch_warnings():
            # Without a bound, a shard that exhausts the memory would be tried for ever. Ray means to take the
            # argument away, but has nothing in its place yet.
            warnings.simplefilter("ignore")
            built = described.map(
                ShardBuilder,  # type: ignore[arg-type]  # a worker makes one instance and calls that
                fn_constructor_args=[recipe],
                compute=pool,
                num_cpus=1,
                num_gpus=gpus,
                max_task_retries=RETRIES,
            )
        with closing(cast("Rows", iter(built.iter_rows()))) as rows:
            with nullcontext() if verbose else _silent_stderr():  # while the workers start
                first = [next(rows)]
            yield from chain(first, rows)


@contextmanager
def _ray_started(gpus: float, verbose: bool) -> Iterator[None]:
    import ray

    if ray.is_initialized():
        yield
        return
    level = logging.INFO if verbose else logging.ERROR
    address = os.environ.get("RAY_ADDRESS", "local")
    try:  # from here on, as who is interrupted while Ray starts has half of it
        ray.init(address, include_dashboard=False, log_to_driver=verbose, logging_level=level)
        have = ray.cluster_resources().get("GPU", 0.0)
        if address == "local" and gpus > have:  # Ray would wait for ever; to a cluster they may still come
            raise ResourceError(
                f"gpus_per_worker is {gpus:g}, this machine has {have:g} GPUs; lower it (0 prepares on CPUs) "
                "or set RAY_ADDRESS to a cluster that has them"
            )
        yield
    finally:
        ray.shutdown()


@contextmanager
def _quiet_data_context(verbose: bool) -> Iterator[None]:
    """No progress bars and logs of Ray Data's own."""
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = verbose
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(level if verbose else logging.CRITICAL)  # an error is raised besides
    try:
        with DataContext.current(context):
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Ray's core calls an error, past all logging of Python, how Ray Data starts its workers."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
