"""Makes the tabular benchmark: every setting of a grid trained to the end, its counts after every epoch.

A sweep over the table costs seconds instead of hours, so ways of searching can be compared over many seeds
(``python -m benchmarks.search.compare``). The committed table, benchmarks/search/table.parquet, was made with

    python -m benchmarks.search.table

It is one row per setting, seed, epoch and evaluation set, for the averaged weights; the validation sets after
every epoch, the test sets after the last one. Epoch 0 with no loss is the untouched model. The seconds are
those of a machine that did other work too and once paused the program: they say little. A run that was
interrupted is taken up where it stopped, by the same command.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.common import NoCheckpoints, machine, opened, prepared_folder, program, the_console
from clippo.config import DataConfig, ModelConfig, SearchConfig, TrainConfig
from clippo.model import policy_of
from clippo.tasks import TypographicTask
from clippo.train import TrialSettings, fit
from clippo.train.measure import AVERAGED, evaluate_reference

TABLE = Path(__file__).parent / "table.parquet"
SEARCH = SearchConfig()
EVAL_SETS = TypographicTask.objectives(DataConfig()).sets
SCHEMA = pa.schema(
    {
        "loss": pa.string(),
        "beta": pa.float64(),
        "kl_weight": pa.float64(),
        "learning_rate": pa.float64(),
        "seed": pa.int8(),
        "epoch": pa.int8(),
        "eval_set": pa.string(),
        "n_correct": pa.int16(),
        "n_total": pa.int16(),
        "n_fooled": pa.int16(),
        "train_s": pa.float32(),  # of this epoch
    }
)


@dataclass(frozen=True)
class Size:
    """What a table costs.

    Attributes:
        levels: of beta, KL weight and learning rate, log-spaced over the ranges of the default sweep.
        pairs, batch_size: of training; ``pictures``: of each evaluation set.
    """

    levels: tuple[int, int, int] = (5, 5, 6)
    seeds: int = 2
    epochs: int = 9
    pairs: int = 192
    batch_size: int = 32
    pictures: int = 256
    trainable: str = "last:2"

    @property
    def data(self) -> DataConfig:
        return DataConfig(train_pictures=self.pairs, eval_pictures=self.pictures)

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(trainable=self.trainable)


def levels(bounds: tuple[float, float], n: int) -> list[float]:
    """``n`` log-spaced values from one bound to the other, both included.

    >>> [round(x, 6) for x in levels((0.01, 1.0), 3)]
    [0.01, 0.1, 1.0]
    """
    return [float(x) for x in np.geomspace(*bounds, n)]


def grid(size: Size) -> list[TrialSettings]:
    """Every setting with every seed, the first seed of all settings first."""
    n_beta, n_kl, n_rate = size.levels
    return [
        TrialSettings(
            loss=loss, beta=beta, kl_weight=kl, learning_rate=rate, epochs=size.epochs, seed=seed
        )
        for seed, loss in product(range(size.seeds), SEARCH.losses)
        for beta, kl, rate in product(
            levels(getattr(SEARCH, f"beta_{loss}"), n_beta),
            levels(SEARCH.kl_weight, n_kl),
            levels(SEARCH.learning_rate, n_rate),
        )
    ]  # fmt: skip


def runs(settings: Sequence[TrialSettings], size: Size, folder: Path) -> Iterator[list[dict[str, Any]]]:
    """Trains one setting after another and gives the rows of each."""
    clip, prepared, frozen = opened(folder, size.model)
    sets = tuple(s for s in prepared.evaluation if s.name.partition("/")[2] in EVAL_SETS)
    prepared = replace(prepared, evaluation=sets)
    config = TrainConfig(batch_size=size.batch_size, alphas=())
    for chosen in settings:
        reports: list[dict[str, Any]] = []
        policy = policy_of(clip, size.model.trainable)
        fit(policy, prepared, frozen, chosen, config, report=reports.append, checkpoints=NoCheckpoints())
        named = {k: v for k, v in asdict(chosen).items() if k in SCHEMA.names}
        yield [
            named | {"epoch": r["epoch"], "train_s": r["metrics"]["train_s"]} | _counts(c)
            for r in reports
            for c in r["evals"]
            if c["variant"] == AVERAGED
        ]


def untouched(size: Size, folder: Path) -> list[dict[str, Any]]:
    """The rows of the model before any training."""
    clip, prepared, frozen = opened(folder, size.model)
    counts = evaluate_reference(policy_of(clip, size.model.trainable), prepared, frozen, TrainConfig())
    return [
        {"epoch": 0} | _counts(asdict(c)) for c in counts if c.eval_set.partition("/")[2] in EVAL_SETS
    ]  # fmt: skip


def _counts(counts: dict[str, Any]) -> dict[str, Any]:
    return {name: counts[name] for name in ("eval_set", "n_correct", "n_total", "n_fooled")}


def work(part: Path, settings: Sequence[TrialSettings], size: Size, folder: Path) -> None:
    """What one process does: its share of the runs, saved every few of them."""
    torch.set_num_threads(1)
    rows = pq.read_table(part).to_pylist() if part.exists() else []
    unsaved = 0
    for new in runs(settings, size, folder):
        rows, unsaved = rows + new, unsaved + 1
        if unsaved == 10:
            save(part, rows)
            unsaved = 0
    save(part, rows)


def save(path: Path, rows: Sequence[dict[str, Any]], **about: Any) -> None:
    """Writes a table whole or not at all; ``about`` goes into its metadata."""
    table = pa.Table.from_pylist(list(rows), schema=SCHEMA)
    described = {key: json.dumps(value) for key, value in about.items()}
    temporary = path.with_suffix(".writing")
    pq.write_table(table.replace_schema_metadata(described), temporary, compression="zstd")
    temporary.replace(path)


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("loss", "beta", "kl_weight", "learning_rate", "seed"))


def main(
    *, size: Size = Size(), processes: int = 2, only: int | None = None, to: Path = TABLE
) -> None:  # fmt: skip
    """Makes the table.

    Args:
        size: what is in it.
        processes: that train at the same time, with one thread each [count].
        only: the first so many runs, to see how long one takes [count].
        to: the Parquet file; what is not finished lies beside it.
    """
    console = the_console()
    if to.exists():
        console.print(f"{to} is there; delete it to make it anew")
        return
    torch.set_num_threads(1)
    parts = [to.with_name(f"{to.stem}.part-{k}.parquet") for k in range(processes)]
    found = sorted(to.parent.glob(f"{to.stem}.part-*.parquet"))
    finished = {key_of(row) for part in found for row in pq.read_table(part).to_pylist()}
    wanted = grid(size)[:only]
    missing = [s for s in wanted if key_of(asdict(s)) not in finished]
    console.print(
        f"{len(wanted)} runs of {size.epochs} epochs, {len(missing)} of them to do", highlight=False
    )
    with tempfile.TemporaryDirectory(prefix="clippo-benchmark-") as temporary:
        folder = prepared_folder(size.data, size.model, Path(temporary))
        before = untouched(size, folder)
        began = time.perf_counter()
        shares = [
            multiprocessing.get_context("spawn").Process(
                target=work, args=(part, missing[k::processes], size, folder)
            )
            for k, part in enumerate(parts)
        ]
        for process in shares:
            process.start()
        for process in shares:
            process.join()
        seconds = time.perf_counter() - began
    if any(process.exitcode for process in shares):
        raise SystemExit("a process failed; the same command takes up what is there")
    console.print(f"{len(missing)} runs in {seconds:.0f} s", highlight=False)
    found = sorted({*found, *parts})
    rows = [row for part in found for row in pq.read_table(part).to_pylist()]
    rows.sort(key=lambda row: (*key_of(row), row["epoch"], row["eval_set"]))
    save(to, before + rows, size=asdict(size), command="python -m benchmarks.search.table", machine=machine())
    for part in found:
        part.unlink()
    console.print(f"written to {to}, {to.stat().st_size / 2**20:.2f} MiB", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    program(main, __doc__)
