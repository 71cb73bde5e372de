"""The search benchmarks: the table is whole, a simulated sweep pays for what it takes, every program runs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.search import compare, driver, table
from benchmarks.search.simulate import Tabular, simulate
from benchmarks.search.strategies import OURS, RANDOM, STRATEGIES, Repaired
from clippo.front import hypervolume


@pytest.fixture(scope="module")
def tabular() -> Tabular:
    return Tabular.load()


class Scripted:
    """Proposes settings of the table one after another and stops some trials."""

    def __init__(self, settings: Sequence[dict[str, Any]], stops: dict[int, int]) -> None:
        self.settings, self.stops = settings, stops
        self.reports: list[tuple[int, int]] = []
        self.ended: list[tuple[int, int, bool]] = []

    def suggest(self, number: int) -> dict[str, Any]:
        return self.settings[number % len(self.settings)]

    def report(self, number: int, epoch: int, values: Sequence[float]) -> bool:
        self.reports.append((number, epoch))
        return self.stops.get(number) == epoch

    def end(self, number: int, epoch: int, values: Sequence[float], stopped: bool) -> None:
        self.ended.append((number, epoch, stopped))


def test_the_table_holds_every_setting_with_every_seed_after_every_epoch(tabular: Tabular) -> None:
    settings = len(tabular.losses) * 5 * len(tabular.kl_weights) * len(tabular.learning_rates)
    assert settings >= 400
    assert tabular.validation.shape == (3, 5, 5, 6, 2, 9, 2)
    assert np.isfinite(tabular.validation).all()
    assert np.isfinite(tabular.test).all()
    assert tabular.validation.min() >= 0
    assert tabular.validation.max() <= 1
    assert table.TABLE.stat().st_size < 4 * 2**20
    # tuning does something, and a setting that is tuned hard does more of it
    hard = tabular.nearest({"loss": "dpo", "beta": 0.02, "kl_weight": 0.1, "learning_rate": 5e-4})
    assert tabular.validation[hard][:, -1, 0].min() > tabular.untouched[0] + 0.3


def test_settings_go_to_the_nearest_level_in_log_scale(tabular: Tabular) -> None:
    loss = tabular.losses.index("ipo")
    low, high = tabular.betas["ipo"][[0, 1]]
    between = float(np.sqrt(low * high))
    settings = {"loss": "ipo", "kl_weight": 1e-9, "learning_rate": 1.0}
    last = len(tabular.learning_rates) - 1
    assert tabular.nearest(settings | {"beta": between * 0.99}) == (loss, 0, 0, last)
    assert tabular.nearest(settings | {"beta": between * 1.01}) == (loss, 1, 0, last)


def test_a_sweep_pays_for_every_epoch_and_gives_the_other_seed_the_second_time(tabular: Tabular) -> None:
    same = {"loss": "dpo", "beta": 0.02, "kl_weight": 0.1, "learning_rate": 5e-4}
    strategy = Scripted([same], stops={1: 2})
    sweep = simulate(tabular, strategy, budget=60, seed=0, workers=2)
    assert len(strategy.reports) == 60
    assert strategy.ended[:3] == [(1, 2, True), (0, 9, False), (2, 9, False)]
    assert sweep.epochs[:3] == [2, 9, 9]
    assert sweep.spent[:3] == [4, 17, 22]  # two epochs each; nine and eight more; and so on
    where = tabular.nearest(same)
    curves = tabular.validation[where]
    first = sweep.validation[1]
    assert any(np.array_equal(first, curve[-1]) for curve in curves)
    seeds = [s for s in range(2) if np.array_equal(curves[s, -1], first)]
    assert np.array_equal(sweep.validation[0], curves[1 - seeds[0], 1])  # the second proposal, two epochs
    assert np.array_equal(sweep.validation[2], curves[seeds[0], -1])  # the third is the first again


def test_what_a_sweep_has_found(tabular: Tabular) -> None:
    settings = [
        {"loss": "dpo", "beta": 0.1, "kl_weight": k, "learning_rate": r}
        for k in (0.1, 1.0, 10.0)
        for r in (1e-4, 5e-4)
    ]
    stopped = simulate(tabular, Scripted(settings, dict.fromkeys(range(99), 8)), budget=100, seed=0)
    had = np.array([tabular.validation[tabular.nearest(s)][:, 7] for s in settings]).reshape(-1, 2).tolist()
    assert all(v.tolist() in had for v in stopped.validation)
    volume = hypervolume([v.tolist() for v in stopped.validation], tabular.reference_points[0])
    assert stopped.curve(tabular, 100, split="validation")[-1] == pytest.approx(volume / tabular.best[0])
    assert stopped.curve(tabular, 100, split="test").max() == 0, "that is not known of early epochs"
    whole = simulate(tabular, Scripted(settings, {}), budget=100, seed=0)
    curve = whole.curve(tabular, 100, split="validation")
    assert (np.diff(curve) >= 0).all()
    volume = hypervolume([v.tolist() for v in whole.validation], tabular.reference_points[0])
    assert curve[-1] == pytest.approx(volume / tabular.best[0])
    assert 0 < whole.curve(tabular, 100, split="test")[-1] < 1.1


def test_the_repaired_order_gives_each_trial_its_place() -> None:
    minimised = np.array([[3.0, 3.0], [0.0, 2.0], [2.0, 0.0], [1.0, 1.0]])
    assert Repaired()(minimised)[0] == 3  # dominated by another
    assert sorted(Repaired()(minimised)) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", [RANDOM, OURS])
def test_strategies_are_reproducible(tabular: Tabular, name: str) -> None:
    def sweep(seed: int) -> list[int]:
        return simulate(tabular, STRATEGIES[name](tabular, seed, 120), budget=120, seed=seed).spent

    assert sweep(1) == sweep(1)


def test_epochs_until_a_share_is_reached() -> None:
    assert compare.epochs_to(np.array([0.0, 0.5, 0.95, 0.96])) == 2
    assert compare.epochs_to(np.array([0.0, 0.5, 0.6])) == 2  # not reached


def test_the_comparison_runs(tmp_path: Path) -> None:
    compare.main(smoke=True, processes=1, results=tmp_path)
    found = json.loads((tmp_path / "search.json").read_text())
    assert {run["name"] for run in found["runs"]} == {RANDOM, OURS}
    assert (tmp_path / "search.png").stat().st_size > 10_000


def test_the_driver_is_timed_and_stopped(tmp_path: Path) -> None:
    driver.main(smoke=True, results=tmp_path)
    found = json.loads((tmp_path / "search-driver.json").read_text())
    assert all(len(seconds) == 3 for seconds in found["seconds"].values())
    found, spent = driver.measure("tpe", 10_000, 1, bound=0.01)
    assert (found, spent > 0) == ([], True)
    [line] = driver.lines_of("gp", 5_000, [1.0], spent=60)
    assert (line.what, line.value.median) == ("gp, 5000 finished trials: not one after", 60)


def test_the_table_is_made_and_taken_up_again(tmp_path: Path) -> None:
    size = table.Size(levels=(1, 1, 1), seeds=1, epochs=2, pairs=8, batch_size=4, pictures=4)
    path = tmp_path / "small.parquet"
    table.main(size=size, processes=1, only=1, to=path)
    first = [row for row in table.pq.read_table(path).to_pylist() if row["loss"]]
    path.unlink()
    table.save(tmp_path / "small.part-0.parquet", first)  # as a run that was interrupted leaves it
    table.main(size=size, processes=1, to=path)
    rows = table.pq.read_table(path).to_pylist()
    assert [r for r in rows if r["loss"] == "dpo"] == first
    assert {r["loss"] for r in rows} == {None, "dpo", "ipo", "kto"}
    assert len(rows) == 10 + 3 * (2 * 5 + 5)  # untouched; validation after each epoch, test after the last
