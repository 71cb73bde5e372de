"""The preference losses, as pure functions of four log-probability vectors.

CLIP is read as a one-step policy over labels (Afzali et al., arXiv 2411.08923):
``log pi(y | image) = log_softmax_y(logit_scale * cos(image, text_y))``. The four vectors are that
log-probability of the chosen and of the rejected label, under the policy and under the reference, on the
attacked images. Each loss is the scalar batch mean, in the dtype of its input; hand in float32, since
bfloat16 has three digits and the margin is a small difference of large numbers.

Shapes: B batch.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from clippo.errors import ConfigError


def _margin(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
) -> Tensor:
    """By how much more than the reference the policy prefers chosen to rejected (h in the papers)."""
    return (policy_chosen_logps - policy_rejected_logps) - (reference_chosen_logps - reference_rejected_logps)


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ConfigError(f"beta is {beta}, but must be above 0; useful values lie between 0.01 and 1.5")


def dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimisation (Rafailov et al., arXiv 2305.18290, equation 7).

    ``-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)``, where
    ``h = (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)`` and ``e`` is
    ``label_smoothing``: the assumed share of pairs whose labels are swapped.

    Takes four (B,) tensors of log-probabilities; ``beta`` > 0; ``label_smoothing`` in [0, 0.5].

    Returns:
        a scalar; ln 2 where the policy is the reference.

    Raises:
        ConfigError: for a setting out of its bounds.

    >>> same = torch.tensor([-1.0, -2.0])
    >>> round(dpo(same, same, same, same, beta=0.5).item(), 4)
    0.6931
    """
    _check_beta(beta)
    if not 0 <= label_smoothing <= 0.5:
        raise ConfigError(f"label_smoothing is {label_smoothing}, but must be between 0 and 0.5")
    scaled_margin_B = beta * _margin(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    loss_B = -(1 - label_smoothing) * logsigmoid(scaled_margin_B)
    if label_smoothing:
        loss_B = loss_B - label_smoothing * logsigmoid(-scaled_margin_B)
    return loss_B.mean()


def ipo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """Identity preference optimisation (Azar et al., arXiv 2310.12036, equation 17; ``beta`` is its tau).

    ``(h - 1 / (2 beta))^2`` with the margin ``h`` of `dpo`: the margin is drawn to a finite target, so a
    small ``beta`` asks for a large one.

    Takes four (B,) tensors of log-probabilities; ``beta`` > 0.

    Returns:
        a scalar; 1 / (4 beta^2) where the policy is the reference.

    Raises:
        ConfigError: if ``beta`` is not above 0.

    >>> same = torch.tensor([-1.0, -2.0])
    >>> ipo(same, same, same, same, beta=0.5).item()
    1.0
    """
    _check_beta(beta)
    margin_B = _margin(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    return (margin_B - 1 / (2 * beta)).square().mean()


def kto(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    kl_baseline: Tensor | float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimisation (Ethayarajh et al., arXiv 2402.01306).

    The mean over all chosen and rejected labels of the batch of ``w_d (1 - sigmoid(beta (r_chosen - K)))``
    and ``w_u (1 - sigmoid(beta (K - r_rejected)))``, where ``r = policy - reference`` and ``K`` is
    ``kl_baseline``. As in Afzali et al. (arXiv 2411.08923), K is `kl_reference_to_policy` on the clean
    images of the batch; it only places the reference point, so no gradient flows through it.

    Takes four (B,) tensors of log-probabilities; ``beta`` > 0; ``kl_baseline`` a scalar; ``desirable_weight``
    (w_d) and ``undesirable_weight`` (w_u).

    Returns:
        a scalar; (w_d + w_u) / 4 where the policy is the reference.

    Raises:
        ConfigError: if ``beta`` is not above 0.

    >>> same = torch.tensor([-1.0, -2.0])
    >>> kto(same, same, same, same, beta=0.5, kl_baseline=0.0).item()
    0.5
    """
    _check_beta(beta)
    baseline = kl_baseline.detach() if isinstance(kl_baseline, Tensor) else kl_baseline
    chosen_gain_B = policy_chosen_logps - reference_chosen_logps - baseline
    rejected_gain_B = baseline - (policy_rejected_logps - reference_rejected_logps)
    # 1 - sigmoid(x) = sigmoid(-x), without the cancellation
    desirable_B = desirable_weight * torch.sigmoid(-beta * chosen_gain_B)
    undesirable_B = undesirable_weight * torch.sigmoid(-beta * rejected_gain_B)
    return torch.cat((desirable_B, undesirable_B)).mean()


def cross_entropy(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
) -> Tensor:
    """Cross-entropy tuning on the attacked images: the baseline that preference losses must beat.

    ``-mean(policy_chosen)``. It takes the four (B,) vectors as the others do and reads only the first.

    >>> unused = torch.zeros(2)
    >>> cross_entropy(torch.tensor([-1.0, -2.0]), unused, unused, unused).item()
    1.5
    """
    return -policy_chosen_logps.mean()
