"""What is exported is what was measured: open_clip loads it and gives the trial's own predictions."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from clippo import demo
from clippo.config import DataConfig, ModelConfig
from clippo.errors import ClippoError, ModelError
from clippo.export import CONFIG, OWN_LICENCE, _fold, _fold_into, _licence, export
from clippo.model import load_clip
from clippo.model.usage import wanted_by
from clippo.prepared import open_prepared
from clippo.results import ResultStore
from clippo.tasks import TypographicTask
from clippo.train.step import class_logps
from tests.conftest import ROOT, clippo, sweep

pytestmark = pytest.mark.timeout(900)

SETS = ("test/attacked/seen", "validation/clean/held_out")
VALIDATION = {"validation/clean/held_out"}


@pytest.fixture(scope="module")
def transform_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("transform") / "results"
    flags = ["--preset", "transform", "--results", str(results), "--name", "map", "--search.baselines"]
    done = sweep(*flags, "--trials", "1", "--epochs", "8", "8", "--precision", "fp32")
    assert done.returncode == 0, done.stdout + done.stderr
    return results


def counts_of_file(weights: Path) -> dict[str, tuple[int, int]]:
    """Correct and fooled of an exported file on the small sweeps' pictures, from pixels by open_clip."""
    demo.register()
    model, _, preprocess = open_clip.create_model_and_transforms(
        demo.MODEL_NAME, pretrained=str(weights), weights_only=True
    )
    model.eval()
    tokenizer = open_clip.get_tokenizer(demo.MODEL_NAME)
    task = TypographicTask(DataConfig(train_pictures=160, eval_pictures=24))
    found = {}
    for name in SETS:
        split, _, group = name.split("/")
        part = task.parts[f"{split}/{group}"]
        rows = [r for i in range(24) for r in task.rows(part, i, lambda image: image) if r.set_name == name]
        with torch.no_grad():
            text = model.encode_text(
                tokenizer([f"a photo of a {task.classes[c]}" for c in part.candidates]), normalize=True
            )
            image = model.encode_image(torch.stack([preprocess(r.image) for r in rows]), normalize=True)
        predicted = [part.candidates[i] for i in class_logps(image, text, 1.0).argmax(1).tolist()]
        correct = sum(p == r.label for p, r in zip(predicted, rows, strict=True))
        fooled = sum(p == r.attack_label for p, r in zip(predicted, rows, strict=True))
        found[name] = (correct, fooled)
    return found


def counts_in_store(store: ResultStore, sweep: str, trial: str, variant: str) -> dict[str, tuple[int, int]]:
    rows = [e for e in store.evals(sweep).to_pylist() if (e["trial_id"], e["variant"]) == (trial, variant)]
    last = max(e["epoch"] for e in rows)
    return {
        e["eval_set"]: (e["n_correct"], e["n_fooled"])
        for e in rows
        if e["eval_set"] in SETS and e["epoch"] == last
    }


def row_of(results: Path, trial_id: str) -> dict[str, Any]:
    [sweep] = ResultStore(str(results)).sweeps()
    return next(t for t in ResultStore(str(results)).trials(sweep).to_pylist() if t["trial_id"] == trial_id)


def assert_close(one: dict[str, tuple[int, int]], two: dict[str, tuple[int, int]]) -> None:
    """Trials measure from activations that were rounded to bfloat16, so one picture may tip over."""
    for name, (correct, fooled) in two.items():
        assert abs(correct - one[name][0]) <= 1, name
        assert abs(fooled - one[name][1]) <= 1, name


@pytest.mark.parametrize(
    ("flags", "variant"),
    [
        ([], "averaged"),
        (["--variant", "last"], "last"),
        (["--alpha", "0.5"], "alpha=0.5"),
        (["--alpha", "0"], "alpha=0"),
    ],
)
def test_a_trial(flags: list[str], variant: str, finished: tuple[Path, str], tmp_path: Path) -> None:
    results, _ = finished
    out = tmp_path / "model.safetensors"
    done = clippo("export", str(results), "--trial", "00001", "--out", str(out), *flags)
    assert done.returncode == 0, done.stderr
    assert f'pretrained="{out}"' in done.stdout
    config = ResultStore(str(results)).known_config("four")
    assert config["usage"].replace("model.safetensors", str(out)) in done.stdout, "the report says the same"
    stored = counts_in_store(ResultStore(str(results)), "four", "00001", variant)
    assert stored.keys() >= (set(SETS) if variant == "averaged" else VALIDATION)
    assert_close(counts_of_file(out), stored)
    wanted = wanted_by(str(out))
    assert (wanted.architecture, wanted.preprocessing["resize_mode"]) == (demo.MODEL_NAME, "shortest")
    card = out.with_suffix(".md").read_text()
    assert f"weights `{variant}`" in card
    assert "robustness (share of attacked pictures labelled right): 0." in card
    assert f"\nLicence: {OWN_LICENCE}.\n" in card
    trial = row_of(results, "00001")
    assert all(f": {trial[n]}\n" in card for n in ("model_digest", "data_digest", "prepared_digest"))
    for name in ("loss", "beta", "kl_weight", "learning_rate", "epochs", "batch_size", "seed", "trainable"):
        assert (f"\n- {name}: {trial[name]}\n" in card) == (trial[name] is not None), name
    if variant == "averaged":  # test pictures are measured for it, and for what may be on the front
        _, tested = card.split("On test pictures")
        assert re.search(r"- clean accuracy: 0\.\d{3} \(0\.\d{3} to \d\.\d{3}\)", tested), card


def test_alpha_zero_is_the_base_model_bit_by_bit(finished: tuple[Path, str], tmp_path: Path) -> None:
    store = ResultStore(str(finished[0]))
    written = export(store, "four", "00001", tmp_path / "base.safetensors", alpha=0.0)
    demo.register()
    base, same = (
        open_clip.create_model(demo.MODEL_NAME, pretrained=str(p), weights_only=True).state_dict()
        for p in (demo.WEIGHTS, written.weights)
    )
    assert all(torch.equal(base[name], same[name]) for name in base)
    assert "demo.register()" in written.usage


@pytest.mark.parametrize("t", [None, 1.5, -0.5, 0.0])
def test_a_transform_is_folded_into_the_projections(
    t: float | None, transform_sweep: Path, tmp_path: Path
) -> None:
    store = ResultStore(str(transform_sweep))
    written = export(store, "map", "00000", tmp_path / "map.safetensors", power=t)
    variant = "averaged" if t is None else f"t={t:g}"
    found = counts_of_file(written.weights)
    stored = counts_in_store(store, "map", "00000", variant)
    assert stored.keys() >= VALIDATION
    assert {name: found[name] for name in stored} == stored
    orthogonality = row_of(transform_sweep, "00000")["orthogonality"]
    assert f"\n- orthogonality: {orthogonality}\n" in written.card.read_text()
    assert orthogonality > 0


@pytest.mark.parametrize(
    ("trial", "alpha", "method"),
    [
        ("00001", 0.5, "preference optimisation (Afzali et al., arXiv 2411.08923)"),
        ("cross_entropy", None, "cross-entropy tuning"),
        ("cross_entropy", 1.0, "cross-entropy tuning"),
        ("cross_entropy", 0.5, "PAINT (interpolated), Ilharco et al., arXiv 2208.05592"),
    ],
)
def test_the_card_says_by_which_method(
    trial: str, alpha: float | None, method: str, finished: tuple[Path, str], tmp_path: Path
) -> None:
    store = ResultStore(str(finished[0]))
    card = export(store, "four", trial, tmp_path / "model.safetensors", alpha=alpha).card.read_text()
    assert f" by {method}.\n" in card


@pytest.mark.parametrize(
    ("trial", "settings", "complaint"),
    [
        ("99999", {}, "its trials are: 00000, 00001"),
        ("00000", {"power": 1.0}, "no weights 't=1'"),
        ("00000", {"variant": "best"}, "no weights 'best'"),
        ("00000", {"alpha": math.nan}, "no weights 'alpha=nan'"),
        ("00000", {"variant": "last", "alpha": 0.5}, "exclude each other"),
    ],
)
def test_what_cannot_be_exported(
    trial: str, settings: dict[str, Any], complaint: str, finished: tuple[Path, str], tmp_path: Path
) -> None:
    with pytest.raises(ClippoError, match=complaint):
        export(ResultStore(str(finished[0])), "four", trial, tmp_path / "m.safetensors", **settings)


def test_a_wrong_flag_is_one_line_and_status_2(finished: tuple[Path, str], tmp_path: Path) -> None:
    done = clippo("export", str(finished[0]), "--trial", "00000", "--out", str(tmp_path / "model.pt"))
    assert done.returncode == 2
    assert "must end in .safetensors" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_cut_is_known_from_the_store(transform_sweep: Path) -> None:
    config = ResultStore(str(transform_sweep)).config("map")
    assert config is not None
    assert ModelConfig(**config["model"]).trainable == "transform"
    digest = ResultStore(str(transform_sweep)).trials("map")["prepared_digest"][0].as_py()
    clean = open_prepared(transform_sweep / "prepared" / digest).train["train/clean"]
    assert len(clean.rows) == 160


@pytest.mark.parametrize("name", [demo.MODEL_NAME, "ViT-B-32-256", "convnext_base"])
def test_a_map_goes_into_the_projections_of_any_tower(name: str) -> None:
    clip = load_clip(name)
    generator = torch.Generator().manual_seed(0)
    text = ["a photo of a cat", "a dog"]
    pixels = torch.randint(0, 256, (1, *clip.image_size, 3), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        before = clip.model.encode_image(clip.normalized(pixels)), clip.text_features(text)
        matrix = torch.eye(before[1].shape[1]) + 0.1 * torch.randn(
            2 * before[1].shape[1:], generator=generator
        )
        _fold(clip.model, matrix)
        after = clip.model.encode_image(clip.normalized(pixels)), clip.text_features(text)
    for was, now in zip(before, after, strict=True):
        expected = torch.nn.functional.normalize(was @ matrix.T, dim=-1)
        torch.testing.assert_close(torch.nn.functional.normalize(now, dim=-1), expected, atol=1e-4, rtol=1e-3)


def test_a_model_without_a_projection_is_refused() -> None:
    with pytest.raises(ModelError, match="has no projection"):
        _fold_into((torch.nn.Linear(1, 1), "proj"), torch.eye(1))


def test_a_model_from_a_folder_is_exported_as_a_folder(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / CONFIG).write_text(json.dumps({"model_cfg": demo.MODEL_CONFIG, "preprocess_cfg": {}}))
    state = load_clip(demo.MODEL_NAME).model.state_dict()
    save_file({n: w.contiguous() for n, w in state.items()}, base / "open_clip_model.safetensors")
    flags = ["--model.name", f"local-dir:{base}", "--trials", "1", "--search.baselines", "--name", "own"]
    done = sweep(*flags, "--results", str(tmp_path / "results"))
    assert done.returncode == 0, done.stdout + done.stderr
    written = export(ResultStore(str(tmp_path / "results")), "own", "00000", tmp_path / "tuned.safetensors")
    assert f'"local-dir:{tmp_path / "tuned"}"' in written.usage
    tuned = open_clip.create_model(f"local-dir:{tmp_path / 'tuned'}").state_dict()
    assert not torch.equal(tuned["visual.attnpool.c_proj.weight"], state["visual.attnpool.c_proj.weight"])
    assert torch.equal(tuned["visual.conv1.weight"], state["visual.conv1.weight"])
    card = written.card.read_text()
    assert "\nLicence: that of the base model's weights; look it up before you ship.\n" in card
    trial = row_of(tmp_path / "results", "00000")
    assert all(f": {trial[n]}\n" in card for n in ("model_digest", "data_digest", "prepared_digest"))
    assert f"\n- learning_rate: {trial['learning_rate']}\n" in card


def test_licences_are_those_of_the_weights() -> None:
    assert _licence(ModelConfig()) == OWN_LICENCE
    assert _licence(ModelConfig(name="ViT-B-32", pretrained="openai")).startswith("MIT, ")
    for unknown in ("datacomp_xl_s13b_b90k", "mine.safetensors", None):
        assert "look it up" in _licence(ModelConfig(name="ViT-B-32", pretrained=unknown))


def test_the_lines_of_the_readme_load_an_export(finished: tuple[Path, str], tmp_path: Path) -> None:
    """As they stand there, but for the name: the weights of the README's own model cannot be had here."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    [code] = [b for b in blocks if "create_model_and_transforms" in b]
    assert code.count('"ViT-B-32-quickgelu"') == 1
    export(ResultStore(str(finished[0])), "four", "00001", tmp_path / "tuned.safetensors")
    code = "from clippo import demo\ndemo.register()\n" + code.replace("ViT-B-32-quickgelu", demo.MODEL_NAME)
    code += "print(model.state_dict()['visual.attnpool.c_proj.weight'].double().sum().item(), preprocess)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    tuned = load_file(tmp_path / "tuned.safetensors")["visual.attnpool.c_proj.weight"]
    assert float(done.stdout.split()[0]) == pytest.approx(tuned.double().sum().item())
    base = load_clip(demo.MODEL_NAME).model.state_dict()["visual.attnpool.c_proj.weight"]
    assert not torch.equal(tuned, base)
    assert "Normalize" in done.stdout
