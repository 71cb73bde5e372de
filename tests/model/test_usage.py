"""The lines that load a tuned model say what open_clip would otherwise get wrong."""

import pytest
from open_clip import OPENAI_DATASET_MEAN

from clippo.model.usage import usage


@pytest.mark.parametrize(
    ("name", "pretrained", "call"),
    [
        ("ViT-B-32", None, '"ViT-B-32", pretrained="m.safetensors"'),
        ("ViT-B-32", "openai", '"ViT-B-32-quickgelu", pretrained="m.safetensors"'),
        ("ViT-B-32", "laion2b_s34b_b79k", '"ViT-B-32", pretrained="m.safetensors"'),
        (
            "ViT-B-16-SigLIP",
            "webli",
            '"ViT-B-16-SigLIP", pretrained="m.safetensors", image_mean=(0.5, 0.5, 0.5), '
            "image_std=(0.5, 0.5, 0.5), image_resize_mode='squash'",
        ),
        ("hf-hub:org/name", None, '"local-dir:m.safetensors"'),
    ],
)
def test_what_the_weights_want_is_said(name: str, pretrained: str | None, call: str) -> None:
    lines = usage(name, pretrained, "m.safetensors").splitlines()
    assert lines == [
        "import open_clip",
        f"model, _, preprocess = open_clip.create_model_and_transforms({call})",
    ]


def test_a_loaded_models_own_preprocessing_goes_first() -> None:
    taken = {"size": (224, 224), "mean": OPENAI_DATASET_MEAN, "interpolation": "bilinear"}
    assert usage("ViT-B-32", None, "m.safetensors", taken).endswith(", image_interpolation='bilinear')")
    assert "image_" not in usage("ViT-B-32", None, "m.safetensors")


def test_any_path_is_one_string() -> None:
    compile(usage("ViT-B-32", None, 'my "best"\\model\n.safetensors'), "usage", "exec")
