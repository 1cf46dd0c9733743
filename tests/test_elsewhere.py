"""Nothing assumes a device: scoring, ranking, sampling and an update on one that refuses the CPU's tensors."""

import pytest
import torch

from align.config import ModelTerm, PPOConfig
from align.generate import make_sampler
from align.maths.losses import ranking_loss
from align.models import (
    EMA,
    document_nll,
    load_packed_policy,
    load_scalar_model,
    save_scalar_model,
)
from align.optimise import make_optimizer
from align.ranking import RankedTokens, RankingCollator, batch_ranking_loss, held_out_loss, normalise, score_rows
from align.rewards import ModelReward, RewardSum, Term
from align.rollout import Query, RolloutModels, collect_rollout
from align.runtime import Runtime
from align.step_zero import check_step_zero
from align.types import Prompt
from align.update import Learner, update
from tests.elsewhere import DEVICE, Elsewhere, move, other_device

EOS, PAD = 1, 0
QUERIES = [Query(Prompt("p", {"id": str(i)}), tuple(range(2 + i, 5 + 2 * i))) for i in range(6)]
DOCUMENTS = [[5, 9, 33, 2, 1], [40, 41, 1], [7, 7, 8, 60, 61, 62, 1], [12, 1]]
RANKINGS = [
    RankedTokens((2, 3, 4), ((5, 6, 1), (7, 1), (8, 9, 10, 1)), (2.0, 0.0, 1.0)),
    RankedTokens((11,), ((12, 1), (13, 14, 1)), (1.0, 1.0)),
]


class There(Runtime):
    """A process whose device is the other one."""

    device = DEVICE


@pytest.fixture
def folder(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "policy")
    scalar = load_scalar_model(str(tmp_path / "policy"), fresh_head=True)
    save_scalar_model(scalar, tmp_path / "reward", PAD)
    return tmp_path


def config_of(**changes) -> PPOConfig:
    values = {
        "total_episodes": 6, "rollout_batch_size": 6, "num_mini_batches": 2, "ptx_coef": 1.0, "max_new_tokens": 5,
        "per_device_train_batch_size": 2, "per_device_rollout_batch_size": 4, "ptx_examples_per_episode": 1 / 3,
        "importance_weight_cap": 2.0, "adam_epsilon": 1e-3, "learning_rate": 1e-3, "value_learning_rate": 1e-3,
    }  # fmt: skip
    return PPOConfig(
        output_dir="out", model_name_or_path="m", reward=(ModelTerm("r"),), pretraining_file="t", **(values | changes)
    )


def iteration(folder, runtime: Runtime, place, config: PPOConfig) -> tuple[dict, dict, torch.Tensor]:
    """One iteration of stage 3: the rollout's numbers, the update's, and a weight."""
    policy, ref_policy = (place(load_packed_policy(str(folder / "policy"))) for _ in range(2))
    value_model, reward_model = (place(load_scalar_model(str(folder / "reward"))) for _ in range(2))
    reward = RewardSum([Term("reward", 1.0, [ModelReward(reward_model, PAD, EOS, 4)])])
    actors = RolloutModels(policy, ref_policy, value_model, reward, make_sampler(policy, EOS, PAD, 4), PAD)
    rollout = collect_rollout(QUERIES, actors, config, runtime, 0.1, 0)
    check_step_zero(rollout, actors, config, runtime, EOS, "reward")
    optimizers = [make_optimizer(model, 1e-3, config) for model in (policy, value_model)]
    learner = Learner(policy, value_model, *optimizers, EMA(policy, 0.9))
    stats = update(rollout, learner, lambda count: DOCUMENTS[:count], config, runtime, 0)
    learner.ema.copy_to(policy)
    numbers = {name: x for name, x in rollout.tensors().items() if x is not None}
    return numbers, dict(stats.sums), next(policy.parameters()).detach()


@pytest.mark.parametrize("optim", ["adamw_torch", "muon"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_iteration_of_ppo_stays_on_its_device(folder, precision, optim, monkeypatch):
    """And gives the numbers of the CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = config_of(optim=optim, bf16=precision == "bf16")
    runtimes = Runtime(0), There(0)
    for runtime in runtimes:
        monkeypatch.setattr(runtime.accelerator.state, "_mixed_precision", precision)
        monkeypatch.setattr(runtime.accelerator, "native_amp", precision == "bf16")
    here = iteration(folder, runtimes[0], lambda model: model, config)
    with other_device():
        numbers, sums, weight = iteration(folder, runtimes[1], move, config)
    assert isinstance(weight, Elsewhere)
    for name, x in numbers.items():
        assert isinstance(x, Elsewhere), name
        assert torch.equal(x.inner, here[0][name]), name
    assert sums == here[1]
    assert torch.equal(weight.inner, here[2])


def test_ranking_stays_on_its_device(folder):
    elements = [{"ranking": ranking} for ranking in RANKINGS]
    batch = RankingCollator(PAD)(elements)
    here = load_scalar_model(str(folder / "reward"))
    loss, _ = batch_ranking_loss(here, batch)
    loss.backward()
    held_out, rows = held_out_loss(here, elements, PAD, 2), score_rows(here, [[2, 3, 1], [4, 1]], PAD, 1)
    with other_device():
        there = move(load_scalar_model(str(folder / "reward")))
        moved = {name: value.to(DEVICE) for name, value in batch.items()}
        again, stats = batch_ranking_loss(there, moved)
        again.backward()
        assert isinstance(again, Elsewhere) and float(again.detach()) == float(loss.detach())
        assert all(isinstance(x, Elsewhere) for x in stats.values())
        assert held_out_loss(there, elements, PAD, 2) == held_out
        assert score_rows(there, [[2, 3, 1], [4, 1]], PAD, 1) == rows
        normalise(there, rows)
    assert torch.equal(there.head.weight.grad.inner, here.head.weight.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_forward_and_backward(folder, dtype):
    """Both types, from the embedding to the head; losses and gradients stay float32 and near float32's."""
    policy = load_packed_policy(str(folder / "policy"))
    exact = document_nll(policy, DOCUMENTS, torch.device("cpu"))
    exact.backward()
    wanted = policy.inner.lm_head.weight.grad.clone()
    policy.zero_grad()
    with torch.autocast("cpu", dtype):
        half = document_nll(policy, DOCUMENTS, torch.device("cpu"))
    half.backward()
    grad = policy.inner.lm_head.weight.grad
    assert half.dtype == grad.dtype == torch.float32
    assert float(half) == pytest.approx(float(exact), rel=0.01)
    assert float((grad - wanted).norm() / wanted.norm()) < 0.05


def test_a_stray_tensor_of_the_cpu_raises():
    with other_device():
        x = torch.ones(3, device=DEVICE)
        assert isinstance(x + 1, Elsewhere)
        with pytest.raises(AssertionError, match="CPU tensor"):
            x + torch.ones(3)
        with pytest.raises(AssertionError, match="CPU tensor"):
            ranking_loss(torch.ones(1, 2, device=DEVICE), torch.ones(1, 2), torch.ones(1, 2, device=DEVICE).bool())
