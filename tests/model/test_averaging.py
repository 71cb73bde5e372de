"""Averages of weights against their definitions."""

import pytest
import torch

from clippo.model import BetaAverage, interpolate


def test_the_running_average_is_the_weighted_mean() -> None:
    total, path = 7, [torch.randn(3, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    average = BetaAverage({"w": path[0]}, total, 0.7)
    for weights in path[1:]:
        average.update({"w": weights})
    x = (torch.arange(8, dtype=torch.float64) + 0.5) / (total + 1)
    density = x.pow(-0.3) * (1 - x).pow(-0.3)  # of Beta(0.7, 0.7), but for a constant
    expected = (torch.stack(path) * density[:, None]).sum(0) / density.sum()
    torch.testing.assert_close(average.weights["w"].double(), expected, atol=1e-6, rtol=0)


def test_a_restored_average_goes_on_where_it_was() -> None:
    path = [torch.tensor([float(i)]) for i in range(6)]
    whole, first = BetaAverage({"w": path[0]}, 5, 0.7), BetaAverage({"w": path[0]}, 5, 0.7)
    for weights in path[1:]:
        whole.update({"w": weights})
    for weights in path[1:3]:
        first.update({"w": weights})
    second = BetaAverage({"w": path[0]}, 5, 0.7)
    second.load_state_dict(first.state_dict())
    for weights in path[3:]:
        second.update({"w": weights})
    assert torch.equal(whole.weights["w"], second.weights["w"])


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_both_ends_of_the_line_are_exact(alpha: float) -> None:
    reference, policy = {"w": torch.tensor([0.1, 1e8])}, {"w": torch.tensor([0.3, -7.7])}
    assert torch.equal(interpolate(reference, policy, alpha)["w"], (policy if alpha else reference)["w"])
