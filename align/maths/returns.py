"""Per-token rewards, advantages and returns of bandit episodes (paper section 3.5, Ziegler et al. 2019)."""

import torch
from torch import Tensor


def token_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef * kl on every response token, plus the score on the last one. (B,), (B, R), (B, R) -> (B, R)

    Response tokens are the first columns of each row, so the last one is column length - 1. An empty response
    would have nowhere to put its score, hence the assert.
    """
    assert kl.shape == response_mask.shape and scores.shape == kl.shape[:1]
    lengths = response_mask.sum(1)
    assert bool((lengths > 0).all()), "every response holds at least one token"
    rewards = torch.where(response_mask, -kl_coef * kl, torch.zeros_like(kl))
    return rewards.scatter_add(1, (lengths - 1)[:, None], scores[:, None].to(rewards.dtype))


def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation; the value after the last response token is 0. All (B, R).

    delta_t = r_t + gamma * V_{t+1} - V_t;  A_t = delta_t + gamma * lam * A_{t+1};  return_t = A_t + V_t.
    Returns (advantages, returns), zero off the mask. Values under a False mask are never read.
    """
    assert rewards.shape == values.shape == response_mask.shape
    zeros = torch.zeros_like(rewards)
    rewards, values = torch.where(response_mask, rewards, zeros), torch.where(response_mask, values, zeros)
    advantage = next_value = zeros[:, 0]
    columns = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(response_mask[:, t], delta + gamma * lam * advantage, zeros[:, 0])
        next_value = values[:, t]
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1)  # (B, R)
    return advantages, torch.where(response_mask, advantages + values, zeros)
