"""The lines that load a tuned model say what open_clip would otherwise get wrong."""

import dataclasses
from pathlib import Path

import open_clip
import pytest
from open_clip import OPENAI_DATASET_MEAN
from open_clip.transform import PreprocessCfg
from safetensors.torch import save_file

from clippo import demo
from clippo.errors import ModelError
from clippo.model import load_clip
from clippo.model.usage import metadata_of, usage, wanted_by


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


def test_a_file_says_what_its_weights_want(tmp_path: Path) -> None:
    taken = dataclasses.asdict(PreprocessCfg(mean=(0.5, 0.5, 0.5), resize_mode="squash"))
    state = load_clip(demo.MODEL_NAME).model.state_dict()
    weights = {name: w.contiguous() for name, w in state.items()}
    file = str(tmp_path / "tuned.safetensors")
    save_file(weights, file, metadata_of(demo.MODEL_NAME, None, taken))
    clip = load_clip(demo.MODEL_NAME, file)
    assert clip.normalized.mean.flatten().tolist() == [127.5] * 3, "without a flag"
    assert open_clip.get_model_preprocess_cfg(clip.model)["resize_mode"] == "squash"
    assert "image_resize_mode='squash'" in usage(demo.MODEL_NAME, file, "again.safetensors")
    save_file(weights, file, metadata_of("ViT-B-32", "openai", taken))
    with pytest.raises(ModelError, match=r"has weights of ViT-B-32-quickgelu, not of ViT-B-32; name that"):
        load_clip("ViT-B-32", file)
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    assert wanted_by(str(tmp_path / "bad.safetensors")) == ("", {})
    save_file(weights, file, {"architecture": "clip", "preprocessing": "none"})
    assert wanted_by(file) == ("", {}), "of another program"


def test_any_path_is_one_string() -> None:
    compile(usage("ViT-B-32", None, 'my "best"\\model\n.safetensors'), "usage", "exec")
