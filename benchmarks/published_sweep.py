"""Given settings, each tried with the published procedure (published.py) through Ray Tune.

    python -m benchmarks.published_sweep settings.json --report report.json

``settings.json`` is a list of objects with loss, beta, kl_weight, learning_rate, epochs and seed.

A trial trains, measures the averaged weights on validation pictures after every epoch (and the reference
after the first), writes a checkpoint, and at the end measures last weights, average and reference on test
pictures: as the published code does, which then measures the tuning pictures too. Its pictures are clean and
attacked; the other sets of clippo are measured for the averaged weights alone, or not at all with
``--clean-and-attacked``. Every model is run whole on every picture that it is measured on, and pictures are
composed, resized and attacked when they are asked for.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from ray import init, tune
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.common import program
from benchmarks.published import Measured, Pairs, Published, steps_of
from clippo.config import DataConfig, ModelConfig
from clippo.model import load_clip
from clippo.tasks.typographic import KINDS

GROUPS = ("seen", "held_out")
AVERAGED, N_PUBLISHED = "averaged", 2  # the model that stands for the trial; kinds: clean and attacked


def trial(config: Mapping[str, Any], *, data: DataConfig, batch_size: int, clean_and_attacked: bool) -> None:
    """One trial, in one thread of one process, as a trial of clippo."""
    torch.set_num_threads(1)
    settings, began = config["settings"], time.perf_counter()
    torch.manual_seed(settings["seed"])
    model = ModelConfig()
    clip = load_clip(model.name, model.pretrained)
    train = Pairs(data, "train", clip.image_size[0])
    # More processes would only share the same cores: as many trials run at once as there are cores.
    loader = DataLoader(train, batch_size, shuffle=True)
    prompts = [model.prompt.format(name) for name in train.names]
    published = Published(
        clip, prompts, loss=settings["loss"], beta=settings["beta"],
        kl_weight=settings["kl_weight"], learning_rate=settings["learning_rate"],
        steps=steps_of(len(train), batch_size, settings["epochs"]),
    )  # fmt: skip
    measure = partial(accuracies, published, data=data, batch_size=batch_size, model=model)
    kinds = {split: names[:N_PUBLISHED] if clean_and_attacked else names for split, names in KINDS.items()}
    for epoch in range(1, settings["epochs"] + 1):
        losses = [published.step(*batch) for batch in loader]
        measured = {AVERAGED: published.average} | ({"reference": published.reference} if epoch == 1 else {})
        values = measure(measured, "validation", kinds["validation"])
        with tempfile.TemporaryFile() as file:
            torch.save(published.state_dict(), file)
        if epoch == settings["epochs"]:
            everything = {
                "last": published.policy, AVERAGED: published.average, "reference": published.reference
            }  # fmt: skip
            values |= measure(everything, "test", kinds["test"])
        tune.report(
            {
                "epoch": epoch, "loss": sum(losses) / len(losses), "accuracy": values,
                "wall_s": time.perf_counter() - began, "settings": settings,
            }
        )  # fmt: skip


@torch.no_grad()
def accuracies(
    published: Published, models: Mapping[str, nn.Module], split: str, kinds: Sequence[str], *,
    data: DataConfig, batch_size: int, model: ModelConfig,
) -> dict[str, float]:  # fmt: skip
    """Share correct on the sets of some kinds, of seen and held-out classes.

    Each model on clean and attacked pictures, as published; the average on the others, too.
    """
    values: dict[str, float] = {}
    for group in GROUPS:
        measured = Measured(data, f"{split}/{group}", published.side, len(kinds))
        tokens_CL = published.tokens_of([model.prompt.format(name) for name in measured.names])
        correct = Counter[tuple[str, str]]()
        for sets in DataLoader(measured, batch_size):
            for name, one in models.items():
                of_model = sets if name == AVERAGED else sets[:N_PUBLISHED]
                pictures, labels = (torch.cat(parts) for parts in zip(*of_model, strict=True))
                right = published.logps(one, pictures, tokens_CL).argmax(1) == labels
                for kind, of_kind in zip(kinds, right.chunk(len(of_model)), strict=False):
                    correct[name, kind] += int(of_kind.sum())
        values |= {f"{split}/{kind}/{group} {n}": c / len(measured) for (n, kind), c in correct.items()}
    return values


def main(
    settings: tyro.conf.Positional[Path], *, report: Path = Path("report.json"), concurrency: int = 2,
    train_pictures: int = 1024, eval_pictures: int = 384, batch_size: int = 64,
    clean_and_attacked: bool = False,
) -> None:  # fmt: skip
    """Runs every one of the settings.

    Args:
        settings: a JSON list of settings.
        report: where the last report of every trial goes.
        concurrency: trials at once [count].
        train_pictures: pairs [count].
        eval_pictures: pictures of each evaluation set [count].
        batch_size: pairs of a step [count].
        clean_and_attacked: these sets alone are measured, as in the published code, and no lone words, which
            our second objective needs, nor nonsense ones.
    """
    chosen = json.loads(settings.read_text())
    data = DataConfig(train_pictures=train_pictures, eval_pictures=eval_pictures)
    init("local", include_dashboard=False, logging_level=logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="clippo-published-") as storage:
        run = partial(trial, data=data, batch_size=batch_size, clean_and_attacked=clean_and_attacked)
        tuner = tune.Tuner(
            tune.with_resources(run, {"cpu": 1.0}),
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
