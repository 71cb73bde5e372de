"""The linear transform: the identity at the start, and powers that turn it up and down."""

import json
from pathlib import Path

import open_clip
import pytest
import torch

from clippo.model import ClipModel, load_clip, policy_of
from clippo.model.transform import MATRIX, powered


def random_matrix(seed: int = 0, size: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.eye(size) + 0.2 * torch.randn(size, size, generator=generator)


def cosines(matrix: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.nn.functional.normalize(torch.randn(9, 16, generator=generator), dim=-1) for _ in "ab")
    mapped = [torch.nn.functional.normalize(x @ matrix.T, dim=-1) for x in (a, b)]
    return mapped[0] @ mapped[1].T


def test_both_ends_are_exact() -> None:
    w = random_matrix()
    assert torch.equal(powered(w, 0), torch.eye(16))
    assert torch.equal(powered(w, 1), w)


@pytest.mark.parametrize("t", [-1.0, 0.5, 1.5, 2.0])
def test_powers_have_the_cosines_of_the_published_form(t: float) -> None:
    w = random_matrix()
    u, s, vh = torch.linalg.svd(w.double())
    published = ((u * s.pow(t)) @ vh).float()
    torch.testing.assert_close(cosines(powered(w, t)), cosines(published), atol=1e-5, rtol=1e-4)


def test_powers_add() -> None:
    w = powered(random_matrix(), 1 + 1e-9)  # symmetric
    torch.testing.assert_close(powered(w, 0.5) @ powered(w, 0.5), w, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(powered(w, 1.0) @ powered(w, -1.0), torch.eye(16), atol=1e-3, rtol=0)


def test_it_starts_as_the_untouched_model(clip: ClipModel) -> None:
    policy = policy_of(clip, "transform")
    pixels = torch.randint(0, 256, (3, 96, 96, 3), dtype=torch.uint8)
    text = clip.text_features(["a photo of a cat", "a photo of a dog"])
    with torch.no_grad():
        image_BD, text_CD = policy(policy.frozen(pixels), text)
        whole = clip.model.encode_image(clip.normalized(pixels), normalize=True)
    torch.testing.assert_close(image_BD, whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(text_CD, text, atol=1e-6, rtol=1e-5)
    assert set(policy.trainable_weights()) == {MATRIX}


def test_a_tower_that_gives_its_tokens_too(tmp_path: Path) -> None:
    text = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
    coca = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1, "output_tokens": True},
        "text_cfg": text | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": text,
        "custom_text": True,
    }
    (tmp_path / "clippo-test-coca.json").write_text(json.dumps(coca))
    open_clip.add_model_config(tmp_path)
    model = load_clip("clippo-test-coca")
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        whole = model.model.encode_image(model.normalized(pixels), normalize=True)
    torch.testing.assert_close(policy_of(model, "transform").frozen(pixels), whole, atol=1e-6, rtol=1e-5)


def test_the_penalty_is_zero_at_the_start_and_has_a_gradient_there(clip: ClipModel) -> None:
    policy = policy_of(clip, "transform")
    assert policy.penalty().item() == 0
    policy.penalty().backward()
    matrix = policy.trainable_weights()[MATRIX]
    assert matrix.grad is not None
    assert torch.isfinite(matrix.grad).all()
    with torch.no_grad():
        matrix.mul_(1.1)
    assert policy.penalty().item() == pytest.approx(0.21 * len(matrix) ** 0.5, rel=1e-4)
