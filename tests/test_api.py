"""The names that others rely on."""

import inspect
import subprocess
import sys

import pytest

import clippo.data.attack
import clippo.evaluate
import clippo.front
import clippo.losses
import clippo.results


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_signatures_of_the_contract() -> None:
    four = [
        "policy_chosen_logps",
        "policy_rejected_logps",
        "reference_chosen_logps",
        "reference_rejected_logps",
    ]
    assert parameters(clippo.losses.dpo) == [*four, "beta", "label_smoothing"]
    assert parameters(clippo.losses.ipo) == [*four, "beta"]
    assert parameters(clippo.losses.kto) == [
        *four,
        "beta",
        "kl_baseline",
        "desirable_weight",
        "undesirable_weight",
    ]
    assert parameters(clippo.losses.kl_reference_to_policy) == ["policy_logps_BC", "reference_logps_BC"]
    assert {"dpo", "ipo", "kto"} <= clippo.losses.LOSSES.keys()
    assert parameters(clippo.front.pareto_mask) == ["points", "maximize"]
    assert parameters(clippo.front.hypervolume) == ["points", "reference_point"]
    assert parameters(clippo.data.attack.draw_word)[:3] == ["image", "word", "rng"]
    assert parameters(clippo.evaluate.max_skew) == ["scores", "groups", "k", "target"]
    assert parameters(clippo.evaluate.ndkl) == ["scores", "groups", "k", "target"]
    assert all(hasattr(clippo.results.ResultStore, table) for table in ("trials", "metrics", "evals"))


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [("clippo.cli", {"torch", "ray", "optuna"}), ("clippo.sweep.trial", {"optuna", "sqlalchemy", "altair"})],
)
def test_what_a_process_does_not_need_is_not_imported(module: str, unwanted: set[str]) -> None:
    code = f"import sys, {module}; print({unwanted!r} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
