"""The cut: what is frozen and what is trained add up to the tower, for any model and any cut."""

import itertools

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from clippo.errors import ConfigError, ModelError
from clippo.model import ClipModel, Policy, load_clip

CUTS = ["image", "last:1", "last:2", "last:3", "last:4"]


@pytest.fixture(scope="module")
def vit() -> ClipModel:
    return load_clip("ViT-B-32-256")


def pixels_of(clip: ClipModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, *clip.image_size, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("trainable", CUTS)
@pytest.mark.parametrize("model", ["clip", "vit"])
def test_the_cut_does_not_change_the_embedding(
    model: str, trainable: str, request: pytest.FixtureRequest
) -> None:
    clip: ClipModel = request.getfixturevalue(model)
    pixels = pixels_of(clip)
    policy = Policy(clip, trainable).eval()
    with torch.no_grad():
        whole = clip.model.encode_image(clip.normalized(pixels), normalize=True)
        torch.testing.assert_close(policy(policy.frozen(pixels)), whole, atol=1e-5, rtol=1e-4)


def test_what_is_trained_grows_with_the_cut_and_ends_with_the_whole_tower(clip: ClipModel) -> None:
    trained = [
        set(Policy(clip, t).trainable_weights()) for t in ("last:1", "last:2", "last:3", "last:4", "image")
    ]
    assert all(a < b for a, b in itertools.pairwise(trained))
    assert trained[-1] == {n for n, _ in clip.model.visual.named_parameters()}
    assert trained[0] == {n for n in trained[-1] if n.startswith(("layer4.", "attnpool."))}


def test_only_what_is_trained_gets_a_gradient(vit: ClipModel) -> None:
    policy = Policy(vit, "last:2")
    policy(policy.frozen(pixels_of(vit))).sum().backward()
    with_gradient = {n for n, p in policy.visual.named_parameters() if p.grad is not None}
    assert with_gradient == set(policy.trainable_weights())
    blocks = {n.split(".")[2] for n in with_gradient if n.startswith("transformer.")}
    assert blocks == {"10", "11"}
    assert {"proj", "ln_post.weight"} <= with_gradient


def test_a_policy_is_a_copy(clip: ClipModel) -> None:
    policy = Policy(clip, "image")
    policy.load_weights({n: torch.zeros_like(w) for n, w in policy.trainable_weights().items()})
    assert all(p.abs().sum() > 0 for n, p in clip.model.visual.named_parameters() if n == "conv1.weight")


def test_pixels_are_what_open_clip_would_normalize(clip: ClipModel) -> None:
    image = Image.effect_noise((150, 120), 80).convert("RGB")
    _, _, preprocess = open_clip.create_model_and_transforms("clippo-demo")
    array = torch.from_numpy(np.asarray(clip.pixels(image)).copy())[None]
    torch.testing.assert_close(clip.normalized(array)[0], preprocess(image), atol=1e-5, rtol=1e-4)


def test_unknown_names_say_what_is_near() -> None:
    with pytest.raises(ModelError, match="ViT-B-32"):
        load_clip("ViT-B-23")
    with pytest.raises(ModelError, match="laion2b_s34b_b79k"):
        load_clip("ViT-B-32", "openia")
    with pytest.raises(ModelError, match="cannot load"):
        load_clip("clippo-demo", "/nowhere/weights.safetensors")


@pytest.mark.parametrize("trainable", ["last:0", "last:5", "last:x", "text", "last"])
def test_a_cut_that_does_not_exist_names_the_bound(clip: ClipModel, trainable: str) -> None:
    with pytest.raises(ConfigError, match="K from 1 to 4"):
        Policy(clip, trainable)
