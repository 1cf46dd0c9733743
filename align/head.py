"""A reward model's head before its training: the best linear reading of the frozen body.

With some hundred rankings a random head stays mostly random: AdamW moves a weight by at most its rate a step, far less
than the head's own spread, and the body learns to serve a direction that means nothing. Fitted first, the head starts
where the body's features already tell (linear probing, then fine-tuning: Kumar et al. 2022).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from align.maths.losses import ranking_loss
from align.models import ScalarModel, eval_mode
from align.ranking import RankedTokens, by_prompt, ranking_batches
from align.runtime import gather_list, my_share

Autocast = Callable[[], AbstractContextManager]

RIDGE = 0.2  # of a feature's variance within prompts; cross-validated on the sources of preset smollm2 (docs/LOG.md)
MAX_ITERATIONS = 500


def fit_head(
    model: ScalarModel, elements: list[dict[str, RankedTokens]], pad_id: int, batch_size: int, autocast: Autocast
) -> dict[str, float]:
    """Set the head's weight to the minimum of the mean ranking loss plus a ridge, the body as it is; the bias to 0.

    One forward pass over `elements`, shared out over processes, each with a whole model. Returns `loss` and `accuracy`
    on these very rankings.
    """
    with eval_mode(model):
        features = read_features(model, elements, pad_id, batch_size, autocast)  # (N, d)
    rankings = [element["ranking"] for element in elements]
    ranks = torch.tensor([rank for ranking in rankings for rank in ranking.ranks])  # (N,)
    group = torch.tensor([i for i, ranking in enumerate(rankings) for _ in ranking.ranks])  # (N,)
    weight, stats = best_weight(features, ranks, group)
    with torch.no_grad():
        model.head.weight.copy_(weight)
        model.head.bias.zero_()
    return stats


@torch.no_grad()
def read_features(
    model: ScalarModel, elements: list[dict[str, RankedTokens]], pad_id: int, batch_size: int, autocast: Autocast
) -> Tensor:
    """What the head reads of each completion, the last hidden state at EOS, in the order of `elements`. (N, d)"""
    mine = [elements[i] for i in my_share(len(elements))]
    found: list[Tensor] = [torch.empty(0)] * len(mine)
    for picked, batch in ranking_batches(mine, pad_id, batch_size, next(model.parameters()).device):
        with autocast(), model.cast_weights() as cast:
            hidden = model.states(batch["pack"], cast)[batch["last_index"]].float().cpu()
        for i, rows in zip(picked, hidden.split([len(mine[i]["ranking"].ranks) for i in picked]), strict=True):
            found[i] = rows
    return torch.cat(gather_list(found))


def best_weight(features: Tensor, ranks: Tensor, group: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The weight (d,) with the least ranking loss (mean over prompts) + RIDGE * variance * |weight|^2, and its loss and
    accuracy without the ridge. Convex; L-BFGS in float64.

    features: (N, d), ranks: (N,), group: (N,) the prompt of each row, ascending from 0 without a gap.
    """
    features, prompts = features.double(), int(group.max()) + 1
    ridge = RIDGE * variance_within(features, group, prompts)
    weight = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=MAX_ITERATIONS, tolerance_grad=1e-8, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss, _ = ranking_loss(*by_prompt(features @ weight, ranks.double(), group))
        total = loss / prompts + ridge * weight.square().sum()
        total.backward()
        return total

    optimizer.step(objective)
    loss, stats = ranking_loss(*by_prompt(features @ weight.detach(), ranks.double(), group))
    pairs = max(1, int(stats["pairs"]))
    return weight.detach(), {"loss": float(loss) / prompts, "accuracy": float(stats["correct"]) / pairs}


def variance_within(features: Tensor, group: Tensor, prompts: int) -> Tensor:
    """A feature's variance around its prompt's mean, averaged over features; unbiased. ()"""
    counts = torch.bincount(group, minlength=prompts).to(features)
    means = features.new_zeros(prompts, features.shape[1]).index_add_(0, group, features) / counts[:, None]
    freedom = max(1, len(features) - prompts)
    return (features - means[group]).square().sum() / (freedom * features.shape[1])
