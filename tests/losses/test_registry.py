import pytest
import torch
from torch import Tensor

from clippo.errors import ConfigError
from clippo.losses import LOSSES, cross_entropy, dpo, ipo, kto, preference_loss, resolve_loss

FOUR = [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -0.5]), torch.tensor([-1.5, -1.0]), torch.zeros(2)]


def test_names() -> None:
    assert {"dpo": dpo, "ipo": ipo, "kto": kto, "cross_entropy": cross_entropy} == LOSSES
    assert all(resolve_loss(name) is loss for name, loss in LOSSES.items())


def test_every_loss_is_called_in_the_same_way() -> None:
    direct = {
        "dpo": dpo(*FOUR, beta=0.3),
        "ipo": ipo(*FOUR, beta=0.3),
        "kto": kto(*FOUR, beta=0.3, kl_baseline=0.2),
        "cross_entropy": torch.tensor(1.5),
    }
    for name in LOSSES:
        assert torch.equal(preference_loss(name, *FOUR, beta=0.3, kl_baseline=0.2), direct[name])


def test_settings_reach_the_loss() -> None:
    smoothed = preference_loss("dpo", *FOUR, beta=0.3, kl_baseline=0.2, label_smoothing=0.1)
    assert torch.equal(smoothed, dpo(*FOUR, beta=0.3, label_smoothing=0.1))
    weighted = preference_loss("kto", *FOUR, beta=0.3, kl_baseline=0.2, desirable_weight=2.0)
    assert torch.equal(weighted, kto(*FOUR, beta=0.3, kl_baseline=0.2, desirable_weight=2.0))


def test_a_setting_that_the_loss_does_not_have_is_never_dropped() -> None:
    with pytest.raises(ConfigError, match="'ipo' has no setting label_smoothing; it has: beta"):
        preference_loss("ipo", *FOUR, beta=0.3, kl_baseline=0.2, label_smoothing=0.1)
    with pytest.raises(ConfigError, match="'cross_entropy' has no setting label_smoothing; it has: none"):
        preference_loss("cross_entropy", *FOUR, beta=0.3, kl_baseline=0.2, label_smoothing=0.1)


def test_an_unknown_loss_lists_the_valid_names() -> None:
    with pytest.raises(ConfigError, match="unknown loss 'pdo'; choose one of: cross_entropy, dpo, ipo, kto"):
        preference_loss("pdo", *FOUR, beta=0.3, kl_baseline=0.2)


def test_a_new_loss_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def hinge(chosen: Tensor, rejected: Tensor, _rc: Tensor, _rr: Tensor, *, beta: float) -> Tensor:
        return (beta - (chosen - rejected)).relu().mean()

    monkeypatch.setitem(LOSSES, "hinge", hinge)
    assert preference_loss("hinge", *FOUR, beta=1.0, kl_baseline=0.2).item() == 1.25
