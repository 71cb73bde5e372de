"""What is computed once per sweep gives the training that computing it at every step would give."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clippo.config import ModelConfig, TrainConfig
from clippo.losses import kl_reference_to_policy, preference_loss
from clippo.model import ClipModel, TowerPolicy, load_clip
from clippo.prepared import Location, PreparedSet, open_prepared, prepare
from clippo.train import FileCheckpoints, TrialSettings, fit
from clippo.train.batches import Pairs, epoch_batches
from clippo.train.step import Frozen, class_logps, pick
from tests.conftest import SMALL

Curves = dict[str, list[float]]
"""Means over each epoch, of the loss and of its KL term."""

CONFIG = TrainConfig(batch_size=16, precision="fp32", alphas=())
SETTINGS = TrialSettings(loss="kto", beta=0.3, kl_weight=1.0, learning_rate=2e-4, epochs=2, seed=3)


@pytest.fixture(scope="module")
def pixel_set(small_cache: Path) -> PreparedSet:
    """The pictures of ``small_set`` as pixels."""
    model = ModelConfig(trainable="image")
    return open_prepared(small_cache / prepare("typographic", SMALL, model, Location(small_cache)))


class FromPixels(TowerPolicy):
    """Computes what lies before the cut anew at every step, and rounds it as it would be stored."""

    def embed(self, x: Tensor) -> Tensor:
        return super().embed(self.frozen(x))


def fitted(
    clip: ClipModel, trainable: str, prepared: PreparedSet, frozen: Frozen, folder: Path,
    policy: type[TowerPolicy] = TowerPolicy,
) -> Curves:  # fmt: skip
    reports: list[dict[str, Any]] = []
    fit(
        policy(clip, trainable), prepared, frozen, SETTINGS, CONFIG,
        report=reports.append, checkpoints=FileCheckpoints(folder),
    )  # fmt: skip
    return {name: [r["metrics"][name] for r in reports] for name in ("loss", "kl")}


def live(clip: ClipModel, trainable: str, pixels: PreparedSet, frozen: Frozen) -> Curves:
    """The same training from pixels, with reference and text features computed anew at every step."""
    policy, reference = TowerPolicy(clip, trainable).eval(), load_clip("clippo-demo").model.eval()
    optimizer = torch.optim.AdamW(policy.trainable_weights().values(), lr=1.0, weight_decay=0.0)
    pairs, cpu = Pairs.of(pixels, frozen), torch.device("cpu")
    prompts = [f"a photo of a {pixels.classes[c]}" for c in pairs.captions]
    curves: Curves = {"loss": [], "kl": []}
    step = 0
    for epoch in range(SETTINGS.epochs):
        losses, kls = [], []
        for batch in epoch_batches(pairs, CONFIG.batch_size, SETTINGS.seed, epoch, 0, 1, cpu):
            x = clip.normalized(batch.inputs)
            with torch.no_grad():
                text = clip.text_features(prompts)
                theirs = class_logps(F.normalize(reference.encode_image(x), dim=-1), text, clip.logit_scale)
            ours = class_logps(
                F.normalize(policy.visual(x).float(), dim=-1), text, clip.logit_scale
            )  # the whole tower, not its stages
            (clean, attacked), (theirs_clean, theirs_attacked) = ours.chunk(2), theirs.chunk(2)
            kl = kl_reference_to_policy(clean, theirs_clean)
            four = [pick(t, c) for t in (attacked, theirs_attacked) for c in (batch.chosen, batch.rejected)]
            preference = preference_loss(SETTINGS.loss, *four, beta=0.3, kl_baseline=kl.detach())
            loss = preference + SETTINGS.kl_weight * kl
            optimizer.param_groups[0]["lr"] = (
                0.5 * SETTINGS.learning_rate * (1 + math.cos(math.pi * step / 20))
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            kls.append(kl.item())
            step += 1
        curves["loss"].append(sum(losses) / len(losses))
        curves["kl"].append(sum(kls) / len(kls))
    return curves


def assert_alike(found: Curves, expected: Curves, *, loss: float, kl: float) -> None:
    """Equal up to these shares. KL is a small part of the loss, and what a wrong reference would change."""
    assert found["loss"] == pytest.approx(expected["loss"], rel=loss)
    assert found["kl"] == pytest.approx(expected["kl"], rel=kl)


def test_cached_and_live_reference_give_the_same_loss_curve(
    clip: ClipModel, pixel_set: PreparedSet, frozen: Frozen, tmp_path: Path
) -> None:
    expected = live(clip, "image", pixel_set, frozen)
    assert expected["loss"][1] < expected["loss"][0]
    assert_alike(fitted(clip, "image", pixel_set, frozen, tmp_path), expected, loss=1e-3, kl=1e-2)


def test_cached_activations_train_as_pixels_do(
    clip: ClipModel, pixel_set: PreparedSet, small_set: PreparedSet, frozen: Frozen, tmp_path: Path
) -> None:
    expected = live(clip, "last:2", pixel_set, frozen)
    # Activations are stored with bfloat16's three digits.
    assert_alike(fitted(clip, "last:2", small_set, frozen, tmp_path), expected, loss=0.02, kl=0.1)


def test_cached_activations_are_those_of_every_step(
    clip: ClipModel, small_cache: Path, small_set: PreparedSet, frozen: Frozen, tmp_path: Path
) -> None:
    model = ModelConfig(trainable="image")
    pixels = open_prepared(small_cache / prepare("typographic", SMALL, model, Location(small_cache)))
    for name, data in pixels.train.items():
        data.rows.reference = small_set.train[name].rows.reference  # of the rounded activations
    live = fitted(clip, "last:2", pixels, frozen, tmp_path / "live", FromPixels)
    cached = fitted(clip, "last:2", small_set, frozen, tmp_path / "cached")
    assert_alike(cached, live, loss=1e-4, kl=1e-3)


def test_both_sets_hold_the_same_pictures(
    pixel_set: PreparedSet, small_set: PreparedSet, clip: ClipModel
) -> None:
    for name, data in pixel_set.train.items():
        everything = range(len(data.rows))
        stored = TowerPolicy(clip, "last:2").eval().frozen(data.rows.inputs(everything))
        cached = small_set.train[name].rows.inputs(everything)
        torch.testing.assert_close(stored.float(), cached.float(), atol=0.02, rtol=0.02)
