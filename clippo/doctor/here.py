"""What can be looked at without a cluster, here or on any node."""

from __future__ import annotations

import os
import shutil
import socket

from rich.filesize import decimal

from clippo.config import SweepConfig
from clippo.errors import DataError, StoreError
from clippo.results import ResultStore
from clippo.results.objects import MIN_FREE
from clippo.results.spool import Spool
from clippo.results.spooled import spool_folder
from clippo.sweep.checks import check_settings
from clippo.tasks import task_named

DECODED = 3  # pictures of each part that are really decoded


def settings(config: SweepConfig) -> str:
    check_settings(config)
    return "task, losses and baselines are known"


def local_disk(config: SweepConfig) -> str:
    """Whether results can wait on local disk while the store is away."""
    spool = Spool(spool_folder(ResultStore(config.results).uri), config.results)
    failure, waiting = spool.probe(), len(spool.items)
    spool.close()
    if failure:
        raise StoreError(f"{spool.root} cannot be written ({failure}); set CLIPPO_CACHE to another folder")
    free = shutil.disk_usage(spool.root).free
    if free < MIN_FREE:
        raise StoreError(
            f"{spool.root} has {decimal(free)} left; free at least {decimal(MIN_FREE)} or set CLIPPO_CACHE"
        )
    return f"{decimal(free)} free in {spool.root.parents[1]}" + (
        f"; {waiting} objects of an earlier sweep wait there, the next one delivers them" if waiting else ""
    )


def decoded(config: SweepConfig) -> str:
    """Decodes some pictures of every part."""
    task = task_named(config.task)(config.data)
    read = 0
    for part in task.parts.values():
        if not part.pictures:
            raise DataError(f"{config.data.source} has no pictures for {part.name}; add some")
        for picture in part.pictures[:: max(1, len(part.pictures) // DECODED)][:DECODED]:
            try:
                picture.load()
            except DataError as error:
                raise DataError(f"{picture.key}: {error}; mend or remove it") from error
            read += 1
    pictures = sum(len(part.pictures) for part in task.parts.values())
    seen = len(task.parts["train"].candidates)
    return f"{read} of {pictures} decoded, {len(task.classes)} classes, {seen} of them seen"


def reach_head() -> None:
    """Raises OSError when nothing listens where RAY_ADDRESS points to; Ray itself tries for minutes."""
    address = os.environ.get("RAY_ADDRESS", "")
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise ConnectionError(f"nothing answers at {address} ({error})") from error
