"""A trial as a checkpoint that open_clip loads, with a model card beside it.

D embedding
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from safetensors.torch import save
from torch import Tensor, nn

from clippo import demo
from clippo.config import ModelConfig
from clippo.errors import ConfigError, ModelError, StoreError
from clippo.front.points import REFERENCE, Point, front_of
from clippo.model import ClipModel, Weights, load_clip, policy_of
from clippo.model.transform import MATRIX
from clippo.results import ResultStore
from clippo.results.checkpoints import StoreCheckpoints, checkpoint_folder
from clippo.train.checkpoint import load_policy, weights_of
from clippo.train.loop import AVERAGED

LICENCES = {demo.MODEL_NAME: "Apache-2.0; what it was made from is listed in clippo/demo/LICENSES.md"}


@dataclass(frozen=True)
class Exported:
    """What was written; ``name`` is the model name that open_clip needs for it."""

    name: str
    weights: Path
    card: Path


def export(
    store: ResultStore, sweep: str, trial_id: str, out: Path, *,
    variant: str = AVERAGED, alpha: float | None = None, power: float | None = None,
) -> Exported:  # fmt: skip
    """Writes the weights of a trial as safetensors and a model card.

    Args:
        variant: ``averaged`` or ``last``.
        alpha: weights on the way from the untouched model (0) to the trial (1); may lie beyond.
        power: the power t of a trained transform.

    Raises:
        StoreError: no such sweep or trial, or it left no weights.
        ConfigError: alpha for a transform, a power for a tower, or a file of another kind.
        ModelError: the base model cannot be loaded, or a transform has no projection to go into.
    """
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out is {str(out)!r}; it must end in .safetensors")
    config = store.config(sweep)
    if config is None:
        raise StoreError(f"{store.uri} has no sweep {sweep!r}; its sweeps are: {', '.join(store.sweeps())}")
    model = ModelConfig(**config["model"])
    clip = load_clip(model.name, model.pretrained)
    policy = policy_of(clip, model.trainable)
    if alpha is not None or power is not None:
        variant = f"alpha={alpha:g}" if alpha is not None else f"t={power:g}"
    tuned = weights_of(policy, _saved(store, sweep, trial_id), variant)
    if model.trainable == "transform":
        _fold(clip.model, tuned[MATRIX])
    else:
        cast(nn.Module, clip.model.visual).load_state_dict(tuned, strict=False)  # the tower's own names
    out.parent.mkdir(parents=True, exist_ok=True)
    state = {n: w.detach().contiguous().clone() for n, w in clip.model.state_dict().items()}
    out.write_bytes(save(state, metadata={"clippo": f"{sweep}/{trial_id}/{variant}"}))
    card = out.with_suffix(".md")
    card.write_text(_card(store, sweep, trial_id, variant, clip, model, out))
    return Exported(clip.open_clip_name, out, card)


def _saved(store: ResultStore, sweep: str, trial_id: str) -> dict[str, Weights]:
    saved = load_policy(StoreCheckpoints(store, checkpoint_folder(sweep, trial_id)))
    if saved is None:
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
        return (tower.head, "proj") if hasattr(tower.head, "proj") else (tower.head.mlp, "fc2")
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
    store: ResultStore,
    sweep: str,
    trial_id: str,
    variant: str,
    clip: ClipModel,
    model: ModelConfig,
    out: Path,
) -> str:
    """What a user of the weights must know, as Markdown."""
    trial = next(t for t in store.trials(sweep).to_pylist() if t["trial_id"] == trial_id)
    points = {(p.trial_id, p.variant): p for p in front_of(store, sweep).points}
    settings = ("loss", "beta", "kl_weight", "learning_rate", "epochs", "batch_size", "seed", "trainable")
    licence = LICENCES.get(model.name) or "that of the base model's weights; look it up before you ship"
    random = "the bundled weights" if model.name == demo.MODEL_NAME else "random weights"
    base = f"{model.name}, {model.pretrained or random}"
    lines = [
        f"# {base}, tuned against typographic attacks",
        "",
        f"Trial `{trial_id}` of sweep `{sweep}`, weights `{variant}`, made with",
        f"clippo {trial['code_version']} by preference optimisation (Afzali et al., arXiv 2411.08923).",
        "",
        "```python",
        "import open_clip",
        *(["from clippo import demo", "demo.register()"] if model.name == demo.MODEL_NAME else []),
        f'model = open_clip.create_model("{clip.open_clip_name}", pretrained="{out.name}")',
        "```",
        "",
        f"Licence: {licence}.",
        "",
        "## Numbers",
        "",
        *_numbers(points.get((trial_id, variant))),
        "",
        "## Settings",
        "",
        *(f"- {name}: {trial[name]}" for name in settings if trial[name] is not None),
        "",
        "## Provenance",
        "",
        f"- weights of the base model: {trial['model_digest']}",
        f"- pictures and how they are split and attacked: {trial['data_digest']}",
        f"- code: {trial['git_commit'] or 'no commit known'}; {trial['packages_json']}",
        "",
    ]
    return "\n".join(lines)


def _numbers(point: Point | None) -> list[str]:
    if point is None:
        return ["This point of the curve was not measured; the measured ones are in the sweep's front."]
    robust, kept = (
        "{:.3f} ({:.3f} to {:.3f})".format(value, *interval)
        for value, interval in (
            (point.robustness, point.robustness_interval),
            (point.retention, point.retention_interval),
        )
    )
    return [
        "On validation pictures, which steered the search, with 90 % intervals from the counts:",
        "",
        f"- robustness (share of attacked pictures labelled right): {robust}",
        f"- retention (tuned / untouched accuracy): {kept}",
        "",
        "On test pictures, which neither tuning nor the search saw:",
        "",
        *(f"- {name.replace('_', ' ')}: {value:.3f}" for name, value in point.test.items()),
    ]


def usage(exported: Exported) -> str:
    """How the weights are loaded."""
    register = "from clippo import demo; demo.register()\n" if exported.name == demo.MODEL_NAME else ""
    known = exported.name in open_clip.list_models() or ":" in exported.name
    assert known, "a name that open_clip does not know cannot have been loaded"
    return (
        f"import open_clip\n{register}"
        f'model = open_clip.create_model("{exported.name}", pretrained="{exported.weights}")'
    )
