"""align/head.py: the reward head as the minimum of a convex problem, against solutions found another way."""

import math
from contextlib import nullcontext
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize

import align.runtime
import stages.rm
from align.config import RMConfig
from align.errors import UserError
from align.head import RIDGE, best_weight, fit_head, variance_within
from align.lora import with_lora
from align.models import disable_dropout, load_scalar_model
from align.ranking import RankingCollator, batch_ranking_loss, encode_rankings, held_out_loss
from align.types import Ranking

LORA = SimpleNamespace(lora_r=4, lora_alpha=8, lora_target_modules=())
WORDS = ["a cow", "a dog and a bird", "The opposite of hot is cold.", "fox", "Which boat?", "two ripe pears", "no"]


@pytest.fixture
def scalar(tiny_llama, tiny_codec, tmp_path):
    tiny_llama.resize_token_embeddings(len(tiny_codec.tokenizer))
    tiny_llama.save_pretrained(tmp_path / "policy")
    torch.manual_seed(1)
    model = load_scalar_model(str(tmp_path / "policy"), fresh_head=True)
    disable_dropout(model)
    return model


def rankings() -> list[Ranking]:
    rows = []
    for i in range(12):
        k = 2 + i % 3
        rows.append(Ranking(f"Say {i}", tuple(WORDS[(i + 2 * j) % 7] for j in range(k)), tuple(map(float, range(k)))))
    rows.append(Ranking("Tie", ("a cow", "fox", "no"), (1.0, 1.0, 2.0)))
    return rows


def test_one_feature_has_the_weight_of_its_equation():
    """Every pair is won by 1: the loss is log(1 + exp(-w)), a feature's variance within a prompt 1/2. Its minimum
    solves 1 / (1 + exp(w)) = 2 RIDGE / 2 w."""
    features = torch.tensor([[1.0], [0.0], [-3.0], [-2.0], [6.0], [5.0]])
    weight, stats = best_weight(features, torch.tensor([0.0, 1, 1, 0, 0, 1]), torch.tensor([0, 0, 1, 1, 2, 2]))
    expected = brentq(lambda w: 1 / (1 + math.exp(w)) - RIDGE * w, 0, 10)
    assert float(weight[0]) == pytest.approx(expected, abs=1e-6)
    assert stats == {"loss": pytest.approx(math.log1p(math.exp(-expected)), abs=1e-6), "accuracy": 1.0}


def test_the_weight_is_that_of_a_plain_loop_over_pairs():
    rng = np.random.default_rng(3)
    ranks = [[0, 1, 2, 3], [1, 0], [0, 0, 1], [1, 1], [2, 0, 1]]  # ties: a pair of them, and a whole prompt
    rows = [rng.normal(size=(len(r), 5)) * [1, 3, 0.2, 1, 1] for r in ranks]

    within = sum(((x - x.mean(0)) ** 2).sum() for x in rows) / (sum(map(len, ranks)) - len(ranks)) / 5

    def objective(w: np.ndarray) -> float:
        total = 0.0
        for x, r in zip(rows, ranks, strict=True):
            pairs = list(combinations(range(len(r)), 2))
            for i, j in pairs:
                if r[i] != r[j]:
                    better, worse = (i, j) if r[i] < r[j] else (j, i)
                    total += math.log1p(math.exp(-float((x[better] - x[worse]) @ w))) / len(pairs)
        return total / len(ranks) + RIDGE * within * float(w @ w)

    expected = minimize(objective, np.zeros(5), tol=1e-12).x
    flat = torch.tensor(np.concatenate(rows))
    group = torch.tensor([i for i, r in enumerate(ranks) for _ in r])
    weight, _ = best_weight(flat, torch.tensor([float(v) for r in ranks for v in r]), group)
    assert np.abs(weight.numpy() - expected).max() < 1e-4


@pytest.mark.parametrize("use_peft", [False, True])
def test_the_fitted_head_is_where_the_models_own_scores_have_no_slope(scalar, tiny_codec, use_peft):
    """The gradient of the training loss by the head is what the ridge pushes back, whatever the batches."""
    if use_peft:
        scalar.model = with_lora(scalar.model, LORA)
    scalar.train()
    elements = encode_rankings(rankings(), tiny_codec)
    body = {name: p.detach().clone() for name, p in scalar.named_parameters() if "score" not in name}
    stats = fit_head(scalar, elements, tiny_codec.pad_id, 3, nullcontext)
    fitted = scalar.head.weight.detach().clone()
    fit_head(scalar, elements, tiny_codec.pad_id, 64, nullcontext)
    assert float((fitted - scalar.head.weight).abs().max()) < 1e-4 * float(fitted.abs().max())
    assert all(torch.equal(p, body[name]) for name, p in scalar.named_parameters() if "score" not in name)
    assert scalar.training and float(scalar.head.bias.abs()) == 0.0

    batch = RankingCollator(tiny_codec.pad_id)(elements)
    states = scalar.states(batch["pack"], lambda weight: weight)[batch["last_index"]].detach()
    variance = variance_within(states.double(), batch["group"], len(elements))
    loss = batch_ranking_loss(scalar, batch)[0] / len(elements)
    slope = torch.autograd.grad(loss, scalar.head.weight)[0]
    assert float(slope.abs().max()) > 1e-4
    assert float((slope + 2 * RIDGE * variance * scalar.head.weight).abs().max()) < 1e-5
    assert stats["loss"] == pytest.approx(float(loss), abs=1e-5)


def test_it_serves_prompts_that_it_was_not_fitted_on(scalar, tiny_codec):
    """Preferences that the words decide: better than knowing nothing (log 2); the random head had been no better."""

    def elements(start: int) -> list[dict]:
        rows = []
        for i in range(start, start + 60):
            first, second = i % 7, (i * 3 + 1) % 7
            if first != second:
                rows.append(Ranking(f"Say {i}", (WORDS[first], WORDS[second]), (float(first), float(second))))
        return encode_rankings(rows, tiny_codec)

    pad = tiny_codec.pad_id
    before = held_out_loss(scalar, elements(100), pad, 8)
    fit_head(scalar, elements(0), pad, 8, nullcontext)
    after = held_out_loss(scalar, elements(100), pad, 8)
    assert after["loss"] < min(before["loss"], math.log(2)) - 0.005  # the ridge keeps it far from 0


def test_a_body_in_parts_is_refused(tiny_codec, monkeypatch):
    """Before anything is read or written."""
    monkeypatch.setattr(align.runtime, "sharding", lambda: True)
    config = RMConfig(output_dir="out", head_init="fitted")
    with pytest.raises(UserError, match="head_init: fitted.*use normal"):
        stages.rm.load_all(config, tiny_codec, 100)
