"""The search space: what Optuna draws for one trial, and how a result row reads as such a draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from clippo.config import SearchConfig
from clippo.losses import resolve_loss

LOSSES_WITH_BETA = ("dpo", "ipo", "kto")


def distributions(search: SearchConfig, loss: str) -> dict[str, BaseDistribution]:
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
    return space


def draw(trial: optuna.Trial, search: SearchConfig) -> dict[str, Any]:
    """Draws the settings of one trial; ``beta`` is None for a loss that has none."""
    loss = trial.suggest_categorical("loss", search.losses)
    values: dict[str, Any] = {"loss": loss}
    for name, d in distributions(search, loss).items():
        if isinstance(d, FloatDistribution):
            values[name] = trial.suggest_float(name, d.low, d.high, log=d.log)
        elif isinstance(d, IntDistribution):
            values[name] = trial.suggest_int(name, d.low, d.high)
    return settings_of(values)


def settings_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """Optuna's parameters as settings.

    >>> settings_of({"loss": "ipo", "beta_ipo": 0.1, "kl_weight": 1.0, "learning_rate": 1e-4, "epochs": 2})
    {'loss': 'ipo', 'beta': 0.1, 'kl_weight': 1.0, 'learning_rate': 0.0001, 'epochs': 2}
    """
    return {
        "loss": params["loss"],
        "beta": params.get(f"beta_{params['loss']}"),
        **{name: params[name] for name in ("kl_weight", "learning_rate", "epochs")},
    }


def params_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as Optuna's parameters; the inverse of ``settings_of``."""
    params = {name: settings[name] for name in ("loss", "kl_weight", "learning_rate", "epochs")}
    if settings["beta"] is not None:
        params[f"beta_{settings['loss']}"] = settings["beta"]
    return params
