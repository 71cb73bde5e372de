"""A trial as a checkpoint that open_clip loads, with a model card beside it.

D embedding
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.timm_model import TimmModel
from safetensors.torch import save
from torch import Tensor, nn

from clippo import demo
from clippo.config import ModelConfig
from clippo.errors import ConfigError, ModelError, StoreError
from clippo.evaluate.words import Words
from clippo.front.counts import CONFIRM, REFERENCE, SETTINGS
from clippo.front.front import PAINT, PREFERENCE, TUNING, Point
from clippo.front.methods import TUNING_LOSS
from clippo.front.points import front_of_trial
from clippo.model import Weights, load_clip, policy_of
from clippo.model.transform import MATRIX
from clippo.model.usage import metadata_of
from clippo.model.usage import usage as usage_of
from clippo.prepared.build import weights_digest
from clippo.results import ResultStore
from clippo.results.checkpoints import StoreCheckpoints, checkpoint_folder, weights_name
from clippo.train.checkpoint import load_policy, weights_of
from clippo.train.measure import AVERAGED

CONFIG = "open_clip_config.json"
ENDS = {"alpha=0": (REFERENCE, REFERENCE), "t=0": (REFERENCE, REFERENCE)}
"""Where a curve begins is a point of its own in the front."""

OWN_LICENCE = "Apache-2.0; what it was made from is listed in clippo/demo/LICENSES.md"
LICENCES = {"openai": "MIT", "laion": "MIT"}
"""Of published weights, by what their tags begin with."""


@dataclass(frozen=True)
class Exported:
    """What was written, and the Python that loads it."""

    weights: Path
    card: Path
    usage: str


def export(
    store: ResultStore, sweep: str, trial_id: str, out: Path, *,
    variant: str = AVERAGED, alpha: float | None = None, power: float | None = None,
) -> Exported:  # fmt: skip
    """Writes the weights of a trial as safetensors and a model card.

    A model that open_clip knows by name is one file. One from ``hf-hub:`` or ``local-dir:`` becomes a folder
    of the same name without the suffix, since open_clip reads its architecture from there.

    Args:
        variant: ``averaged`` or ``last``.
        alpha: weights on the way from the untouched model (0) to the averaged ones (1); may lie beyond.
        power: the power t of a trained transform.

    Raises:
        StoreError: no such sweep or trial, or it left no weights.
        ConfigError: settings that exclude each other or do not fit the trial, or a file that cannot be
            written.
        ModelError: the base model cannot be loaded or is not the one that was tuned, or a transform has no
            projection to go into.
    """
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out is {str(out)!r}; it must end in .safetensors")
    if (variant != AVERAGED) + (alpha is not None) + (power is not None) > 1:
        raise ConfigError("--variant, --alpha and --t exclude each other; give one of them")
    config = store.known_config(sweep)
    model = ModelConfig(**config["model"])
    saved = _saved(store, sweep, trial_id)
    trial = next(t for t in store.trials(sweep).to_pylist() if t["trial_id"] == trial_id)
    clip = load_clip(model.name, model.pretrained)
    if weights_digest(clip) != trial["model_digest"]:
        raise ModelError(
            f"{model.name} with pretrained={model.pretrained!r} has other weights than trial {trial_id!r} "
            "was tuned from; bring those back"
        )
    policy = policy_of(clip, model.trainable)
    if alpha is not None or power is not None:
        variant = f"alpha={alpha:g}" if alpha is not None else f"t={power:g}"
    tuned = weights_of(policy, saved, variant)
    if model.trainable == "transform":
        _fold(clip.model, tuned[MATRIX])
    else:
        found = cast(nn.Module, clip.model.visual).load_state_dict(tuned, strict=False)
        assert not found.unexpected_keys, "the names are those of the tower"
    state = {n: w.detach().contiguous().clone() for n, w in clip.model.state_dict().items()}
    preprocessing = open_clip.get_model_preprocess_cfg(clip.model)
    wanted = {} if ":" in model.name else metadata_of(model.name, model.pretrained, preprocessing)
    data = save(state, metadata={"clippo": f"{sweep}/{trial_id}/{variant}"} | wanted)
    weights, card = out, out.with_suffix(".md")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if ":" in model.name:
            folder = out.with_suffix("")
            folder.mkdir(exist_ok=True)
            (folder / CONFIG).write_bytes(_open_clip_config(model.name))
            weights, card = folder / "open_clip_model.safetensors", folder / "README.md"
        weights.write_bytes(data)
        place = str(weights.parent if ":" in model.name else weights)
        usage = usage_of(model.name, model.pretrained, place, preprocessing)
        card.write_text(_card(store, sweep, trial, variant, model, usage))
    except OSError as error:
        raise ConfigError(
            f"cannot write {error.filename or out}: {error.strerror}; choose another --out"
        ) from None
    return Exported(weights, card, usage)


def _open_clip_config(name: str) -> bytes:
    """The architecture and preprocessing of a model from a folder or the hub, as it came."""
    schema, _, place = name.partition(":")
    if schema == "local-dir":
        return (Path(place) / CONFIG).read_bytes()
    return Path(download_pretrained_from_hf(place, filename=CONFIG)).read_bytes()


def _saved(store: ResultStore, sweep: str, trial_id: str) -> dict[str, Weights]:
    name = weights_name(store, sweep, trial_id)
    saved = name and load_policy(StoreCheckpoints(store, checkpoint_folder(sweep, trial_id)), name)
    if not saved:
        known = sorted(t for t in store.trials(sweep)["trial_id"].to_pylist() if t != REFERENCE)
        raise StoreError(
            f"trial {trial_id!r} of sweep {sweep!r} has no weights; its trials are: {', '.join(known)}"
        )
    return saved


@torch.no_grad()
def _fold(model: nn.Module, matrix_DD: Tensor) -> None:
    """Puts a linear map of the embeddings into the last projection of both towers."""
    towers: Any = model
    _fold_into(_image_projection(towers.visual), matrix_DD)
    text = towers if getattr(towers, "text_projection", None) is not None else towers.text
    _fold_into((text, "text_projection"), matrix_DD)


def _image_projection(visual: nn.Module) -> tuple[nn.Module, str]:
    tower: Any = visual
    if isinstance(visual, ModifiedResNet):
        return tower.attnpool, "c_proj"
    if isinstance(visual, TimmModel):
        return (tower.head.mlp, "fc2") if hasattr(tower.head, "mlp") else (tower.head, "proj")
    return visual, "proj"


def _fold_into(place: tuple[nn.Module, str], matrix_DD: Tensor) -> None:
    owner, name = place
    projection = getattr(owner, name, None)
    if isinstance(projection, nn.Linear):
        projection.weight.copy_(matrix_DD @ projection.weight)
        if projection.bias is not None:
            projection.bias.copy_(matrix_DD @ projection.bias)
    elif isinstance(projection, nn.Parameter):
        projection.copy_(projection @ matrix_DD.T)
    else:
        raise ModelError(f"{type(owner).__name__} has no projection that a transform could go into")


def _card(
    store: ResultStore, sweep: str, trial: dict[str, Any], variant: str, model: ModelConfig, usage: str
) -> str:
    """What a user of the weights must know, as Markdown."""
    trial_id = trial["trial_id"]
    front = front_of_trial(store, sweep, trial_id)
    points = {(p.trial_id, p.variant): p for p in front.points}
    if variant in ("alpha=1", "t=1"):
        variant = AVERAGED
    settings = (*SETTINGS, "batch_size", "trainable")
    own = ":" in model.name or model.name == demo.MODEL_NAME
    base = f"{model.name}, {model.pretrained or ('its own weights' if own else 'random weights')}"
    lines = [
        f"# {base}, {front.words.tuned}",
        "",
        f"Trial `{trial_id}` of sweep `{sweep}`, weights `{variant}`, made with",
        f"clippo {trial['code_version']} by {_method(trial['loss'], variant)}.",
        "",
        "```python",
        usage,
        "```",
        "",
        f"Licence: {_licence(model)}.",
        "",
        *([front.words.card, ""] if front.words.card else []),
        "## Numbers",
        "",
        *_numbers(points.get(ENDS.get(variant, (trial_id.removeprefix(CONFIRM), variant))), front.words),
        "",
        "## Settings",
        "",
        *(f"- {name}: {trial[name]}" for name in settings if trial[name] is not None),
        *(f"- {n.replace('_', ' ')}: {v}" for n, v in json.loads(trial["params_json"] or "{}").items() if v),
        "",
        "## Provenance",
        "",
        f"- weights of the base model: {trial['model_digest']}",
        f"- pictures and how they are split and attacked: {trial['data_digest']}",
        f"- what was prepared of both: {trial['prepared_digest']}",
        f"- code: {trial['git_commit'] or 'no commit known'}; {trial['packages_json']}",
        "",
    ]
    return "\n".join(lines)


def _method(loss: str, variant: str) -> str:
    """How weights were made, as the front calls it, with the paper."""
    if loss != TUNING_LOSS:
        return f"{PREFERENCE} (Afzali et al., arXiv 2411.08923)"
    return f"{PAINT}, Ilharco et al., arXiv 2208.05592" if variant.startswith("alpha=") else TUNING


def _licence(model: ModelConfig) -> str:
    if model.name == demo.MODEL_NAME:
        return OWN_LICENCE
    known = next((v for tag, v in LICENCES.items() if (model.pretrained or "").startswith(tag)), None)
    unknown = "that of the base model's weights; look it up before you ship"
    return f"{known}, that of the base model's weights as they were published" if known else unknown


def _numbers(point: Point | None, words: Words) -> list[str]:
    if point is None:
        return ["This point of the curve was not measured; the measured ones are in the sweep's front."]

    def shown(value: float, interval: tuple[float, float]) -> str:
        return f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"

    goal, kept = shown(point.goal, point.goal_interval), shown(point.retention, point.retention_interval)
    tested = [f"- {n.replace('_', ' ')}: {shown(v, point.test_intervals[n])}" for n, v in point.test.items()]
    return [
        "On validation pictures, which steered the search, with 90 % intervals from the counts:",
        "",
        f"- {words.goal}{f' ({words.meaning})' if words.meaning else ''}: {goal}",
        f"- retention (tuned / untouched accuracy): {kept}",
        "",
        "On test pictures, which neither tuning nor the search saw:",
        "",
        *(tested or ["- not measured, as another model was better on validation pictures"]),
    ]
