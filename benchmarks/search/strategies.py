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
from clippo.sweep.scheduler import Decision, Halving, epsilon_net
from clippo.sweep.search import Search
from clippo.sweep.space import draw

NAMES = OBJECTIVES.names


class NoBetter:
    """Stops a trial after an epoch when others, or itself before, came about as far with no more epochs.

    As far: no worse than its values less ``tolerance`` in all objectives. An experiment: sweeps do not do it.
    """

    def __init__(self, min_epochs: int, tolerance: float) -> None:
        self._min_epochs, self._tolerance = min_epochs, tolerance
        self._known: list[tuple[int, NDArray[np.float64]]] = []

    def decide(self, trial_id: str, epoch: int, values: Sequence[float]) -> Decision:
        if epoch < self._min_epochs:
            return Decision(stop=False)
        reached = np.asarray(values)
        least = reached - self._tolerance
        stop = any(e <= epoch and bool((v >= least).all()) for e, v in self._known)
        self._known.append((epoch, reached))
        return Decision(stop=stop)


class Ours:
    """The project's own search, and its own early stopping unless ``halving`` is None, as Ray drives them.

    Args:
        budget: epochs of the sweep. The search is told that it is for as many trials as these make when each
            runs to its end; it sets by that how many are drawn at random first.
        more: fields of SearchConfig.
    """

    def __init__(
        self, table: Tabular, seed: int, budget: int, *, halving: Halving | NoBetter | None, **more: Any
    ) -> None:  # fmt: skip
        self._config = SearchConfig(
            trials=max(1, budget // table.epochs),
            concurrency=WORKERS,
            epochs=(table.epochs, table.epochs),
            seed=seed,
            objectives=NAMES,
            **more,
        )
        self._stopped: set[str] = set()
        self._halving = halving
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
        if self._halving is None or not self._halving.decide(str(number), epoch, values).stop:
            return False
        self._stopped.add(str(number))
        return True

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
            grace_period=1, reduction_factor=3, random_seed=seed, **more,
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


def halving(table: Tabular, min_epochs: int, reduction_factor: int) -> Halving:
    return Halving(min_epochs=min_epochs, reduction_factor=reduction_factor, max_epochs=table.epochs)


Make = Callable[[Tabular, int, int], Strategy]
"""A strategy from the table, the seed and the epochs of the sweep."""

OURS, RANDOM = "ours", "random"
RIVALS: dict[str, Make] = {
    "Optuna TPE": lambda table, seed, budget: Optuna(table, samplers.TPESampler(seed=seed)),
    "Optuna NSGA-II": lambda table, seed, budget: Optuna(table, samplers.NSGAIISampler(seed=seed)),
    "Optuna GP": lambda table, seed, budget: Optuna(table, samplers.GPSampler(seed=seed)),
    "MOASHA": lambda table, seed, budget: moasha(table, seed),
    "MOASHA, repaired": lambda table, seed, budget: moasha(table, seed, multiobjective_priority=Repaired()),
    "Syne Tune evolution": lambda table, seed, budget: evolution(table, seed),
    "Syne Tune EHVI": lambda table, seed, budget: ehvi(table, seed),
}
STRATEGIES: dict[str, Make] = {
    OURS: lambda table, seed, budget: Ours(table, seed, budget, halving=halving(table, 3, 2)),
    RANDOM: lambda table, seed, budget: Optuna(table, samplers.RandomSampler(seed=seed)),
    **RIVALS,
}
VARIANTS: dict[str, Make] = {
    "ours, not stopped": lambda table, seed, budget: Ours(table, seed, budget, halving=None),
    "ours, rungs 1 3": lambda table, seed, budget: Ours(table, seed, budget, halving=halving(table, 1, 3)),
    "ours, rungs 1 2 4 8": lambda table, seed, budget: Ours(
        table, seed, budget, halving=halving(table, 1, 2)
    ),
    "ours, rungs 2 4 8": lambda table, seed, budget: Ours(table, seed, budget, halving=halving(table, 2, 2)),
    "ours, rung 3": lambda table, seed, budget: Ours(table, seed, budget, halving=halving(table, 3, 3)),
    "ours, no better from 3": lambda table, seed, budget: Ours(
        table, seed, budget, halving=NoBetter(3, 0.01)
    ),
    "ours, no better from 2": lambda table, seed, budget: Ours(
        table, seed, budget, halving=NoBetter(2, 0.01)
    ),
    "ours, no better from 1": lambda table, seed, budget: Ours(
        table, seed, budget, halving=NoBetter(1, 0.01)
    ),
    "random, no better from 3": lambda table, seed, budget: Ours(
        table, seed, budget, halving=NoBetter(3, 0.01), sampler="random"
    ),
    "ours, qmc": lambda table, seed, budget: Ours(
        table, seed, budget, halving=halving(table, 3, 2), sampler="qmc"
    ),
    "ours, qmc, not stopped": lambda table, seed, budget: Ours(
        table, seed, budget, halving=None, sampler="qmc"
    ),
    "ours, random": lambda table, seed, budget: Ours(
        table, seed, budget, halving=halving(table, 3, 2), sampler="random"
    ),
}
"""Ways of ours that are tried against each other; ``--names`` compares them."""
