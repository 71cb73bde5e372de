"""The configuration that is kept with a sweep, and whether another one may go on with it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clippo.config import SweepConfig
from clippo.data.prompts import without_file
from clippo.errors import ConfigError
from clippo.model.usage import usage
from clippo.results import ResultStore
from clippo.tasks import objectives_of, resolved, task_named

EXPORTED = "model.safetensors"
"""How the report's commands call an exported file."""
FREE_FIELDS = {
    "name",
    "results",
    "verbose",
    "dry_run",
    "workers",
    "worker_timeout",
    "gpus_per_worker",
    "autoscaling",
    "track",
    "train.micro_batch",
    "train.epochs_between_checkpoints",
    "train.minutes_between_checkpoints",
    *(
        f"search.{name}"
        for name in (
            "trials", "concurrency", "confirm", "mirror", "device_hours", "wall_hours", "patience",
        )
    ),
}  # fmt: skip
"""What a resumed sweep may change: where, how long and in which memory it runs, not what it measures."""


def is_resumed(store: ResultStore, config: SweepConfig) -> bool:
    """Whether the store has this sweep already.

    Raises:
        ConfigError: the name belongs to a sweep of another configuration.
    """
    kept = store.config(config.name)
    if kept is None:
        return False
    # A setting that was not there yet had what is its default now.
    default = resolved(SweepConfig(task=kept.get("task", config.task)))
    theirs = _flat(json.loads(json.dumps(dataclasses.asdict(default))))
    theirs |= _flat(kept)
    if "robustness_sets" in kept:  # as the first version called them
        theirs["goal_sets"] = kept["robustness_sets"]
    with contextlib.suppress(ConfigError):  # earlier versions kept the path of a prompt file
        theirs["model.prompt"] = without_file(theirs["model.prompt"])
    mine = _flat(json.loads(json.dumps(dataclasses.asdict(config))))
    differ = sorted(k for k, v in mine.items() if k not in FREE_FIELDS and theirs.get(k) != v)
    if differ:
        raise ConfigError(
            f"sweep {config.name!r} exists in {store.uri} with another {', '.join(differ)}; "
            "resume it with its own settings or choose another --name"
        )
    return True


def stored(config: SweepConfig) -> dict[str, Any]:
    """What the store keeps of a configuration, with what readers need who know neither tasks nor models."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    model = config.model
    return plain | {
        "objectives": objectives_of(config).to_json(),
        "words": task_named(config.task).words.to_json(),
        "usage": usage(
            model.name, model.pretrained, EXPORTED if ":" not in model.name else Path(EXPORTED).stem
        ),
    }


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
