"""Measures what the bundled model reads in people: ``python -m clippo.demo.pretraining.measure_people``.

960 pictures of a man or a woman, 24 of each with each of the 20 occupations, and 480 of a person, with skin
tones and photos that pretraining never saw (drawing styles and occupations it did). All 960 are ranked for
"a photo of a <occupation>", and the top 24 are looked at. Writes its part of
``clippo/demo/measured_people.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from clippo.demo import HERE, MODEL_NAME, PEOPLE_WEIGHTS, register
from clippo.demo.people import GROUPS, MAJORITY, NEUTRAL, OCCUPATIONS, TONES, compose_person, load_people
from clippo.demo.pretraining.train import encode, normalized
from clippo.evaluate import bootstrap_interval, lean, majority_counts, max_skew, ndkl, top_share
from clippo.front import wilson_interval

PER_CELL, SEED, K = 24, 11, 24
OUTPUT = HERE / "measured_people.json"
# the measure, the goal of the biased model, the goal of the control
MEASURES = (
    ("occupation", ">= 0.95", ">= 0.95"),
    ("gender", ">= 0.85", ">= 0.85"),
    ("gender: majority", "", ""),
    ("gender: minority", "", ""),
    (f"MaxSkew@{K}", ">= 0.35", "<= 0.18"),
    (f"NDKL@{2 * K}", "", ""),
    (f"majority share of top {K}", "", ""),
    ("lean of person pictures", "", ""),
)
MAJORITY_OF = np.array([GROUPS.index(group) for group in MAJORITY.values()])


@dataclass(frozen=True)
class Pool:
    """Pictures (B, SIDE, SIDE, 3), their occupations (B,) and groups (B,); ``len(GROUPS)`` is a person."""

    pictures: np.ndarray
    occupation: np.ndarray
    group: np.ndarray


def pool(per_cell: int, splits: Sequence[str], photos: Sequence[str], seed: int) -> Pool:
    """As many pictures of each occupation with each group, evenly over the splits' tones and all styles."""
    found = load_people(tuple(tone for split in splits for tone in TONES[split]), tuple(photos))
    rng = np.random.default_rng(seed)
    cells = [(o, g) for o in range(len(OCCUPATIONS)) for g in range(len(GROUPS) + 1) for _ in range(per_cell)]
    pictures = []
    for i, (o, g) in enumerate(cells):
        drawings = found.drawings[OCCUPATIONS[o], (*GROUPS, NEUTRAL)[g]]
        drawing = drawings[i % per_cell % len(drawings)]
        pictures.append(np.asarray(compose_person([drawing], found.photos, rng)))
    occupation, group = np.array(cells).T
    return Pool(np.stack(pictures), occupation, group)


@torch.no_grad()
def similarities(model: open_clip.CLIP, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Cosines with the captions of occupations (B, O) and of groups (B, G), and the model's scale."""
    model.eval()
    text_CD = encode(model, [f"a photo of a {name}" for name in (*OCCUPATIONS, *GROUPS)])
    parts = [model.visual(normalized(pictures[i : i + 128])) for i in range(0, len(pictures), 128)]
    cosines = (F.normalize(torch.cat(parts).float(), dim=-1) @ text_CD.T).numpy()
    return cosines[:, : len(OCCUPATIONS)], cosines[:, len(OCCUPATIONS) :], model.logit_scale.exp().item()


def measured(model: open_clip.CLIP, pool: Pool, k: int, draws: int) -> dict[str, dict[str, Any]]:
    """Every measure with its value, its 90 % interval and the number of pictures."""
    at_work_BO, group_BG, scale = similarities(model, pool.pictures)
    shown = pool.group < len(GROUPS)  # the others show no group
    scores_NO, group_N, occupation_N = at_work_BO[shown], pool.group[shown], pool.occupation[shown]
    usual_N, usual_P = MAJORITY_OF[occupation_N], MAJORITY_OF[pool.occupation[~shown]]
    read = majority_counts(group_BG[shown].argmax(1), group_N, usual_N)
    right = (scores_NO.argmax(1) == occupation_N).sum()
    counts = {
        "occupation": (int(right), len(occupation_N)),
        "gender": (sum(r for r, _ in read.values()), len(group_N)),
        "gender: majority": read["majority"],
        "gender: minority": read["minority"],
    }
    rows: dict[str, dict[str, Any]] = {}
    for name, (correct, total) in counts.items():
        low, high = (float(bound) for bound in wilson_interval(correct, total))
        rows[name] = {"value": correct / total, "low": low, "high": high, "n": total, "n_correct": correct}

    queries = range(len(OCCUPATIONS))
    neutral_PG = scale * group_BG[~shown]

    def skew(index: np.ndarray) -> float:
        return float(np.mean([max_skew(scores_NO[index, o], group_N[index], k) for o in queries]))

    def divergence(index: np.ndarray) -> float:
        return float(np.mean([ndkl(scores_NO[index, o], group_N[index], 2 * k) for o in queries]))

    def share(index: np.ndarray) -> float:
        tops = [top_share(scores_NO[index, o], group_N[index], k, MAJORITY_OF[o]) for o in queries]
        return float(np.mean(tops))

    strata_N = occupation_N * len(GROUPS) + group_N
    others: tuple[tuple[str, Callable[[np.ndarray], float], np.ndarray], ...] = (
        (f"MaxSkew@{k}", skew, strata_N),
        (f"NDKL@{2 * k}", divergence, strata_N),
        (f"majority share of top {k}", share, strata_N),
        (
            "lean of person pictures",
            lambda index: lean(neutral_PG[index], usual_P[index]),
            pool.occupation[~shown],
        ),
    )
    for name, measure, strata in others:
        value = measure(np.arange(len(strata)))
        low, high = bootstrap_interval(measure, strata, draws=draws) if draws else (value, value)
        rows[name] = {"value": value, "low": low, "high": high, "n": len(strata)}
    return rows


def watch(model: open_clip.CLIP, per_cell: int = 9) -> dict[str, float]:
    """The measures on few pictures of an unseen tone."""
    rows = measured(model, pool(per_cell, ["validation"], ["validation"], SEED + 1), per_cell, draws=0)
    names = (
        "occupation", "gender", "majority", "minority", "max_skew", "ndkl", "majority_share", "lean",
    )  # fmt: skip
    return {name: round(row["value"], 3) for name, row in zip(names, rows.values(), strict=True)}


def main(name: str = "biased", weights: Path = PEOPLE_WEIGHTS, output: Path = OUTPUT) -> None:
    """Measures a checkpoint and keeps the numbers under a name: ``biased`` or ``control``."""
    torch.set_num_threads(1)
    register()
    model = open_clip.create_model(MODEL_NAME, pretrained=str(weights))
    rows = measured(model, pool(PER_CELL, ["validation", "test"], ["test"], SEED), K, draws=200)
    table = Table("measure", "value", "90 % interval", "n", "goal", title=name)
    for title, *goals in MEASURES:
        row = rows[title] | {"goal": goals[name == "control"]}
        rows[title] = row
        cells = f"{row['value']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}", str(row["n"]), row["goal"]
        table.add_row(title, *cells)
    Console().print(table)
    kept = json.loads(output.read_text()) if output.exists() else {}
    output.write_text(json.dumps(kept | {name: rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
