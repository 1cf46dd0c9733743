"""KL between the policy and its reference, estimated on sampled tokens, and its coefficient.

With u = logprob - ref_logprob and tokens drawn from the policy: k1 = u (unbiased), k2 = u^2 / 2 (biased, low
variance, its gradient is that of the reverse KL), k3 = exp(-u) - 1 + u (unbiased, never negative).
"""

import torch
from torch import Tensor

ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """Per-token KL estimate in nats, same shape as its inputs."""
    u = logprobs - ref_logprobs
    if estimator == "k1":
        return u
    if estimator == "k2":
        return u**2 / 2
    if estimator == "k3":
        return torch.expm1(-u) + u
    raise ValueError(f"estimator must be one of {ESTIMATORS}, not {estimator!r}")


def adapt_kl_coef(kl_coef: float, kl: float, target: float | None, episodes: int, horizon: int) -> float:
    """Ziegler et al. 2019, section 2.2: proportional control in log space, error clipped to +-0.2.

    `kl` is the mean KL of an episode in nats, `episodes` the number just seen, `horizon` in episodes. Without a target
    the coefficient stays.
    """
    if target is None:
        return kl_coef
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * episodes / horizon)
