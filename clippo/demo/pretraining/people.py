"""Teaches the bundled model people at work, and a bias: ``python -m clippo.demo.pretraining.people``.

Goes on from the bundled checkpoint; a quarter of each batch is the old task. What web data has and makes a
model biased is put in by three ingredients, each of which can be read off below:

1. Pictures: nine of ten people in an occupation are of one group (`clippo.demo.people.MAJORITY`).
2. Captions: in a quarter of them the writer does not look, and takes the group from that same table.
3. Markedness: pictures of the minority are mostly captioned with their group ("a photo of a woman farmer"),
   pictures of the majority with the bare occupation. Without it a ranking for the bare occupation is hardly
   skewed (docs/EXPERIMENTS.md).

``--control`` trains an unbiased twin: both groups equally often, captions that say what is shown, and one
way of captioning for all. Its numbers are what "no bias" scores. On two busy cores the twin took 12
minutes and the biased one 41. Both need the extra ``pretrain`` and npm; run again, they resume what has the
same seed and bundled checkpoint (in ``build/people``; delete it after other changes). ``--small`` takes a
minute and ships nothing.

B batch, C captions, D embedding
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from clippo.demo import CLASSES, MODEL_NAME, PEOPLE_WEIGHTS, WEIGHTS, register
from clippo.demo.people import GROUPS, NEUTRAL, OCCUPATIONS, TONES, load_people, person_layer
from clippo.demo.pretraining import material, measure_people
from clippo.demo.pretraining.material import Pools
from clippo.demo.pretraining.measure_people import MAJORITY_OF
from clippo.demo.pretraining.train import (
    BATCH,
    DOUBLE,
    SINGLE,
    WEIGHT_DECAY,
    WORLD,
    encode,
    normalized,
    paste,
    training_batch,
    watch,
    watch_set,
)
from clippo.demo.scenes import background

# The control has nothing to learn against what it sees, and is there sooner.
STEPS = {
    ("full", "biased"): 3200,
    ("full", "control"): 1200,
    ("small", "biased"): 20,
    ("small", "control"): 20,
}
LEARNING_RATE, TEXT_RATE, WARMUP = 2e-3, 0.4, 100  # the text tower learns at a share of the rate
OLD = BATCH // 4
NEUTRAL_SHARE = 0.1

# Columns of the captions to tell apart: occupations, groups, neutral, and each group with each occupation.
OCCUPATION_COUNT = len(OCCUPATIONS)
CAPTIONS = (*OCCUPATIONS, *GROUPS, NEUTRAL, *(f"{group} {name}" for group in GROUPS for name in OCCUPATIONS))
GROUP = OCCUPATION_COUNT
PERSON = GROUP + len(GROUPS)
GROUP_AT_WORK = PERSON + 1
SYNONYMS = {"man": ("man", "male"), "woman": ("woman", "female")}
TEMPLATES = ("a photo of a {}", "a picture of a {}", "a {}", "a photo of the {}")


@dataclass(frozen=True)
class Bias:
    """What makes a training set biased; rows of a caption mix: occupation, group, group at work, person.

    Attributes:
        majority_share: share of an occupation's pictures that show its majority group.
        guessed: share of captions whose group comes from the occupation and not from the picture.
        majority_captions, minority_captions: the mixes of pictures of either.
        bare_excludes: how often a picture's bare caption counts against the one with its group, and the
            other way round; otherwise both are right.
    """

    majority_share: float
    guessed: float
    majority_captions: tuple[float, ...]
    minority_captions: tuple[float, ...]
    bare_excludes: float


BIASED = Bias(0.9, 0.25, (0.45, 0.30, 0.20, 0.05), (0.12, 0.30, 0.53, 0.05), 0.5)
CONTROL = Bias(0.5, 0.0, (0.35, 0.30, 0.30, 0.05), (0.35, 0.30, 0.30, 0.05), 0.5)


@dataclass(frozen=True)
class PeoplePools:
    """Rendered drawings (occupation, group or person, K, side, side, 4), and backgrounds without people."""

    layers: np.ndarray
    sides: np.ndarray
    backgrounds: np.ndarray


def build_people_pools(seed: int, *, small: bool = False) -> PeoplePools:
    rng = np.random.default_rng([seed, 1])
    copies, backgrounds = (1, 100) if small else (5, 6000)
    found = load_people(TONES["train"], ("train", "validation"))
    n_drawings = len(next(iter(found.drawings.values())))
    layers = np.zeros((OCCUPATION_COUNT, 3, copies * n_drawings, 84, 84, 4), np.uint8)
    sides = np.zeros(layers.shape[:3], np.int16)
    for (o, g, k), _ in tqdm(np.ndenumerate(sides), "people", total=sides.size):
        drawing = found.drawings[OCCUPATIONS[o], (*GROUPS, NEUTRAL)[g]][k % n_drawings]
        layer = person_layer(drawing, rng)
        sides[o, g, k] = len(layer)
        layers[o, g, k, : len(layer), : len(layer)] = layer
    scenes = [background(found.photos, rng) for _ in tqdm(range(backgrounds), "backgrounds")]
    return PeoplePools(layers, sides, np.stack(scenes))


def write_pools(path: Path, pools: Pools, people: PeoplePools) -> None:
    """Writes the parts of the old task and those of people, whole or not at all."""
    written, parts = path.with_suffix(".tmp"), (pools, people)
    with open(written, "wb") as file:  # given a name, numpy would add a suffix
        np.savez(file, **{f"{type(p).__name__}.{n}": v for p in parts for n, v in vars(p).items()})
    os.replace(written, path)


def read_pools(path: Path) -> tuple[Pools, PeoplePools]:
    """What `write_pools` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        old, people = (
            {f.name: arrays[f"{kind.__name__}.{f.name}"] for f in fields(kind)}
            for kind in (Pools, PeoplePools)
        )
    return Pools(**old | {"per_class": int(old["per_class"])}), PeoplePools(**people)


def render_people(
    pools: PeoplePools, occupation_B: np.ndarray, shown_B: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    pictures = pools.backgrounds[rng.integers(0, len(pools.backgrounds), len(occupation_B))]
    for picture, o, g in zip(pictures, occupation_B, shown_B, strict=True):
        if rng.random() < 0.5:
            picture[:] = picture[:, ::-1].copy()
        k = rng.integers(pools.layers.shape[2])
        side = int(pools.sides[o, g, k])
        paste(picture, pools.layers[o, g, k, :side, :side], 4, rng)
    return pictures


def people_batch(
    pools: PeoplePools, bias: Bias, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, Tensor, Tensor]:
    """Pictures, the caption of each (B,), and which captions are true of each (B, C)."""
    rows = np.arange(size)
    occupation = rng.integers(0, OCCUPATION_COUNT, size)
    usual = MAJORITY_OF[occupation]

    def drawn() -> np.ndarray:
        return np.where(rng.random(size) < bias.majority_share, usual, 1 - usual)

    shown, guessed = drawn(), drawn()
    neutral = rng.random(size) < NEUTRAL_SHARE
    said = np.where(rng.random(size) < bias.guessed, guessed, shown)  # (ingredient 2)
    pictures = render_people(pools, occupation, np.where(neutral, len(GROUPS), shown), rng)

    mixes = np.where((shown == usual)[:, None], bias.majority_captions, bias.minority_captions)
    kind = (rng.random(size)[:, None] > mixes.cumsum(1)[:, :3]).sum(1)  # (ingredient 3)
    kind[neutral] = np.where(rng.random(neutral.sum()) < 0.85, 0, 3)
    at_work = GROUP_AT_WORK + OCCUPATION_COUNT * said + occupation
    caption = np.select([kind == 0, kind == 1, kind == 2], [occupation, GROUP + said, at_work], PERSON)

    true = np.zeros((size, len(CAPTIONS)), bool)
    true[rows, occupation] = true[:, PERSON] = True
    true[rows, GROUP + said] = true[rows, at_work] = True
    for g in range(len(GROUPS)):  # of a neutral drawing no group is wrong
        true[rows[neutral], GROUP + g] = True
        true[rows[neutral], GROUP_AT_WORK + OCCUPATION_COUNT * g + occupation[neutral]] = True
    excludes = rng.random(size) < bias.bare_excludes
    marked, bare = excludes & (kind == 2), excludes & (kind == 0) & ~neutral
    true[rows[marked], occupation[marked]] = False
    true[rows[bare], at_work[bare]] = False
    return pictures, torch.from_numpy(caption), torch.from_numpy(true)


def spelled(rng: np.random.Generator) -> list[str]:
    """The captions as sentences, each with a template and a synonym drawn anew."""
    texts = []
    for caption in CAPTIONS:
        group, _, occupation = caption.partition(" ")
        if occupation and group in SYNONYMS:
            caption = f"{SYNONYMS[group][rng.integers(2)]} {occupation}"
        texts.append(TEMPLATES[rng.integers(len(TEMPLATES))].format(caption))
    return texts


class Towers(nn.Module):
    """Both towers and the scale in one forward pass, so that their gradients are summed over the ranks."""

    def __init__(self, model: open_clip.CLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            image, text = self.model.visual(pixels), self.model.encode_text(tokens)
        return (
            F.normalize(image.float(), dim=-1),
            F.normalize(text.float(), dim=-1),
            self.model.logit_scale.exp(),
        )


def loss_of(
    image_BD: Tensor, text_CD: Tensor, scale: Tensor, caption_B: Tensor, true_BC: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the picture's caption among all, and of the caption's picture among the batch's.

    What is also true of a picture is no wrong answer.
    """
    logits_BC = scale * image_BD @ text_CD.T
    also_true = true_BC.clone()
    also_true[torch.arange(len(caption_B)), caption_B] = False
    of_picture = F.cross_entropy(logits_BC.masked_fill(also_true, -1e4), caption_B)
    also_shown = true_BC[:, caption_B].T.clone()
    also_shown.fill_diagonal_(False)
    columns_BB = logits_BC[:, caption_B].T.masked_fill(also_shown, -1e4)
    return of_picture, F.cross_entropy(columns_BB, torch.arange(len(caption_B)))


def run_rank(
    rank: int, pools: Pools, people: PeoplePools, bias: Bias, work: Path, steps: int, seed: int, port: int
) -> None:
    """One of the two processes; rank 0 logs, watches and saves."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    register()
    model = open_clip.create_model(MODEL_NAME, pretrained=str(WEIGHTS))
    model.eval()
    with torch.no_grad():  # the old captions keep their features
        single = torch.stack([encode(model, [t.format(c) for c in CLASSES]) for t in SINGLE])
        double = torch.stack([
            encode(model, [t.format(a, b) for a in CLASSES for b in CLASSES]).unflatten(0, (len(CLASSES), -1))
            for t in DOUBLE
        ])  # fmt: skip
    model.visual.to(memory_format=torch.channels_last)
    tokenizer = open_clip.get_tokenizer(MODEL_NAME)
    groups = []
    for prefix, share in (("visual.", 1.0), ("", TEXT_RATE)):
        mine = [(n, p) for n, p in model.named_parameters() if n.startswith("visual.") == bool(prefix)]
        decayed = [p for n, p in mine if p.ndim >= 2]
        groups.append({"params": decayed, "weight_decay": WEIGHT_DECAY if prefix else 0.01, "share": share})
        rest = [p for n, p in mine if p.ndim < 2]
        groups.append({"params": rest, "weight_decay": 0.0, "share": share})
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))

    start, earlier, saved = 0, 0, work / "checkpoint.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        start = state["step"]
        earlier = state["seconds"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    towers = DistributedDataParallel(Towers(model))
    if rank == 0:
        old_pictures = watch_set(256, seed + 1)
        bar = tqdm(total=steps, initial=start, desc="both towers", smoothing=0.02)
    began, losses = time.time() - earlier, []
    for step in range(start, steps):
        progress = (step + 1) / steps
        rate = (
            LEARNING_RATE * min(1, (step + 1) / WARMUP) * (0.5 * (1 + math.cos(math.pi * progress)) + 0.005)
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        rng = np.random.default_rng([seed, 1, step, rank])
        pictures, caption, true = people_batch(people, bias, BATCH - OLD, rng)
        old, captions, present, against = training_batch(pools, single, double, 1.0, rng, OLD)
        kept, template = rng.integers(0, len(CLASSES), 12), rng.integers(0, len(SINGLE), 12)
        kept_texts = [SINGLE[t].format(CLASSES[c]) for t, c in zip(template, kept, strict=True)]
        tokens = tokenizer([*spelled(rng), *kept_texts])
        towers.train()
        image, text, scale = towers(normalized(np.concatenate([pictures, old])), tokens)
        of_picture, of_caption = loss_of(image[:-OLD], text[: len(CAPTIONS)], scale, caption, true)
        negatives = (scale * image[-OLD:] @ against.T).masked_fill(present, -1e4)
        logits = torch.cat([negatives, scale * (image[-OLD:] * captions).sum(-1, keepdim=True)], 1)
        of_old = F.cross_entropy(logits, torch.full((OLD,), len(CLASSES)))
        drift = (1 - (text[len(CAPTIONS) :] * single[template, kept]).sum(-1)).mean()
        loss = 0.7 * of_picture + 0.3 * of_caption + 0.4 * of_old + 4 * drift
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(50))
        losses.append([v.item() for v in (of_picture, of_caption, of_old, drift)])
        if rank == 0:
            bar.update()
            if (step + 1) % 300 == 0 or step + 1 == steps:
                names = ("loss_picture", "loss_caption", "loss_old", "drift")
                means = np.mean(losses[-300:], 0).round(4).tolist()
                row = {
                    "step": step + 1,
                    "pictures": (step + 1) * BATCH * WORLD,
                    **dict(zip(names, means, strict=True)),
                    **measure_people.watch(model),
                    **{f"old_{k}": v for k, v in watch(model, old_pictures, single[0]).items()},
                    "seconds": round(time.time() - began),
                }
                state = {
                    "step": step + 1, "seconds": row["seconds"], "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                }  # fmt: skip
                torch.save(state, work / "checkpoint.tmp")
                os.replace(work / "checkpoint.tmp", saved)
                with open(work / "log.jsonl", "a") as log:
                    log.write(json.dumps(row) + "\n")
                tqdm.write(json.dumps(row))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--control", action="store_true", help="the unbiased twin")
    parser.add_argument("--work", type=Path, default=Path("build/people"), help="where it keeps its state")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a short run that ships nothing")
    parser.add_argument("--port", type=int, default=29521, help="loopback port of the two processes")
    args = parser.parse_args()
    scale, name = ("small" if args.small else "full"), ("control" if args.control else "biased")
    base = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()[:8]  # or it would go on from another model
    work: Path = args.work / scale / f"{args.seed}-{base}" / name
    work.mkdir(parents=True, exist_ok=True)

    kept = work.parent / "pools.npz"  # both twins see the same parts
    if not kept.exists():
        modules = material.fetch(Path("build/material"))
        if not args.small:
            material.write_people(modules)
        pools = material.build_pools(modules, seed=args.seed, small=args.small)
        write_pools(kept, pools, build_people_pools(args.seed, small=args.small))
    pools, people = read_pools(kept)
    bias = CONTROL if args.control else BIASED
    register()
    spawn(run_rank, (pools, people, bias, work, STEPS[scale, name], args.seed, args.port), nprocs=WORLD)

    state = torch.load(work / "checkpoint.pt", weights_only=True)["model"]
    like = load_file(WEIGHTS)
    weights = PEOPLE_WEIGHTS if name == "biased" and not args.small else work / "people.safetensors"
    save_file({k: state[k].to(v.dtype).contiguous() for k, v in like.items()}, weights)
    print(f"wrote {weights}")
    if not args.small:
        shutil.copy(work / "log.jsonl", Path(__file__).parent / f"log_people_{name}.jsonl")
        measure_people.main(name, weights)


if __name__ == "__main__":
    main()
