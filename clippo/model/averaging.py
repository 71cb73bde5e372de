"""Averages of weights: the Beta-weighted moving average and the line between reference and policy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Weights = dict[str, Tensor]


class BetaAverage:
    """Moving average of the weights of a run, weighted by a Beta density over its length.

    Step ``t`` of ``total`` (0 is the pretrained model) weighs Beta(b, b)((t + 1/2) / (total + 1)), so both
    ends of the run count most for ``b < 1``: Shu et al., CLIPood, arXiv 2302.00864, equations 6 and 7, as
    used with b = 0.7 by Afzali et al., arXiv 2411.08923.

    Args:
        weights: the pretrained weights; copied.
        total: number of optimizer steps of the whole run.
        beta: both parameters of the density, above 0.
    """

    def __init__(self, weights: Mapping[str, Tensor], total: int, beta: float) -> None:
        self.total, self.beta = total, beta
        self.weights: Weights = {name: w.detach().clone() for name, w in weights.items()}
        self.step, self.mass = 0, self._density(0)

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Takes in the weights after one more optimizer step."""
        self.step += 1
        density = self._density(self.step)
        self.mass += density
        averages, latest = list(self.weights.values()), [weights[name] for name in self.weights]
        torch._foreach_lerp_(averages, latest, density / self.mass)

    def state_dict(self) -> dict[str, object]:
        return {"weights": self.weights, "step": self.step, "mass": self.mass}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        weights, step, mass = state["weights"], state["step"], state["mass"]
        assert isinstance(weights, dict)
        assert isinstance(step, int)
        assert isinstance(mass, float)
        self.step, self.mass = step, mass
        for name, average in self.weights.items():
            average.copy_(weights[name])  # onto the device that the average is on

    def _density(self, step: int) -> float:
        # The normalising constant of the Beta density cancels in the average.
        x = (step + 0.5) / (self.total + 1)
        return float((x * (1 - x)) ** (self.beta - 1))


def interpolate(reference: Mapping[str, Tensor], policy: Mapping[str, Tensor], alpha: float) -> Weights:
    """Weights at ``alpha`` on the line from the reference (0) to the policy (1); both ends are exact.

    Ilharco et al., PAINT, arXiv 2208.05592, equation 1.

    >>> interpolate({"w": torch.zeros(1)}, {"w": torch.ones(1)}, 0.25)["w"].item()
    0.25
    """
    if alpha == 1:
        return {name: w.clone() for name, w in policy.items()}
    return {name: torch.lerp(reference[name].detach(), w, alpha) for name, w in policy.items()}
