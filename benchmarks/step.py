"""One optimizer step: each cut of clippo beside the procedure as published (published.py).

A step of clippo is all that its loop does for one batch: fetching it from the prepared set, forward, loss,
backward, optimizer, moving average. ViT-B-32 with random weights, since weights do not change the time.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import default_collate

from benchmarks.common import (
    RESULTS,
    TINY,
    Line,
    Precision,
    Spread,
    alternate,
    data_of,
    finish,
    load,
    opened,
    prepared_folder,
    program,
    random_model,
    ratios,
    results_folder,
    seconds_of,
    the_console,
    the_device,
)  # fmt: skip
from benchmarks.published import Pairs as PublishedPairs
from benchmarks.published import Published
from clippo.config import DataConfig, ModelConfig, TrainConfig
from clippo.model import BetaAverage, ClipModel, load_clip, policy_of
from clippo.train.batches import Pairs, epoch_batches
from clippo.train.step import Batch, Step, TrialSettings

PUBLISHED, SHORT = "published", "published, prompts padded to the longest"
MANY = 1_000_000  # steps that an average is made for
SETTINGS = TrialSettings(loss="dpo", beta=1.0, kl_weight=1.0, learning_rate=2e-5, epochs=1, seed=0)


@dataclass(frozen=True)
class Cut:
    """What is trained, in which precision, and how many times as fast it should be with 16 pairs."""

    trainable: str
    precision: Precision
    goal: float
    compile: bool = False

    def __str__(self) -> str:
        return f"{self.trainable} {self.precision}" + (" compiled" if self.compile else "")


CUTS = (
    Cut("image", "fp32", 5),
    Cut("image", "bf16", 12),
    Cut("last:4", "bf16", 30),
    Cut("transform", "fp32", 2000),
)
GOALS_ARE_FOR = 16  # pairs


class Ours:
    """The steps of a trial, as ``clippo.train.loop`` makes them."""

    def __init__(self, cut: Cut, clip: ClipModel, model: ModelConfig, folder: Path, batch_size: int) -> None:
        device = the_device()
        _, prepared, frozen = opened(folder, model, clip)
        settings = SETTINGS
        if cut.trainable == "transform":
            settings = dataclasses.replace(settings, orthogonality=0.1)
        config = TrainConfig(batch_size=batch_size, precision=cut.precision, compile=cut.compile)
        self._policy = policy_of(clip, cut.trainable).to(device).eval()
        self._average = BetaAverage(self._policy.trainable_weights(), MANY, config.average_beta)
        pairs = Pairs.of(prepared, frozen)
        self._step = Step(self._policy, frozen, settings, config, pairs.captions, device)
        self._batches = _endless(pairs, batch_size, device)

    def __call__(self) -> None:
        values = self._step(next(self._batches), SETTINGS.learning_rate)
        self._average.update(self._policy.trainable_weights())
        assert all(math.isfinite(value.item()) for value in values)


def _endless(pairs: Pairs, batch_size: int, device: torch.device) -> Iterator[Batch]:
    epoch = 0
    while True:
        yield from epoch_batches(pairs, batch_size, 0, epoch, 0, 1, device)
        epoch += 1


def main(
    *, pairs: int = 16, rounds: int = 5, prompts: int = 100, model: str = "ViT-B-32", threads: int = 2,
    compile: bool = False, smoke: bool = False, results: Path = RESULTS,
) -> None:  # fmt: skip
    """Times one step.

    Args:
        pairs: pairs of a batch [count].
        rounds: times that every variant is measured, in turn [count].
        prompts: classes, one prompt each [count].
        model: an open_clip ViT; it gets random weights.
        threads: threads of torch, the same for all variants [count].
        compile: compare clippo with torch.compile to clippo without instead, compilation apart.
        smoke: tiny, to see that the program works.
        results: folder of the JSON.
    """
    if smoke:
        pairs, rounds, prompts, model, threads = 2, 2, 6, TINY, 1
    console, load_before, device = the_console(), load(), the_device()
    torch.set_num_threads(threads)
    cuts = CUTS[:2] if compile else CUTS
    at_least = 0.05 if smoke else 1.0
    with tempfile.TemporaryDirectory(prefix="clippo-benchmark-") as temporary:
        folder = Path(temporary)
        # Or only the first run on a machine would compile.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled")
        config, data = random_model(model, folder), data_of(pairs, prompts=prompts)
        clip = load_clip(config.name, config.pretrained)
        ours: dict[str, Callable[[], object]] = {}
        for cut in cuts:
            its_model = dataclasses.replace(config, trainable=cut.trainable)
            its_folder = prepared_folder(data, its_model, folder)
            ours[str(cut)] = Ours(cut, clip, its_model, its_folder, pairs)
            if compile:
                compiled = dataclasses.replace(cut, compile=True)
                ours[str(compiled)] = Ours(compiled, clip, its_model, its_folder, pairs)
        runs = ours if compile else _published_steps(clip, config.prompt, data, device) | ours
        # The first step of a kind pays for memory, for kernels that are chosen, and for compilation.
        first = {name: seconds_of(run, device) for name, run in runs.items()}
        for name, spent in first.items():
            console.print(f"first step  {name}: {spent:.4g} s", highlight=False)
        measured = {name: partial(seconds_of, run, device, at_least=at_least) for name, run in runs.items()}
        seconds = alternate(measured, rounds, console)
    lines = [Line(f"{name}, one step", Spread.of(times), "s") for name, times in seconds.items()]
    lines += _compiled_lines(seconds, first) if compile else _ratio_lines(seconds, pairs)
    settings = {"model": model, "pairs": pairs, "prompts": prompts, "rounds": rounds}
    finish(
        "compile" if compile else f"step-{pairs}", lines, results_folder(results, smoke), console,
        settings=settings, load_before=load_before, seconds=seconds, first_step_seconds=first,
    )  # fmt: skip


def _published_steps(
    clip: ClipModel, prompt: str, data: DataConfig, device: torch.device
) -> dict[str, Callable[[], object]]:
    """The published procedure with prompts as open_clip pads them and with shorter ones; one model."""
    pairs = PublishedPairs(data, "train", clip.image_size[0])
    clean, attacked, chosen, rejected = default_collate([pairs[i] for i in range(len(pairs))])
    published = Published(
        clip, [prompt.format(name) for name in pairs.names], loss="dpo",
        beta=1.0, kl_weight=1.0, learning_rate=SETTINGS.learning_rate, steps=MANY, device=device,
    )  # fmt: skip
    step = partial(published.step, clean, attacked, chosen.to(device), rejected.to(device))
    return {PUBLISHED: step, SHORT: partial(step, tokens_CL=published.padded_to_the_longest())}


def _ratio_lines(seconds: dict[str, list[float]], pairs: int) -> list[Line]:
    lines = []
    for published in (PUBLISHED, SHORT):
        for cut in CUTS:
            goal = cut.goal if published == PUBLISHED and pairs == GOALS_ARE_FOR else None
            ratio = Spread.of(ratios(seconds[published], seconds[str(cut)]))
            lines.append(Line(f"{published} / {cut}", ratio, "x", goal))
    return lines


def _compiled_lines(seconds: dict[str, list[float]], first: dict[str, float]) -> list[Line]:
    lines = []
    for cut in CUTS[:2]:
        compiled = str(dataclasses.replace(cut, compile=True))
        gain = Spread.of(ratios(seconds[str(cut)], seconds[compiled]))
        lines.append(Line(f"{cut} / {compiled}", gain, "x"))
        lines.append(Line(f"{compiled}, first step with compilation", Spread.of([first[compiled]]), "s"))
    return lines


if __name__ == "__main__":
    program(main, __doc__)
