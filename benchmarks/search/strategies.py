"""The ways of searching that are compared, each behind ``suggest``, ``report`` and ``end``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna import samplers

from benchmarks.search.simulate import OBJECTIVES, WORKERS, Strategy, Tabular
from clippo.config import SearchConfig
from clippo.front import pareto_mask
from clippo.sweep.scheduler import epsilon_net, rule_of
from clippo.sweep.search import Search
from clippo.sweep.space import draw

NAMES = OBJECTIVES.names


class Ours:
    """The project's own search and early stopping, as Ray drives them.

    Args:
        budget: epochs of the sweep. The search is told that it is for as many trials as these make when each
            runs to its end; it sets by that how many are drawn at random first.
        more: fields of SearchConfig.
    """

    def __init__(self, table: Tabular, seed: int, budget: int, **more: Any) -> None:
        self._config = SearchConfig(
            trials=max(1, budget // table.epochs),
            concurrency=WORKERS,
            epochs=(table.epochs, table.epochs),
            seed=seed,
            objectives=NAMES,
            **more,
        )
        self._epochs = table.epochs
        self._stopped: set[str] = set()
        self._rule = rule_of(self._config)
        self._search = Search(
            self._config,
            lambda report: report["numbers"],
            OBJECTIVES,
            was_stopped=self._stopped.__contains__,
        )
        # What ends a simulated sweep is its budget of epochs, and stopped trials leave room for more.
        self._search.config = replace(self._config, trials=budget)

    def suggest(self, number: int) -> Mapping[str, Any]:
        proposal = self._search.suggest(str(number))
        assert isinstance(proposal, dict)
        settings: dict[str, Any] = proposal["settings"]
        return settings

    def report(self, number: int, epoch: int, values: Sequence[float]) -> bool:
        if self._rule is None or epoch == self._epochs:  # the scheduler asks of no trial that has finished
            return False
        stop = self._rule.decide(str(number), epoch, values).stop
        if stop:
            self._stopped.add(str(number))
        return stop

    def end(self, number: int, epoch: int, values: Sequence[float], stopped: bool) -> None:
        self._search.on_trial_complete(str(number), {"numbers": dict(zip(NAMES, values, strict=True))})


class Optuna:
    """A sampler of Optuna over the project's space without early stopping, as Ray's OptunaSearch runs it."""

    def __init__(self, table: Tabular, sampler: samplers.BaseSampler) -> None:
        self._config = SearchConfig(epochs=(table.epochs, table.epochs))
        self._study = optuna.create_study(directions=["maximize"] * 2, sampler=sampler)
        self._trials: dict[int, optuna.Trial] = {}

    def suggest(self, number: int) -> Mapping[str, Any]:
        self._trials[number] = self._study.ask()
        return draw(self._trials[number], self._config, "image")

    def report(self, number: int, epoch: int, values: Sequence[float]) -> bool:
        return False

    def end(self, number: int, epoch: int, values: Sequence[float], stopped: bool) -> None:
        self._study.tell(self._trials.pop(number), values)


class Short(Optuna):
    """The same where every trial is ended after so many epochs, whatever it reached.

    Its schedule of the learning rate is still that of a whole trial.
    """

    def __init__(self, table: Tabular, sampler: samplers.BaseSampler, epochs: int) -> None:
        super().__init__(table, sampler)
        self._epochs = epochs

    def report(self, number: int, epoch: int, values: Sequence[float]) -> bool:
        return epoch == self._epochs


class SyneTune:
    """A scheduler of Syne Tune.

    Its spaces know no conditions, so beta is a share of the loss's own range (in log scale): one parameter
    instead of three, of which two would be noise.
    """

    def __init__(self, make: Callable[[dict[str, Any]], Any], shift: Sequence[float] = (0.0, 0.0)) -> None:
        from syne_tune import config_space

        self._search = SearchConfig()
        self._shift = shift
        self._scheduler = make(
            {
                "loss": config_space.choice(list(self._search.losses)),
                "beta": config_space.uniform(0.0, 1.0),
                "kl_weight": config_space.loguniform(*self._search.kl_weight),
                "learning_rate": config_space.loguniform(*self._search.learning_rate),
            }
        )
        self._trials: dict[int, Any] = {}

    def suggest(self, number: int) -> Mapping[str, Any]:
        from syne_tune.backend.trial_status import Trial

        config = self._scheduler.suggest().config
        self._trials[number] = Trial(number, config, datetime.now())
        self._scheduler.on_trial_add(self._trials[number])
        low, high = getattr(self._search, f"beta_{config['loss']}")
        return config | {"beta": low * (high / low) ** config["beta"]}

    def report(self, number: int, epoch: int, values: Sequence[float]) -> bool:
        from syne_tune.optimizer.scheduler import SchedulerDecision

        decision = self._scheduler.on_trial_result(self._trials[number], self._result(epoch, values))
        return bool(decision == SchedulerDecision.STOP)

    def end(self, number: int, epoch: int, values: Sequence[float], stopped: bool) -> None:
        trial = self._trials.pop(number)
        if stopped:
            self._scheduler.on_trial_remove(trial)
        else:
            self._scheduler.on_trial_complete(trial, self._result(epoch, values))

    def _result(self, epoch: int, values: Sequence[float]) -> dict[str, Any]:
        shifted = [value + by for value, by in zip(values, self._shift, strict=True)]
        return dict(zip(NAMES, shifted, strict=True)) | {"epoch": epoch}


class Repaired:
    """MOASHA's order as its paper describes it, for the argument that MOASHA has for it.

    The order that Syne Tune 0.16 comes with hands back which trial is first, second, ..., where the scheduler
    expects the place of each trial, so its decisions have little to do with the objectives.
    """

    def __call__(self, objectives: NDArray[np.float64]) -> NDArray[np.float64]:
        places, rest, before = np.zeros(len(objectives)), np.arange(len(objectives)), 0
        while len(rest):
            on = pareto_mask(-objectives[rest])  # Syne Tune minimises
            front = rest[on]
            places[front[epsilon_net(-objectives[front])]] = before + np.arange(len(front))
            before, rest = before + len(front), rest[~on]
        return places


def moasha(table: Tabular, seed: int, **more: Any) -> SyneTune:
    """MOASHA draws its settings from numpy's global generator."""
    from syne_tune.optimizer.schedulers.multiobjective.moasha import MOASHA

    np.random.seed(seed)  # noqa: NPY002
    return SyneTune(
        lambda space: MOASHA(
            space, list(NAMES), do_minimize=False, time_attr="epoch", max_t=table.epochs,
            reduction_factor=3, random_seed=seed, **{"grace_period": 1} | more,
        )
    )  # fmt: skip


def ehvi(table: Tabular, seed: int) -> SyneTune:
    """Expected hypervolume improvement on Gaussian processes.

    Its reference point is 2 for every objective, whatever they are; that is where ours is shifted to.
    """
    from syne_tune.optimizer.baselines import EHVI

    np.random.seed(seed)  # noqa: NPY002
    reference = table.reference_points[0]
    shift = [2.0 - value for value in reference]
    return SyneTune(
        lambda space: EHVI(space, list(NAMES), do_minimize=False, random_seed=seed), shift
    )  # fmt: skip


def evolution(table: Tabular, seed: int) -> SyneTune:
    """Regularised evolution on non-dominated rank, with a population that fits the budget."""
    from syne_tune.optimizer.schedulers.multiobjective import MultiObjectiveRegularizedEvolution
    from syne_tune.optimizer.schedulers.single_fidelity_scheduler import SingleFidelityScheduler

    np.random.seed(seed)  # noqa: NPY002
    return SyneTune(
        lambda space: SingleFidelityScheduler(
            space, list(NAMES), do_minimize=False, random_seed=seed,
            searcher=MultiObjectiveRegularizedEvolution(
                space, population_size=20, sample_size=5, random_seed=seed,
                multiobjective_priority=Repaired(),
            ),
        )
    )  # fmt: skip


Make = Callable[[Tabular, int, int], Strategy]
"""A strategy from the table, the seed and the epochs of the sweep."""

OURS, RANDOM = "ours", "random"
RIVALS: dict[str, Make] = {
    "Optuna TPE": lambda table, seed, budget: Optuna(table, samplers.TPESampler(seed=seed)),
    "Optuna NSGA-II": lambda table, seed, budget: Optuna(table, samplers.NSGAIISampler(seed=seed)),
    "Optuna NSGA-II of 12": lambda table, seed, budget: Optuna(
        table, samplers.NSGAIISampler(population_size=12, seed=seed)
    ),
    "Optuna GP": lambda table, seed, budget: Optuna(table, samplers.GPSampler(seed=seed)),
    "MOASHA": lambda table, seed, budget: moasha(table, seed),
    "MOASHA, repaired": lambda table, seed, budget: moasha(table, seed, multiobjective_priority=Repaired()),
    "Syne Tune evolution": lambda table, seed, budget: evolution(table, seed),
    "Syne Tune EHVI": lambda table, seed, budget: ehvi(table, seed),
}


def ours(**more: Any) -> Make:
    return lambda table, seed, budget: Ours(table, seed, budget, **more)


def no_better(min_epochs: int = 3, min_gain: float = 0.01, **more: Any) -> Make:
    return ours(stopping="no_better", min_epochs=min_epochs, min_gain=min_gain, **more)


def halving(min_epochs: int, reduction_factor: int, **more: Any) -> Make:
    return ours(stopping="halving", min_epochs=min_epochs, reduction_factor=reduction_factor, **more)


STRATEGIES: dict[str, Make] = {
    OURS: no_better(),
    RANDOM: lambda table, seed, budget: Optuna(table, samplers.RandomSampler(seed=seed)),
    **RIVALS,
}
EXPLAINING = ("ours, not stopped", "ours, random settings", "ours, halving at 3 6", "random, 3 epochs")
"""Those of the variants that say where a difference comes from."""
VARIANTS: dict[str, Make] = {
    "ours, not stopped": ours(),
    "ours, random settings": no_better(sampler="random"),
    "ours, halving at 3 6": halving(3, 2),
    "ours, halving at 1 3": halving(1, 3),
    "random, 3 epochs": lambda table, seed, budget: Short(table, samplers.RandomSampler(seed=seed), 3),
    "Optuna TPE, 3 epochs": lambda table, seed, budget: Short(table, samplers.TPESampler(seed=seed), 3),
    "MOASHA, repaired, at 3": lambda table, seed, budget: moasha(
        table, seed, multiobjective_priority=Repaired(), grace_period=3
    ),
    "ours, halving at 2 6": halving(2, 3),
    "ours, halving at 1 2 4 8": halving(1, 2),
    "ours, from 1": no_better(1),
    "ours, from 2": no_better(2),
    "ours, from 4": no_better(4),
    "ours, from 5": no_better(5),
    "ours, gain 0": no_better(min_gain=0.0),
    "ours, gain 0.005": no_better(min_gain=0.005),
    "ours, gain 0.02": no_better(min_gain=0.02),
    "ours, qmc": no_better(sampler="qmc"),
    "ours, nsga2": no_better(sampler="nsga2"),
    "ours, gp": no_better(sampler="gp"),
}
"""Ways of ours that are tried against each other, and what tells why; ``--names`` compares them."""
