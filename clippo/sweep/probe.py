"""Short real trials of a sweep, which tell how fast it is where they run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clippo.config import SweepConfig
from clippo.model import policy_of
from clippo.prepared import Location, prepare
from clippo.sweep.cost import Speed
from clippo.train import TrialSettings, fit
from clippo.train.shared import Shared, load_shared

STEPS = 8
PICTURES = (4, 32, 128)
"""Of an evaluation set, of one short trial after another. Of larger sets, which take longer to prepare, a
picture takes less time, with the bundled model up to a quarter; so an estimate is rather too long."""


def probes(config: SweepConfig) -> Iterator[Speed]:
    """Short trials on ever more pictures of the sweep; the first ones also warm the caches."""
    torch.set_num_threads(1)
    for pictures in PICTURES:
        yield _short_trial(config, pictures)


def _short_trial(config: SweepConfig, pictures: int) -> Speed:
    """An epoch of some steps; on CPUs, where time goes with the pairs, of few pairs each.

    Args:
        pictures: of each evaluation set.
    """
    search, on_gpu = config.search, config.gpus_per_worker > 0
    batch = -(-config.train.batch_size // max(1, config.min_workers))
    batch = batch if on_gpu else min(batch, pictures)
    data = replace(
        config.data,
        train_pictures=min(STEPS * batch, config.data.train_pictures),
        attacked_copies=1,
        eval_pictures=min(pictures, config.data.eval_pictures),
        top_k=1,  # few pictures have no deep top
        test_sets=(),
    )
    train = replace(config.train, batch_size=batch)
    loss = search.losses[0]
    settings = TrialSettings(
        loss=loss,
        beta=getattr(search, f"beta_{loss}", (None,))[0],
        kl_weight=search.kl_weight[0],
        learning_rate=search.learning_rate[0],
        epochs=1,
        seed=search.seed,
        pairs=next(iter(search.pairs), ""),
        orthogonality=search.orthogonality[0] if config.model.trainable == "transform" else None,
    )
    reports: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="clippo-doctor-") as folder:
        location = Location(Path(folder))
        ticks: list[float] = []  # the first when the model is loaded and the first picture is begun
        name = prepare(
            config.task, data, config.model, location,
            on_progress=lambda done, total: ticks.append(time.perf_counter()),
        )  # fmt: skip
        shared = Shared(model=config.model, train=train, prepared=name, location=location, on_gpu=on_gpu)
        clip, prepared, frozen = load_shared(shared)
        device = torch.device("cuda" if on_gpu else "cpu")
        fit(
            policy_of(clip, config.model.trainable), prepared, frozen, settings, train,
            report=reports.append, checkpoints=_Nowhere(), device=device,
        )  # fmt: skip
    metrics, pairs = reports[-1]["metrics"], len(prepared.pairs(settings.pairs).clean)
    measured = sum(len(evaluated.rows) for evaluated in prepared.evaluation)
    trained = sum(len(data.rows) for data in prepared.train.values())
    return Speed(
        pair=metrics["train_s"] / pairs,
        measured=metrics["eval_s"] / (2 * measured),
        prepared=(ticks[-1] - ticks[0]) / (trained + measured),
        device=torch.cuda.get_device_name() if on_gpu else "CPU",
    )


class _Nowhere:
    """Checkpoints that nobody needs."""

    def read(self, name: str) -> bytes | None:
        return None

    def write(self, name: str, data: bytes) -> None:
        pass
