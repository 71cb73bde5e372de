"""The search space: what Optuna draws for one trial, and how a result row reads as such a draw."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from clippo.config import SearchConfig
from clippo.errors import ConfigError
from clippo.losses import OF_ONE_PICTURE, resolve_loss
from clippo.tasks import Task

LOSSES_WITH_BETA = ("dpo", "ipo", "kto")
SHARED = ("kl_weight", "learning_rate", "epochs", "orthogonality", "pairs")


def distributions(search: SearchConfig, loss: str, trainable: str) -> dict[str, BaseDistribution]:
    """The parameters of a trial with this loss. Each loss has its own beta, since their scales differ."""
    resolve_loss(loss)
    space: dict[str, BaseDistribution] = {
        "loss": CategoricalDistribution(search.losses),
        "kl_weight": FloatDistribution(*search.kl_weight, log=True),
        "learning_rate": FloatDistribution(*search.learning_rate, log=True),
        "epochs": IntDistribution(*search.epochs),
    }
    if loss in LOSSES_WITH_BETA:
        low, high = getattr(search, f"beta_{loss}")
        space[f"beta_{loss}"] = FloatDistribution(low, high, log=True)
    if trainable == "transform":
        space["orthogonality"] = FloatDistribution(*search.orthogonality, log=True)
    if search.pairs:
        space["pairs"] = CategoricalDistribution(search.pairs)
    return space


def draw(trial: optuna.Trial, search: SearchConfig, trainable: str) -> dict[str, Any]:
    """Draws the settings of one trial; ``beta`` is None for a loss that has none."""
    loss = trial.suggest_categorical("loss", search.losses)
    values: dict[str, Any] = {"loss": loss}
    for name, d in distributions(search, loss, trainable).items():
        if isinstance(d, FloatDistribution):
            values[name] = trial.suggest_float(name, d.low, d.high, log=d.log)
        elif isinstance(d, IntDistribution):
            values[name] = trial.suggest_int(name, d.low, d.high)
        elif name == "pairs":
            values[name] = trial.suggest_categorical(name, search.pairs)
    return settings_of(values)


def fits(settings: Mapping[str, Any], search: SearchConfig, trainable: str) -> bool:
    """Whether this search could draw these settings; those of another sweep may lie outside of its ranges."""
    if settings["loss"] not in search.losses or settings.get("pairs") not in (*search.pairs, None):
        return False
    params, space = params_of(settings), distributions(search, settings["loss"], trainable)
    ranges = {n: d for n, d in space.items() if isinstance(d, (FloatDistribution, IntDistribution))}
    return params.keys() == space.keys() and all(d.low <= params[n] <= d.high for n, d in ranges.items())


def settings_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """Optuna's parameters as settings.

    >>> settings_of({"loss": "ipo", "beta_ipo": 0.1, "kl_weight": 1.0, "learning_rate": 1e-4, "epochs": 2})
    {'loss': 'ipo', 'beta': 0.1, 'kl_weight': 1.0, 'learning_rate': 0.0001, 'epochs': 2}
    """
    return {
        "loss": params["loss"],
        "beta": params.get(f"beta_{params['loss']}"),
        **{name: params[name] for name in SHARED if name in params},
    }


def params_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as Optuna's parameters; the inverse of ``settings_of``."""
    params = {name: settings[name] for name in ("loss", *SHARED) if settings.get(name) is not None}
    if settings["beta"] is not None:
        params[f"beta_{settings['loss']}"] = settings["beta"]
    return params


def check_pairs(search: SearchConfig, task: type[Task]) -> None:
    """Refuses pairs that the task does not have, or that could be drawn with a loss which is not for them.

    Raises:
        ConfigError: that is so.
    """
    for kind in search.pairs:
        if kind not in task.pair_kinds:
            raise ConfigError(f"search.pairs has {kind!r}; it must be of: {', '.join(task.pair_kinds)}")
    for loss in search.losses:
        usable = pairs_for(loss, search, task)
        for kind in drawn_pairs(search, task):
            if kind not in usable:
                raise ConfigError(
                    f"search.losses has {loss!r}, which cannot be tuned on search.pairs {kind!r}: these "
                    f"compare two pictures; leave one of the two out ({_of_one_picture(task)})"
                )


def drawn_pairs(search: SearchConfig, task: type[Task]) -> tuple[str, ...]:
    """The kinds of pairs that a trial may have."""
    return search.pairs or task.pair_kinds[:1]


def pairs_for(loss: str, search: SearchConfig, task: type[Task]) -> list[str]:
    """Those of them that a loss can be tuned on."""
    not_for_it = task.image_kinds if loss in OF_ONE_PICTURE else ()
    return [kind for kind in drawn_pairs(search, task) if kind not in not_for_it]


def _of_one_picture(task: type[Task]) -> str:
    kinds = [kind for kind in task.pair_kinds if kind not in task.image_kinds]
    return f"pairs of one picture are: {', '.join(kinds) or 'none'}"


def baseline(name: str, search: SearchConfig, trainable: str, task: type[Task]) -> dict[str, Any]:
    """Settings of a trial to compare with, in the middle of the ranges where it has a choice.

    ``cross_entropy`` is plain fine-tuning on the attacked pictures; weights interpolated between the
    untouched model and it are PAINT (Ilharco et al., arXiv 2208.05592). Of the kinds of pairs that are
    searched it has the first that it can be tuned on.

    Raises:
        ConfigError: no such baseline, or it can be tuned on none of the pairs.
    """
    if name != "cross_entropy":
        raise ConfigError(f"search.baselines has {name!r}; there is only cross_entropy")
    if not (usable := pairs_for(name, search, task)):
        raise ConfigError(
            f"search.baselines has {name!r}, which can be tuned on none of search.pairs "
            f"({', '.join(drawn_pairs(search, task))}): these compare two pictures; give --search.baselines "
            f"no value, or add other pairs ({_of_one_picture(task)})"
        )
    settings = {
        "loss": "cross_entropy",
        "beta": None,
        "kl_weight": 0.0,
        "learning_rate": math.sqrt(math.prod(search.learning_rate)),
        "epochs": search.epochs[1],
    }
    if trainable == "transform":
        settings["orthogonality"] = math.sqrt(math.prod(search.orthogonality))
    if search.pairs:
        settings["pairs"] = usable[0]
    return settings
