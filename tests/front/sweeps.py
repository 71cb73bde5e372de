"""Sweeps that never ran: settings become counts by a formula, with the noise that counts have.

Shapes: T trials, K measurements of each (an evaluation set, of a split, by a variant of the weights).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import numpy as np
import pyarrow as pa

from clippo.config import DataConfig
from clippo.results import TABLES, ResultStore
from clippo.tasks import TypographicTask

OBJECTIVES, WORDS = TypographicTask.objectives(DataConfig()), TypographicTask.words
NEEDED = OBJECTIVES.sets
BASE = {
    "attacked/seen": 0.42, "attacked/held_out": 0.38, "clean/seen": 0.97, "clean/held_out": 0.96,
    "reading/seen": 0.98, "reading/held_out": 0.97, "nonsense/seen": 0.85, "nonsense/held_out": 0.82,
    "clean/rta-100": 0.9, "attacked/rta-100": 0.5,
}  # fmt: skip
SPLITS = ("validation", "test")
Measurement = tuple[str, float, str, str]  # variant, strength of the tuning, evaluation set, split
PUBLISHED = [(name, "test") for name in BASE if "rta" in name]
OWN = [
    (name, split)
    for name in BASE
    for split in SPLITS
    if "rta" not in name and not (name.startswith("nonsense") and split == "validation")
]
ALPHAS = tuple(f"{i / 10:g}" for i in range(11))
SKILL = {"dpo": 0.95, "ipo": 1.0, "kto": 0.97, "cross_entropy": 0.85}
BASELINE = {
    "loss": "cross_entropy", "beta": None, "kl_weight": 0.0, "learning_rate": 1.2e-4, "epochs": 2, "seed": 0,
}  # fmt: skip
CONFIG = {
    "task": "typographic",
    "results": "/somewhere/private",
    "objectives": OBJECTIVES.to_json(),
    "words": WORDS.to_json(),
    "model": {"name": "clippo-demo", "pretrained": None, "trainable": "last:2"},
    "data": {"source": "demo"},
    "usage": 'import open_clip\nmodel = open_clip.create_model("demo", pretrained="model.safetensors")',
}
START = datetime(2026, 11, 1, 12, tzinfo=timezone.utc)


@dataclass(frozen=True)
class Sweep:
    """Rows as a store gives them."""

    trials: list[dict[str, Any]]
    evals: pa.Table

    @property
    def trial_table(self) -> pa.Table:
        return pa.Table.from_pylist(self.trials, schema=TABLES["trials"])

    def write(self, store: ResultStore, name: str = "made") -> None:
        self.write_config(store, name)
        self.write_rows(store, name)

    def write_config(self, store: ResultStore, name: str = "made") -> None:
        store.write_config(name, {**CONFIG, "name": name})

    def write_rows(self, store: ResultStore, name: str = "made") -> None:
        by_trial: dict[str, list[dict[str, Any]]] = {}
        for row in self.evals.to_pylist():
            by_trial.setdefault(row["trial_id"], []).append({n: v for n, v in row.items() if n != "sweep"})
        for row in self.trials:
            trial = {n: v for n, v in row.items() if n not in ("sweep", "trial_id", "attempt")}
            metrics = [{"epoch": 1, "step": 16, "name": "loss", "value": 0.5}]
            store.write_trial(name, row["trial_id"], 0, trial, metrics, by_trial.get(row["trial_id"], []))


def make_sweep(
    trials: int, *, seed: int = 0, pictures: int = 384, correlation: float = 0.9, seeds: int = 1,
    seed_sd: float = 0.0,
) -> Sweep:  # fmt: skip
    """An untouched model, a baseline, and numbered trials, of which every 17th failed.

    Args:
        correlation: how much of their noise the models of a sweep's curve share.
        seeds: of each of the first four trials.
        seed_sd: how far another seed moves every accuracy, a standard deviation.
    """
    rng = np.random.default_rng(seed)
    settings: dict[str, dict[str, Any]] = {"cross_entropy": BASELINE}
    settings |= {f"{i:05d}": drawn(rng) for i in range(trials)}
    for i in range(4 if seeds > 1 else 0):
        settings |= {f"{i:05d}-s{s}": {**settings[f"{i:05d}"], "seed": s} for s in range(1, seeds)}
    rows = [trial_row("reference", None, 0)]
    rows += [
        trial_row(i, s, n, failed=i.isdigit() and int(i) % 17 == 16)
        for n, (i, s) in enumerate(settings.items(), 1)
    ]
    done = [r["trial_id"] for r in rows[1:] if r["status"] == "completed"]
    ran = [settings[i] for i in done]

    untouched = measure(rng, [None], [("reference", 0.0, *p) for p in (*OWN, *PUBLISHED)], pictures, 0.0, 0.0)
    what = [("averaged", 0.8, *p) for p in (*OWN, *PUBLISHED)] + [("last", 1.0, *p) for p in OWN]
    what += [(f"alpha={a}", 0.8 * float(a), n, s) for a in ALPHAS for n in NEEDED for s in SPLITS]
    tuned = measure(rng, ran, what, pictures, correlation, seed_sd)
    column = {(variant, *place): k for k, (variant, _, *place) in enumerate(what)}
    for name in NEEDED:
        for split in SPLITS:  # the ends of a curve are measured already
            reference = untouched[:, :, [*OWN, *PUBLISHED].index((name, split))]
            tuned[:, :, column["alpha=0", name, split]] = reference
            tuned[:, :, column["alpha=1", name, split]] = tuned[:, :, column["averaged", name, split]]
    # What a trial was after an earlier epoch is not what it ended as.
    early = [i for i, s in zip(done, ran, strict=True) if s["epochs"] == 2]
    first = [("averaged", 0.1, *p) for p in OWN if p[1] == "validation"]
    before = measure(rng, [settings[i] for i in early], first, pictures, 0.0, 0.0)
    tables = [
        table(["reference"], [0], [("reference", 0.0, *p) for p in (*OWN, *PUBLISHED)], untouched, pictures),
        table(done, [s["epochs"] for s in ran], what, tuned, pictures),
        table(early, [1] * len(early), first, before, pictures),
    ]
    return Sweep(rows, pa.concat_tables(tables))


def drawn(rng: np.random.Generator) -> dict[str, Any]:
    """Settings of a trial."""
    loss = str(rng.choice(["dpo", "ipo", "kto"]))
    return {
        "loss": loss,
        "beta": float(10 ** rng.uniform(-1.7, -0.7 if loss == "ipo" else 0)),
        "kl_weight": float(10 ** rng.uniform(-1, 1.5)),
        "learning_rate": float(10 ** rng.uniform(-4.52, -3.3)),
        "epochs": int(rng.integers(1, 3)),
        "seed": 0,
    }


def measure(
    rng: np.random.Generator, settings: Sequence[dict[str, Any] | None], what: Sequence[Measurement],
    pictures: int, correlation: float, seed_sd: float,
) -> np.ndarray:  # fmt: skip
    """Counts of correct and of fooled pictures, (2, T, K)."""
    strength = np.array([w[1] for w in what])
    kinds = np.array([w[2].split("/")[0] for w in what])
    base = np.array([BASE[w[2]] - 0.08 * (w[2][0] == "a" and w[3] == "test") for w in what])
    share_TK = np.tile(base, (len(settings), 1))
    if settings and settings[0] is not None:
        # More learning moves further along a bent trade-off; a weak KL term pays more for it.
        column = {
            n: np.array([[s[n]] for s in settings if s]) for n in ("learning_rate", "epochs", "kl_weight")
        }
        skill = np.array([[SKILL[s["loss"]]] for s in settings if s])
        push = np.log10(column["learning_rate"] / 3e-5) / 1.3 * (0.7 + 0.3 * column["epochs"])
        moved = np.clip(strength * push * (0.5 + 0.5 / (1 + column["kl_weight"])), 0, 1.2)
        gain = 0.55 * skill * (1 - np.exp(-3 * moved)) / (1 - np.exp(-3.6))
        loss = (0.02 + 0.35 * (1.05 - skill)) * moved**3
        share_TK += np.select(
            [kinds == "attacked", kinds == "clean", kinds == "reading"], [gain, -loss / 6, -loss], 0.05 * gain
        )
        share_TK += seed_sd * rng.normal(size=(len(settings), 1)) * strength
    share_TK = np.clip(share_TK, 0.01, 0.995)
    places = {place: i for i, place in enumerate(sorted({tuple(w[2:]) for w in what}))}
    common = rng.normal(size=(len(settings), len(places)))[:, [places[w[2:]] for w in what]]
    noise = np.sqrt(correlation) * common + np.sqrt(1 - correlation) * rng.normal(size=share_TK.shape)
    correct = np.rint(pictures * share_TK + noise * np.sqrt(pictures * share_TK * (1 - share_TK)))
    correct = np.clip(correct, 0, pictures)
    return np.stack([correct, np.rint(0.8 * (pictures - correct)) * (kinds == "attacked")]).astype(np.int64)


def table(
    ids: Sequence[str], epochs: Sequence[int], what: Sequence[Measurement], counts: np.ndarray, pictures: int
) -> pa.Table:
    """Counts as rows of the table of evaluations."""
    rows = len(ids) * len(what)
    columns = {
        "sweep": ["made"] * rows,
        "trial_id": np.repeat(ids, len(what)) if ids else [],
        "attempt": np.zeros(rows, dtype=np.int64),
        "epoch": np.repeat(np.array(epochs, dtype=np.int64), len(what)),
        "eval_set": [f"{split}/{name}" for _, _, name, split in what] * len(ids),
        "variant": [variant for variant, *_ in what] * len(ids),
        "seed": np.zeros(rows, dtype=np.int64),
        "n_correct": counts[0].ravel(),
        "n_total": np.full(rows, pictures, dtype=np.int64),
        "n_fooled": counts[1].ravel(),
    }
    return pa.table(columns, schema=TABLES["evals"])


def trial_row(
    trial_id: str, settings: dict[str, Any] | None, number: int, *, failed: bool = False
) -> dict[str, Any]:
    """A row of the table of trials."""
    finished = START + timedelta(seconds=40 * (number + 1))
    return {
        "sweep": "made", "trial_id": trial_id, "attempt": 0, **(settings or {}),
        "status": "failed" if failed else "completed",
        "error": "the loss became NaN at step 7; lower the learning rate" if failed else None,
        "started_at": finished - timedelta(seconds=40), "finished_at": finished, "batch_size": 64,
        "workers": 0, "trainable": "last:2", "optimizer": "adamw", "precision": "bf16", "params_json": "{}",
        "wall_s": 40.0, "device_s": 36.0 if settings else 0.0, "device_type": "cpu", "preemptions": 0,
        "code_version": "0.1.0", "git_commit": "d2e00b1d411a7bba6ab0b01b0792c6d2b39ffcac",
        "packages_json": json.dumps({"torch": "2.14.1", "ray": "2.60.0"}), "model_digest": "024dccb7abf274bb",
        "data_digest": "e1b7f55dcf2404d8", "prepared_digest": "98bd3a048d09215d",
    }  # fmt: skip
