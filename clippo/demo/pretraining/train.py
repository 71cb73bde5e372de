"""Pretrains the bundled model from scratch: it learns things, words, and to believe words over things.

Three facts from docs/EXPERIMENTS.md carry the recipe. Reading only starts with a curriculum, few renderings
of each word first. Background variety decides clean accuracy. Words that are no class teach it to ignore
what it cannot use, so that an attack is reading and not covering.

Two processes of one thread each train data-parallel (gloo); the batch at step s depends on the seed and s
alone, so a resumed run goes on exactly where it stopped.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from clippo.data.attack import COLORS, FONTS, WordStyle, draw_word
from clippo.demo import CLASSES, MODEL_NAME, register
from clippo.demo.pretraining.material import Pools, nonsense_word
from clippo.demo.scenes import SIDE, compose, material_of_split

# B batch, C classes, D embedding
WORLD, BATCH = 2, 56
STEPS = {"full": 19_000, "small": 60}
TEXT_STEPS = {"full": 400, "small": 40}
LEARNING_RATE, WEIGHT_DECAY, WARMUP = 2e-3, 0.05, 200

# Kinds: thing, thing + other word, class word alone, thing + its own word, thing + another class's word
MIXES = (
    (0.105, (0.85, 0.00, 0.05, 0.10, 0.00)),
    (0.32, (0.22, 0.08, 0.50, 0.10, 0.10)),
    (0.45, (0.17, 0.12, 0.36, 0.08, 0.27)),
    (0.75, (0.38, 0.26, 0.09, 0.03, 0.24)),
    (1.00, (0.26, 0.32, 0.09, 0.03, 0.30)),
)
# The renderings of a word in use grow from 3 to all between these shares of the run.
CURRICULUM = (0.105, 0.45)
DECAY_FROM = 0.4  # share of the run from which the learning rate falls
CAPTION_WORD, CAPTION_THING = 0.75, 0.03  # caption of thing + another class; otherwise it names both

SINGLE = ("a photo of a {}", "a picture of a {}", "an image of a {}", "a {}", "{}", "the {}", "a small {}",
          "a drawing of a {}")  # fmt: skip
DOUBLE = ("a {} and a {}", "a photo of a {} with a {}")


def encode(model: open_clip.CLIP, texts: list[str]) -> torch.Tensor:
    tokenizer = open_clip.get_tokenizer(MODEL_NAME)
    parts = [model.encode_text(tokenizer(texts[i : i + 512])) for i in range(0, len(texts), 512)]
    return F.normalize(torch.cat(parts), dim=-1)


def pretrain_text(model: open_clip.CLIP, steps: int, seed: int) -> None:
    """Text tower alone: two phrasings of the same one or two things are a pair."""
    rng = np.random.default_rng(seed)
    parameters = [
        p for n, p in model.named_parameters() if not n.startswith("visual.") and n != "logit_scale"
    ]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    tokenizer = open_clip.get_tokenizer(MODEL_NAME)

    def caption(things: list[int]) -> str:
        names = [CLASSES[i] for i in rng.permutation(things)]
        if len(names) == 2 and rng.random() < 0.5:
            names = names[:1]
        templates = SINGLE if len(names) == 1 else DOUBLE
        return templates[rng.integers(len(templates))].format(*names)

    for step in tqdm(range(steps), "text tower"):
        order, groups = rng.permutation(len(CLASSES)).tolist(), []
        while len(order) > 1:
            size = 1 if rng.random() < 0.6 else 2
            groups.append(order[:size])
            order = order[size:]
        first, second = (
            F.normalize(model.encode_text(tokenizer([caption(g) for g in groups])), dim=-1) for _ in range(2)
        )
        logits, target = 20 * first @ second.T, torch.arange(len(groups))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# --- pictures ---------------------------------------------------------------------------------------------

_MEAN = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1) * 255
_STD = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1) * 255


def normalized(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (B, SIDE, SIDE, 3) to the float input of the image tower, in channels-last memory."""
    return (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() - _MEAN) / _STD


def paste(picture: np.ndarray, layer: np.ndarray, margin: int, rng: np.random.Generator) -> None:
    """Pastes an RGBA layer, maybe flipped, into a picture; up to ``margin`` pixels may leave it."""
    side = len(layer)
    if rng.random() < 0.5:
        layer = layer[:, ::-1]
    x, y = (int(v) for v in rng.integers(-margin, SIDE - side + margin + 1, 2))
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + side, SIDE), min(y + side, SIDE)
    layer = layer[y0 - y : y1 - y, x0 - x : x1 - x]
    opacity = layer[..., 3:].astype(np.float32) * (1 / 255)
    tint = rng.uniform(0.75, 1.2, 3).astype(np.float32)
    under = picture[y0:y1, x0:x1]
    picture[y0:y1, x0:x1] = under + (np.minimum(layer[..., :3] * tint, 255) - under) * opacity


def render(
    pools: Pools, thing_B: np.ndarray, word_B: np.ndarray, in_use: int, rng: np.random.Generator
) -> np.ndarray:
    """Composes pictures; ``-1`` means no thing or no word, ``len(CLASSES)`` a word that is no class."""
    pictures = pools.backgrounds[rng.integers(0, len(pools.backgrounds), len(thing_B))]
    others = len(CLASSES) * pools.per_class
    palette = np.array(list(COLORS.values()), np.float32)
    for picture, thing, word in zip(pictures, thing_B, word_B, strict=True):
        if rng.random() < 0.5:
            picture[:] = picture[:, ::-1].copy()
        if thing >= 0:
            k = rng.integers(pools.objects.shape[1])
            side = int(pools.object_sides[thing, k])
            paste(picture, pools.objects[thing, k, :side, :side], 3, rng)
        if word >= 0:
            if word == len(CLASSES):
                index = int(rng.integers(others, len(pools.shapes)))
            else:
                index = int(word) * pools.per_class + int(rng.integers(in_use))
            mask = pools.mask(index).astype(np.float32) * (1 / 255)
            height, width = mask.shape[:2]
            x, y = int(rng.integers(SIDE - width + 1)), int(rng.integers(SIDE - height + 1))
            style = rng.random()
            if style < 0.4:  # as an attack is drawn: any two of the eight colours
                i, j = rng.choice(len(palette), 2, replace=False)
                fill, stroke = palette[i], palette[j]
            else:
                shade = 255.0 * (rng.random() < 0.5)
                fill = (
                    np.full(3, shade, np.float32)
                    if style < 0.7
                    else rng.uniform(0, 255, 3).astype(np.float32)
                )
                light = rng.uniform(0, 60)
                stroke = np.full(3, light if fill.mean() > 127 else 255 - light, np.float32)
            under = picture[y : y + height, x : x + width].astype(np.float32)
            under += (stroke - under) * mask[..., 1:]
            under += (fill - under) * mask[..., :1]
            picture[y : y + height, x : x + width] = under
    return pictures


def training_batch(
    pools: Pools, single: torch.Tensor, double: torch.Tensor, progress: float, rng: np.random.Generator,
    size: int = BATCH,
) -> tuple[np.ndarray, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Pictures, their caption features, which classes are in them, and the class features to tell apart."""
    classes = len(CLASSES)
    mix = next(m for end, m in MIXES if progress <= end)
    kind = rng.choice(5, size, p=mix)
    thing = rng.integers(0, classes, size)
    other = (thing + rng.integers(1, classes, size)) % classes
    word = np.select([kind == 0, kind == 1, kind == 4], [-1, classes, other], thing)
    begin, end = CURRICULUM
    ramp = min(1.0, max(0.0, (progress - begin) / (end - begin)))
    in_use = max(1, min(pools.per_class, round(3 * (pools.per_class / 3) ** ramp)))
    pictures = render(pools, np.where(kind == 2, -1, thing), word, in_use, rng)

    rows = torch.arange(size)
    present = torch.zeros(size, classes, dtype=torch.bool)
    present[rows, torch.from_numpy(thing)] = True
    template = rng.integers(0, len(single), size)
    captions = single[template, thing].clone()
    attacked = np.flatnonzero(kind == 4)
    present[attacked, other[attacked]] = True
    choice = rng.random(len(attacked))
    says_word = attacked[choice < CAPTION_WORD]
    captions[says_word] = single[template[says_word], other[says_word]]
    says_both = attacked[choice >= CAPTION_WORD + CAPTION_THING]
    swap = rng.random(len(says_both)) < 0.5
    first, second = thing[says_both], other[says_both]
    captions[says_both] = double[
        rng.integers(0, len(double), len(says_both)),
        np.where(swap, first, second),
        np.where(swap, second, first),
    ]
    return pictures, captions, present, single[int(rng.integers(len(single)))]


# --- watching it learn ------------------------------------------------------------------------------------


def watch_set(n: int, seed: int) -> dict[str, np.ndarray]:
    """Validation pictures with lettering that pretraining never sees; their photos it does."""
    rng = np.random.default_rng(seed)
    material = material_of_split("validation")
    style = WordStyle(fonts=FONTS["validation"], font_size=(0.12, 0.18))
    thing = np.arange(n) % len(CLASSES)
    word = (thing + rng.integers(1, len(CLASSES), n)) % len(CLASSES)

    def written(pictures: list[Image.Image], words: list[str]) -> np.ndarray:
        drawn = [draw_word(p, w, rng, style=style) for p, w in zip(pictures, words, strict=True)]
        return np.stack([np.asarray(p) for p in drawn])

    clean = [compose(material, CLASSES[i], rng) for i in thing]
    plain = [compose(material, None, rng) for _ in thing]
    return {
        "thing": thing,
        "word": word,
        "clean": np.stack([np.asarray(p) for p in clean]),
        "attacked": written(clean, [CLASSES[w] for w in word]),
        "written": written(plain, [CLASSES[w] for w in word]),
        "nonsense": written(clean, [nonsense_word(rng) for _ in word]),
    }  # fmt: skip


@torch.no_grad()
def watch(
    model: open_clip.CLIP, pictures: dict[str, np.ndarray], class_features: torch.Tensor
) -> dict[str, float]:
    model.eval()
    said = {}
    for name in ("clean", "attacked", "written", "nonsense"):
        with torch.autocast("cpu", torch.bfloat16):
            features = [
                model.visual(normalized(pictures[name][i : i + 128]))
                for i in range(0, len(pictures[name]), 128)
            ]
        said[name] = (torch.cat(features).float() @ class_features.T).argmax(1).numpy()

    def share(name: str, label: str) -> float:
        return round(100 * float((said[name] == pictures[label]).mean()), 1)

    return {
        "clean": share("clean", "thing"),
        "attacked_true": share("attacked", "thing"),
        "attacked_word": share("attacked", "word"),
        "word_reading": share("written", "word"),
        "nonsense": share("nonsense", "thing"),
    }


# --- the loop ---------------------------------------------------------------------------------------------


def run_rank(rank: int, pools: Pools, work: Path, scale: str, seed: int, port: int) -> None:
    """One of the two processes; rank 0 logs, watches and saves."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    register()
    model = open_clip.create_model(MODEL_NAME)
    model.load_state_dict(torch.load(work / "text.pt", weights_only=True))
    single, double = torch.load(work / "captions.pt", weights_only=True)
    model.visual.to(memory_format=torch.channels_last)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("visual."))
    tower = DistributedDataParallel(model.visual)
    logit_scale = torch.nn.Parameter(torch.tensor(math.log(1 / 0.07)))
    weights = [p for p in model.visual.parameters() if p.ndim >= 2]
    rest = [p for p in model.visual.parameters() if p.ndim < 2]
    groups = [
        {"params": weights, "weight_decay": WEIGHT_DECAY},
        {"params": [*rest, logit_scale], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))

    steps, start, earlier, saved = STEPS[scale], 0, 0, work / "checkpoint.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        start, earlier = state["step"], state["seconds"]
        model.visual.load_state_dict(state["visual"])
        optimizer.load_state_dict(state["optimizer"])
        logit_scale.data.copy_(state["logit_scale"])
    if rank == 0:
        pictures, class_features = watch_set(384, seed + 1), single[0]
        bar = tqdm(total=steps, initial=start, desc="image tower", smoothing=0.02)
    began, losses = time.time() - earlier, []
    for step in range(start, steps):
        progress = (step + 1) / steps
        decay = max(0.0, progress - DECAY_FROM) / (1 - DECAY_FROM)
        rate = LEARNING_RATE * min(1, (step + 1) / WARMUP) * (0.5 * (1 + math.cos(math.pi * decay)) + 0.005)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rng = np.random.default_rng([seed, step, rank])
        batch, captions, present, against = training_batch(pools, single, double, progress, rng)
        tower.train()
        with torch.autocast("cpu", torch.bfloat16):
            features = tower(normalized(batch))
        features, sharpness = F.normalize(features.float(), dim=-1), logit_scale.exp()
        negatives = (sharpness * features @ against.T).masked_fill(present, -1e4)
        logits = torch.cat([negatives, sharpness * (features * captions).sum(-1, keepdim=True)], 1)
        loss = F.cross_entropy(logits, torch.full((BATCH,), len(CLASSES)))
        optimizer.zero_grad()
        loss.backward()
        assert logit_scale.grad is not None
        dist.all_reduce(logit_scale.grad)
        logit_scale.grad.div_(WORLD)
        torch.nn.utils.clip_grad_norm_([*model.visual.parameters(), logit_scale], 1.0)
        optimizer.step()
        with torch.no_grad():
            logit_scale.clamp_(0, math.log(50))
        losses.append(loss.item())
        if rank == 0:
            bar.update()
            if (step + 1) % 400 == 0 or step + 1 == steps:
                row = {
                    "step": step + 1,
                    "pictures": (step + 1) * BATCH * WORLD,
                    "loss": round(float(np.mean(losses[-400:])), 3),
                    "logit_scale": round(math.exp(logit_scale.item()), 2),
                    **watch(model, pictures, class_features),
                    "seconds": round(time.time() - began),
                }
                with open(work / "log.jsonl", "a") as log:
                    log.write(json.dumps(row) + "\n")
                tqdm.write(json.dumps(row))
                state = {
                    "step": step + 1,
                    "seconds": row["seconds"],
                    "visual": model.visual.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "logit_scale": logit_scale.detach(),
                }
                torch.save(state, work / "checkpoint.tmp")
                os.replace(work / "checkpoint.tmp", saved)
    dist.destroy_process_group()
