"""The cut: what is frozen and what is trained add up to the tower, for any model and any cut."""

import copy
import itertools
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from clippo import demo
from clippo.errors import ConfigError, ModelError
from clippo.model import ClipModel, TowerPolicy, load_clip, policy_of, stages
from clippo.model.stages import tower_stages
from clippo.model.towers import check_name
from clippo.prepared.build import weights_digest

CUTS = ["image", "last:1", "last:2", "last:3", "last:4"]


@pytest.fixture(scope="module")
def vit() -> ClipModel:
    return load_clip("ViT-B-32-256")


TIMM = {"embed_dim": 64, "vision_cfg": {"timm_model_pretrained": False, "image_size": 224}}
TIMM_TOWERS = {
    "clippo-test-vit": {
        "timm_model_name": "vit_tiny_patch16_224",
        "timm_pool": "token",
        "timm_proj": "linear",
    },
    "clippo-test-convnext": {"timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": "linear"},
    "clippo-test-regnet": {"timm_model_name": "regnety_002", "timm_pool": "avg", "timm_proj": "linear"},
}


@pytest.fixture(scope="module")
def timm_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ClipModel]:
    """Small models with the kinds of timm towers that open_clip builds, with random weights."""
    folder = tmp_path_factory.mktemp("configs")
    text = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
    for name, tower in TIMM_TOWERS.items():
        config = TIMM | {"vision_cfg": TIMM["vision_cfg"] | tower, "text_cfg": text}
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return {name: load_clip(name) for name in TIMM_TOWERS}


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
    policy = TowerPolicy(clip, trainable).eval()
    with torch.no_grad():
        whole = clip.model.encode_image(clip.normalized(pixels), normalize=True)
        stored = policy.frozen(pixels)
        assert stored.dtype == (torch.uint8 if trainable == "image" else torch.bfloat16)
        # One rounding to bfloat16 at the cut.
        close = {"atol": 1e-5, "rtol": 1e-4} if trainable == "image" else {"atol": 0.01, "rtol": 0}
        torch.testing.assert_close(policy.embed(stored), whole, **close)
        # Without it, the stages are the tower.
        x = clip.normalized(pixels)
        for stage in tower_stages(clip.model.visual):
            x = stage.apply(x)
        torch.testing.assert_close(torch.nn.functional.normalize(x, dim=-1), whole, atol=1e-5, rtol=1e-4)


def test_what_is_trained_grows_with_the_cut_and_ends_with_the_whole_tower(clip: ClipModel) -> None:
    trained = [
        set(policy_of(clip, t).trainable_weights()) for t in ("last:1", "last:2", "last:3", "last:4", "image")
    ]
    assert all(a < b for a, b in itertools.pairwise(trained))
    assert trained[-1] == {n for n, _ in clip.model.visual.named_parameters()}
    assert trained[0] == {n for n in trained[-1] if n.startswith(("layer4.", "attnpool."))}


def test_only_what_is_trained_gets_a_gradient(vit: ClipModel) -> None:
    policy = TowerPolicy(vit, "last:2")
    policy.embed(policy.frozen(pixels_of(vit))).sum().backward()
    with_gradient = {n for n, p in policy.visual.named_parameters() if p.grad is not None}
    assert with_gradient == set(policy.trainable_weights())
    blocks = {n.split(".")[2] for n in with_gradient if n.startswith("transformer.")}
    assert blocks == {"10", "11"}
    assert {"proj", "ln_post.weight"} <= with_gradient


def test_a_policy_is_a_copy(clip: ClipModel) -> None:
    policy = policy_of(clip, "image")
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
    with pytest.raises(ModelError, match="no file and no pretrained tag of clippo-demo"):
        load_clip("clippo-demo", "/nowhere/weights.safetensors")


@pytest.mark.parametrize("trainable", ["last:0", "last:5", "last:x", "text", "last"])
def test_a_cut_that_does_not_exist_names_the_bound(clip: ClipModel, trainable: str) -> None:
    with pytest.raises(ConfigError, match="K from 1 to 4"):
        policy_of(clip, trainable)


@pytest.mark.parametrize("name", TIMM_TOWERS)
def test_timm_towers(name: str, timm_models: dict[str, ClipModel]) -> None:
    clip = timm_models[name]
    pixels = pixels_of(clip)
    x = clip.normalized(pixels)
    with torch.no_grad():
        whole = clip.model.encode_image(x, normalize=True)
        for stage in tower_stages(clip.model.visual):
            x = stage.apply(x)
        torch.testing.assert_close(torch.nn.functional.normalize(x, dim=-1), whole, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(policy_of(clip, "image").eval().embed(pixels), whole, atol=1e-5, rtol=1e-4)
    assert set(policy_of(clip, "image").trainable_weights()) == {
        n for n, _ in clip.model.visual.named_parameters()
    }
    if name == "clippo-test-regnet":  # a tower whose inside is not known
        with pytest.raises(ConfigError, match="it must be image or transform for this model"):
            policy_of(clip, "last:1")
        return
    policy = TowerPolicy(clip, "last:2")
    policy.embed(policy.frozen(pixels)).sum().backward()
    assert all(p.grad is not None for p in policy.trainable_weights().values())
    assert 0 < len(policy.trainable_weights()) < len(list(clip.model.visual.named_parameters()))


@pytest.mark.parametrize("place", ["local-dir", "hf-hub"])
def test_a_model_from_a_folder_or_the_hub(
    place: str, clip: ClipModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, name = tmp_path, f"local-dir:{tmp_path}"
    if place == "hf-hub":  # as the hub's own client keeps what it has fetched, on a machine without network
        kept, commit = tmp_path / "models--some--clip", "0" * 40
        folder, name = kept / "snapshots" / commit, "hf-hub:some/clip"
        folder.mkdir(parents=True)
        (kept / "refs").mkdir()
        (kept / "refs" / "main").write_text(commit)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = {"model_cfg": demo.MODEL_CONFIG, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    weights = {name: w.contiguous() for name, w in clip.model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    again = load_clip(name)
    pixels = pixels_of(clip)
    with torch.no_grad():
        expected = policy_of(clip, "image").eval().embed(pixels)
        torch.testing.assert_close(policy_of(again, "image").eval().embed(pixels), expected)


def test_the_attention_pooling_has_the_gradients_of_open_clips(clip: ClipModel) -> None:
    x = torch.randn(5, 512, 3, 3, generator=torch.Generator().manual_seed(1))
    pool = copy.deepcopy(clip.model.visual).requires_grad_(True)
    (theirs,) = (pool.attnpool(x),)
    theirs.square().sum().backward()
    expected = {n: p.grad for n, p in pool.attnpool.named_parameters()}
    pool.zero_grad()
    ours = stages._pooled_resnet(pool, x)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    ours.square().sum().backward()
    for name, parameter in pool.attnpool.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=2e-3, rtol=1e-3)


def test_convolutions_with_their_norms_have_the_gradients_of_open_clips(clip: ClipModel) -> None:
    """Both in float64, where only another formula could differ."""
    visual = copy.deepcopy(clip.model.visual).double().requires_grad_(True)
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(x)))))
    theirs.square().mean().backward()
    expected = {n: p.grad for n, p in visual.named_parameters() if p.grad is not None}
    visual.zero_grad()
    ours = stages._stem(visual, x)
    for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        ours = stages._layer(layer, ours)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    ours.square().mean().backward()
    found = {n: p.grad for n, p in visual.named_parameters() if p.grad is not None}
    assert len(found) == 19 * 3
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-9, rtol=1e-7)


def test_of_every_number_the_part_above_zero_is_left() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    numbers = every[~every.isnan()]
    mixed = numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))]
    pictures = mixed[: 8 * 3 * 52 * 52].view(8, 52, 52, 3).permute(0, 3, 1, 2)  # channels last
    expected = pictures.relu()
    with torch.no_grad():
        assert torch.equal(stages._rectified(numbers.clone()), numbers.relu())
        assert torch.equal(stages._rectified(pictures), expected)
    assert torch.equal(pictures, expected), "in place"


def test_where_gradients_are_wanted_what_is_below_zero_has_none() -> None:
    weights = torch.tensor([-2.0, -0.5, 0.5, 2.0], dtype=torch.bfloat16, requires_grad=True)
    stages._rectified(weights * 3).sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [0, 0, 3, 3]


def test_random_weights_are_the_same_in_every_process(vit: ClipModel) -> None:
    again = load_clip("ViT-B-32-256")
    assert weights_digest(again) == weights_digest(vit)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_from_a_file(suffix: str, clip: ClipModel, tmp_path: Path) -> None:
    tuned = {name: w.clone().contiguous() for name, w in clip.model.state_dict().items()}
    tuned["text_projection"] *= 2
    path = tmp_path / f"tuned.{suffix}"
    save_file(tuned, path) if suffix == "safetensors" else torch.save(tuned, path)
    loaded = load_clip("clippo-demo", str(path)).model.state_dict()
    assert loaded.keys() == tuned.keys()
    assert all(torch.equal(loaded[name], tuned[name]) for name in tuned)


def test_weights_that_are_asked_for_must_be_there(tmp_path: Path) -> None:
    config = {"model_cfg": demo.MODEL_CONFIG, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot load"):
        load_clip(f"local-dir:{tmp_path}")
    with pytest.raises(ModelError, match="brings its own weights"):
        load_clip(f"local-dir:{tmp_path}", "tuned.safetensors")
    (tmp_path / "weights.pt").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="the file is damaged or holds more than weights"):
        load_clip("clippo-demo", str(tmp_path / "weights.pt"))


@pytest.mark.parametrize(
    ("name", "pretrained", "complaint"),
    [
        ("vit-b-32", None, "near matches: ViT-B-32"),
        ("ViT-B/32", None, "near matches: .*ViT-B-32"),
        ("zzz", None, "near matches: none"),
        ("ViT-B-32", "openia", "its tags: openai, "),
        ("ViT-B-32", "/tmp", "is no file and no pretrained tag"),
        ("local-dir:/nowhere", None, "'/nowhere' holds no open_clip_config.json"),
        ("hub:laion/x", None, "write hf-hub:ORG/MODEL, local-dir:FOLDER or a name of open_clip"),
    ],
)
def test_what_a_dry_run_finds_of_a_model(name: str, pretrained: str | None, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint) as caught:
        check_name(name, pretrained)
    assert "\n" not in str(caught.value)
