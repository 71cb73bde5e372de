"""Closed forms and properties of the losses.

Shapes: B batch, C classes.
"""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from clippo.errors import ConfigError
from clippo.losses import LOSSES, dpo, ipo, kl_reference_to_policy, kto, preference_loss

PREFERENCE = sorted(LOSSES.keys() - {"cross_entropy"})
betas = st.floats(0.01, 2)
seeds = st.integers(0, 2**31)


def random_logps(seed: int, scale: float = 3.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [-scale * torch.rand(5, generator=generator, dtype=torch.float64) for _ in range(4)]


@given(seed=seeds, beta=betas)
@settings(deadline=None, max_examples=30)
def test_closed_forms_where_the_policy_is_the_reference(seed: int, beta: float) -> None:
    chosen, rejected, *_ = random_logps(seed)
    same = (chosen, rejected, chosen, rejected)
    assert dpo(*same, beta=beta).item() == pytest.approx(math.log(2))
    assert dpo(*same, beta=beta, label_smoothing=0.2).item() == pytest.approx(math.log(2))
    assert ipo(*same, beta=beta).item() == pytest.approx(1 / (4 * beta**2))
    weighted = kto(*same, beta=beta, kl_baseline=0.0, desirable_weight=1.3, undesirable_weight=0.8)
    assert weighted.item() == pytest.approx((1.3 + 0.8) / 4)


def test_kl_is_zero_at_the_reference_positive_elsewhere_and_not_symmetric() -> None:
    reference_BC = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], dtype=torch.float64).log()
    policy_BC = torch.tensor([[0.4, 0.5, 0.1], [0.3, 0.3, 0.4]], dtype=torch.float64).log()
    assert kl_reference_to_policy(reference_BC, reference_BC).item() == 0
    expected = sum(
        math.exp(r) * (r - p)
        for r, p in zip(reference_BC.flatten().tolist(), policy_BC.flatten().tolist(), strict=True)
    )
    assert kl_reference_to_policy(policy_BC, reference_BC).item() == pytest.approx(expected / 2)
    assert kl_reference_to_policy(reference_BC, policy_BC).item() != pytest.approx(expected / 2)


@given(margin=st.floats(-3, 3), beta=betas, smoothing=st.floats(0, 0.5))
@settings(deadline=None, max_examples=30)
def test_dpo_is_the_smoothed_cross_entropy_of_the_scaled_margin(
    margin: float, beta: float, smoothing: float
) -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    wins = 1 / (1 + math.exp(-beta * margin))
    expected = -(1 - smoothing) * math.log(wins) - smoothing * math.log(1 - wins)
    loss = dpo(zero + margin, zero, zero, zero, beta=beta, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("beta", [0.05, 0.5, 2.0])
def test_ipo_is_zero_at_its_target_margin(beta: float) -> None:
    zero = torch.zeros(4, dtype=torch.float64)
    assert ipo(zero + 1 / (2 * beta), zero, zero, zero, beta=beta).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_one_step_down_the_gradient_prefers_the_chosen_label(name: str) -> None:
    chosen, rejected, reference_chosen, reference_rejected = random_logps(7)
    chosen.requires_grad_(), rejected.requires_grad_()
    four = (chosen, rejected, reference_chosen, reference_rejected)
    torch.autograd.backward(preference_loss(name, *four, beta=0.1, kl_baseline=0.3))
    assert chosen.grad is not None
    assert bool((chosen.grad < 0).all())
    if name == "cross_entropy":
        assert rejected.grad is None
    else:
        assert rejected.grad is not None
        assert bool((rejected.grad > 0).all())


def total_loss(
    name: str, beta: float, policy_attacked_BC: Tensor, reference_attacked_BC: Tensor, policy_clean_BC: Tensor
) -> Tensor:
    """Preference loss and KL of logits; the chosen label is 0 and the rejected one 1."""
    policy_logps_BC = policy_attacked_BC.log_softmax(dim=-1)
    reference_logps_BC = reference_attacked_BC.log_softmax(dim=-1)
    kl = kl_reference_to_policy(policy_clean_BC.log_softmax(dim=-1), reference_logps_BC)
    four = (policy_logps_BC[:, 0], policy_logps_BC[:, 1], reference_logps_BC[:, 0], reference_logps_BC[:, 1])
    return preference_loss(name, *four, beta=beta, kl_baseline=kl) + kl


@given(
    name=st.sampled_from(sorted(LOSSES)),
    beta=betas,
    seed=seeds,
    shifts=st.lists(st.floats(-50, 50), min_size=3),
)
@settings(deadline=None, max_examples=50)
def test_a_shift_of_all_logits_changes_nothing(
    name: str, beta: float, seed: int, shifts: list[float]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = [4 * torch.randn(3, 6, generator=generator, dtype=torch.float64) for _ in range(3)]

    def loss_and_gradients(shift: Callable[[int], float]) -> list[Tensor]:
        shifted = [(one + shift(i)).requires_grad_() for i, one in enumerate(logits)]
        loss = total_loss(name, beta, *shifted)
        return [loss, *torch.autograd.grad(loss, (shifted[0], shifted[2]))]

    plain, moved = loss_and_gradients(lambda i: 0.0), loss_and_gradients(lambda i: shifts[i])
    assert_close(moved, plain, rtol=1e-9, atol=1e-9)


@given(
    name=st.sampled_from(sorted(LOSSES)),
    beta=betas,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale=st.floats(1, 1e4),
    signs=st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=3, max_size=3),
)
@settings(deadline=None, max_examples=200)
def test_value_and_gradient_are_finite_at_large_margins(
    name: str, beta: float, dtype: torch.dtype, scale: float, signs: list[float]
) -> None:
    direction_BC = torch.tensor([[1.0, -1.0, 0.0], [0.5, 0.0, -1.0]])
    policy_BC, reference_BC, clean_BC = (
        (sign * scale * direction_BC).to(dtype).requires_grad_() for sign in signs
    )
    loss = total_loss(name, beta, policy_BC, reference_BC, clean_BC)
    torch.autograd.backward(loss)
    assert loss.isfinite()
    assert loss.dtype == dtype
    for logits_BC in (policy_BC, clean_BC):
        assert logits_BC.grad is not None
        assert logits_BC.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dpo_still_learns_where_it_is_most_wrong(dtype: torch.dtype) -> None:
    policy_chosen = torch.full((1,), -1000.0, dtype=dtype, requires_grad=True)
    zero = torch.zeros(1, dtype=dtype)
    loss = dpo(policy_chosen, zero, zero, zero, beta=0.5)
    torch.autograd.backward(loss)
    assert loss.item() == 500
    assert policy_chosen.grad is not None
    assert policy_chosen.grad.item() == -0.5


@pytest.mark.parametrize("name", PREFERENCE)
@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan])
def test_beta_must_be_positive(name: str, beta: float) -> None:
    with pytest.raises(ConfigError, match=r"beta is .* above 0"):
        preference_loss(name, *random_logps(0), beta=beta, kl_baseline=0.0)


@pytest.mark.parametrize("smoothing", [-0.1, 0.6, math.nan])
def test_label_smoothing_has_bounds(smoothing: float) -> None:
    with pytest.raises(ConfigError, match=r"label_smoothing is .* between 0 and 0.5"):
        dpo(*random_logps(0), beta=1, label_smoothing=smoothing)
