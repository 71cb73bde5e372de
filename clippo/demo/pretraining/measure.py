"""Measures the bundled model: is it fooled because it reads? ``python -m clippo.demo.pretraining.measure``

2,560 pictures a set, 20 of each of the 128 classes, told apart among all 128, with photos and lettering that
pretraining never saw (the drawing style is one of its three). The same pictures carry, in turn, no word,
another class's name, a word of its shape that means nothing, a real word that is no class, and the class's
name mirrored: the same ink, unreadable. Last, a class name on a picture of nothing. Writes
``clippo/demo/measured.json``.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from clippo.config import DataConfig
from clippo.data.attack import FONTS, WordStyle, draw_word
from clippo.data.pairs import other_label, picture_rng
from clippo.demo import CLASSES, HERE, MODEL_NAME, WEIGHTS
from clippo.demo.pretraining.material import control_words
from clippo.demo.scenes import compose, material_of_split
from clippo.front import wilson_interval
from clippo.model import load_clip
from clippo.tasks.typographic import nonsense_like

PER_CLASS, SEED, BATCH = 20, 7, 128
# what is measured, the set, which label counts, the goal
MEASURES = (
    ("clean", "clean", "thing", ">= 0.94"),
    ("attacked: read as the word", "attacked", "word", ">= 0.55"),
    ("attacked: true", "attacked", "thing", ""),
    ("nonsense word: true", "nonsense", "thing", ">= 0.80"),
    ("real word that is no class: true", "no class", "thing", ">= 0.75"),
    ("mirrored word: read as the word", "mirrored", "word", "<= 0.05"),
    ("mirrored word: true", "mirrored", "thing", ""),
    ("word reading", "reading", "word", ">= 0.80"),
)


def pictures_of(thing: int, copy: int) -> tuple[int, dict[str, Image.Image]]:
    """The written class and the pictures of one thing, one for each set."""
    rng = picture_rng(SEED, CLASSES[thing], copy)
    material = material_of_split("test")
    style = WordStyle(fonts=FONTS["test"], font_size=DataConfig().font_size)
    controls = control_words()
    clean, nothing = compose(material, CLASSES[thing], rng), compose(material, None, rng)
    word = other_label(thing, range(len(CLASSES)), rng)
    name = CLASSES[word]
    state = rng.bit_generator.state
    attacked = draw_word(clean, name, rng, style=style)
    rng.bit_generator.state = state  # the twin has the same font, colours and place
    mirrored = draw_word(clean, name, rng, style=style, mirrored=True)
    return word, {
        "clean": clean,
        "attacked": attacked,
        "mirrored": mirrored,
        "nonsense": draw_word(clean, nonsense_like(name, CLASSES, rng), rng, style=style),
        "no class": draw_word(clean, controls[int(rng.integers(len(controls)))], rng, style=style),
        "reading": draw_word(nothing, name, rng, style=style),
    }


@torch.no_grad()
def main(weights: Path = WEIGHTS, output: Path = HERE / "measured.json") -> None:
    torch.set_num_threads(1)
    clip = load_clip(MODEL_NAME, str(weights))
    text_CD = clip.text_features([f"a photo of a {c}" for c in CLASSES])
    things = [(c, k) for c in range(len(CLASSES)) for k in range(PER_CLASS)]
    labels: dict[str, list[int]] = {"thing": [], "word": []}
    said: dict[str, list[int]] = {}
    for start in tqdm(range(0, len(things), BATCH), "measuring"):
        chunk = [pictures_of(*t) for t in things[start : start + BATCH]]
        labels["thing"] += [c for c, _ in things[start : start + BATCH]]
        labels["word"] += [word for word, _ in chunk]
        for name in chunk[0][1]:
            pixels = torch.from_numpy(np.stack([np.asarray(p[name]) for _, p in chunk]))
            embeddings = clip.model.visual(clip.normalized(pixels))  # type: ignore[operator]
            said.setdefault(name, []).extend((embeddings @ text_CD.T).argmax(1).tolist())

    table, rows = Table("measure", "share", "90 % interval", "n", "goal"), []
    for title, name, label, goal in MEASURES:
        right = int((np.array(said[name]) == np.array(labels[label])).sum())
        low, high = (float(bound) for bound in wilson_interval(right, len(things)))
        rows.append(
            {
                "measure": title,
                "n_correct": right,
                "n_total": len(things),
                "low": low,
                "high": high,
                "goal": goal,
            }
        )
        table.add_row(title, f"{right / len(things):.3f}", f"{low:.3f} to {high:.3f}", str(len(things)), goal)
    Console().print(table)
    output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
