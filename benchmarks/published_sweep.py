"""Given settings, each tried with the published procedure (published.py) through Ray Tune.

    python -m benchmarks.published_sweep settings.json --report report.json

``settings.json`` is a list of objects with loss, beta, kl_weight, learning_rate, epochs and seed.

A trial trains, measures clean and attacked accuracy of the averaged weights on validation pictures after
every epoch (and of the reference after the first), writes a checkpoint, and at the end measures last weights,
average and reference on test pictures: as the published code does, which then measures the tuning pictures
too. Every model is run whole on every picture that it is measured on, and every picture is composed, resized
and attacked when it is asked for.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from ray import init, tune
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.common import program
from benchmarks.published import Pairs, Published, steps_of
from clippo.config import DataConfig, ModelConfig
from clippo.model import load_clip

GROUPS = ("seen", "held_out")


def trial(config: Mapping[str, Any], *, data: DataConfig, batch_size: int) -> None:
    """One trial, in one thread of one process, as a trial of clippo."""
    torch.set_num_threads(1)
    settings, began = config["settings"], time.perf_counter()
    torch.manual_seed(settings["seed"])
    model = ModelConfig()
    clip = load_clip(model.name, model.pretrained)
    train = Pairs(data, "train", clip.image_size[0])
    # More processes would only share the same cores: as many trials run at once as there are cores.
    loader = DataLoader(train, batch_size, shuffle=True)
    published = Published(
        clip, _prompts(model, train), loss=settings["loss"], beta=settings["beta"],
        kl_weight=settings["kl_weight"], learning_rate=settings["learning_rate"],
        steps=steps_of(len(train), batch_size, settings["epochs"]),
    )  # fmt: skip
    for epoch in range(1, settings["epochs"] + 1):
        losses = [published.step(*batch) for batch in loader]
        measured = {"averaged": published.average} | (
            {"reference": published.reference} if epoch == 1 else {}
        )
        values = accuracies(published, measured, "validation", data, batch_size, model)
        with tempfile.TemporaryFile() as file:
            torch.save(published.state_dict(), file)
        if epoch == settings["epochs"]:
            everything = {
                "last": published.policy, "averaged": published.average, "reference": published.reference
            }  # fmt: skip
            values |= accuracies(published, everything, "test", data, batch_size, model)
        tune.report(
            {
                "epoch": epoch, "loss": sum(losses) / len(losses), "accuracy": values,
                "wall_s": time.perf_counter() - began, "settings": settings,
            }
        )  # fmt: skip


@torch.no_grad()
def accuracies(
    published: Published, models: Mapping[str, nn.Module], split: str, data: DataConfig, batch_size: int,
    model: ModelConfig,
) -> dict[str, float]:  # fmt: skip
    """Share correct on clean and attacked pictures of seen and held-out classes, by each model."""
    values: dict[str, float] = {}
    for group in GROUPS:
        pairs = Pairs(data, f"{split}/{group}", published.side)
        tokens_CL = published.tokens_of(_prompts(model, pairs))
        correct = {(name, kind): 0 for name in models for kind in ("clean", "attacked")}
        for clean, attacked, labels, _ in DataLoader(pairs, batch_size):
            for name, one in models.items():
                predicted = published.logps(one, torch.cat([clean, attacked]), tokens_CL).argmax(1)
                for kind, classes in zip(("clean", "attacked"), predicted.chunk(2), strict=True):
                    correct[name, kind] += int((classes == labels).sum())
        values |= {f"{split}/{kind}/{group} {n}": c / len(pairs) for (n, kind), c in correct.items()}
    return values


def _prompts(model: ModelConfig, pairs: Pairs) -> list[str]:
    return [model.prompt.format(pairs.classes[c]) for c in pairs.candidates]


def main(
    settings: tyro.conf.Positional[Path], *, report: Path = Path("report.json"), concurrency: int = 2,
    train_pictures: int = 1024, eval_pictures: int = 384, batch_size: int = 64,
) -> None:  # fmt: skip
    """Runs every one of the settings.

    Args:
        settings: a JSON list of settings.
        report: where the last report of every trial goes.
        concurrency: trials at once [count].
        train_pictures: pairs [count].
        eval_pictures: pictures of each evaluation set [count].
        batch_size: pairs of a step [count].
    """
    chosen = json.loads(settings.read_text())
    data = DataConfig(train_pictures=train_pictures, eval_pictures=eval_pictures)
    init("local", include_dashboard=False, logging_level=logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="clippo-published-") as storage:
        tuner = tune.Tuner(
            tune.with_resources(partial(trial, data=data, batch_size=batch_size), {"cpu": 1.0}),
            param_space={"settings": tune.grid_search(chosen)},
            tune_config=tune.TuneConfig(max_concurrent_trials=concurrency, reuse_actors=True),
            run_config=tune.RunConfig(storage_path=storage, verbose=1),
        )
        results = tuner.fit()
    if results.errors:
        raise SystemExit(f"{len(results.errors)} of {len(chosen)} trials failed: {results.errors[0]}")
    last = [results[i].metrics or {} for i in range(len(results))]
    keys = ("epoch", "loss", "accuracy", "wall_s", "settings")
    report.write_text(json.dumps([{k: reported[k] for k in keys} for reported in last], indent=1))


if __name__ == "__main__":
    program(main, __doc__)
