"""The published code's losses and gradients, in float64.

Shapes: B batch, C classes.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from clippo.losses import kl_reference_to_policy, preference_loss

CASES = json.loads((Path(__file__).parents[1] / "golden" / "po_losses.json").read_text())
SETTINGS = {"dpo": ["label_smoothing"], "ipo": [], "kto": ["desirable_weight", "undesirable_weight"]}


def test_there_are_42_cases() -> None:
    assert len(CASES) == 42


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['loss_type']}-{c['beta']}-{c['kl_weight']}")
def test_loss_and_gradient(case: dict[str, Any]) -> None:
    def logits(name: str) -> Tensor:
        similarity_BC = torch.tensor(case[name], dtype=torch.float64)
        return similarity_BC.mul(case["logit_scale"]).requires_grad_(name.startswith("policy"))

    def of_label(logits_BC: Tensor, label: str) -> Tensor:
        index_B1 = torch.tensor(case[label])[:, None]
        return logits_BC.log_softmax(dim=-1).gather(1, index_B1).squeeze(1)

    policy_clean_BC = logits("policy_similarity_clean")
    policy_attacked_BC = logits("policy_similarity_attacked")
    reference_attacked_BC = logits("reference_similarity_attacked")
    kl = kl_reference_to_policy(
        policy_clean_BC.log_softmax(dim=-1), logits("reference_similarity_clean").log_softmax(dim=-1)
    )
    preference = preference_loss(
        case["loss_type"],
        of_label(policy_attacked_BC, "chosen"),
        of_label(policy_attacked_BC, "rejected"),
        of_label(reference_attacked_BC, "chosen"),
        of_label(reference_attacked_BC, "rejected"),
        beta=case["beta"],
        kl_baseline=kl,  # not detached here: the loss must see to it
        **{name: case[name] for name in SETTINGS[case["loss_type"]]},
    )
    loss = preference + case["kl_weight"] * kl
    torch.autograd.backward(loss)

    def expected(name: str) -> Tensor:
        return torch.tensor(case[name], dtype=torch.float64)

    assert_close(loss.detach(), expected("expected_loss"), rtol=1e-9, atol=1e-9)
    assert_close(policy_clean_BC.grad, expected("expected_grad_logits_clean"), rtol=1e-9, atol=1e-9)
    assert_close(policy_attacked_BC.grad, expected("expected_grad_logits_attacked"), rtol=1e-9, atol=1e-9)
