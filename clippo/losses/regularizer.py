"""What keeps the policy near the reference on clean images.

Shapes: B batch, C classes.
"""

from torch import Tensor
from torch.nn.functional import kl_div


def kl_reference_to_policy(policy_logps_BC: Tensor, reference_logps_BC: Tensor) -> Tensor:
    """KL(reference || policy), summed over classes, mean over the batch.

    ``mean_B sum_C exp(reference) (reference - policy)``, the retention term of Afzali et al.
    (arXiv 2411.08923); its weight is ``kl_weight``, and detached it is the baseline of `kto`.

    Takes two (B, C) tensors of log-probabilities over all classes, on clean images.

    Returns:
        a scalar; 0 where the policy is the reference.

    >>> import torch
    >>> reference = torch.tensor([[0.5, 0.5]]).log()
    >>> policy = torch.tensor([[0.75, 0.25]]).log()
    >>> round(kl_reference_to_policy(policy, reference).item(), 4)
    0.1438
    """
    return kl_div(policy_logps_BC, reference_logps_BC, reduction="batchmean", log_target=True)
