"""align/update.py and align/learn.py: one PPO(-ptx) update, its batch algebra, learning rates, a toy bandit."""

import copy
import dataclasses
import hashlib
import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

import align.update
from align.config import FunctionTerm, ModelTerm, PPOConfig
from align.errors import UserError
from align.generate import make_sampler
from align.learn import build_learner, build_rollout_models, next_kl_coef, set_learning_rates
from align.models import EMA, Policy, load_scalar_model, save_scalar_model
from align.optimise import make_optimizer
from align.reward_models import ValueStart, value_start
from align.rewards import ModelReward, RewardSum, Term
from align.rollout import Query, RolloutModels, collect_rollout, token_weights
from align.runtime import Runtime
from align.types import Episode, Prompt, UpdateStats
from align.update import BatchAlgebra, Learner, microbatches, optimiser_step, step, update

EOS, PAD = 1, 0
DOCUMENTS = [[5, 9, 33, 2, 1], [40, 41, 1], [7, 7, 8, 60, 61, 62, 1], [12, 1]]


@pytest.fixture(scope="module")
def runtime():
    os.environ["ACCELERATE_USE_CPU"] = "true"
    return Runtime(seed=0)


class Recorder(torch.optim.Optimizer):
    """Keeps the gradients of each step and changes no weight."""

    def __init__(self, parameters):
        super().__init__(list(parameters), {})
        self.steps: list[list[torch.Tensor]] = []

    def step(self):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        self.steps.append([torch.zeros_like(p) if g is None else g.clone() for g, p in zip(grads, params, strict=True)])


def config_of(**changes) -> PPOConfig:
    values = {
        "total_episodes": 12, "rollout_batch_size": 12, "num_mini_batches": 1, "ptx_coef": 0.0, "max_new_tokens": 5,
        "per_device_train_batch_size": 16, "per_device_rollout_batch_size": 16, "max_grad_norm": 1e9,
    }  # fmt: skip
    return PPOConfig(
        output_dir="out", model_name_or_path="m", reward=(ModelTerm("r"),), pretraining_file="t", **(values | changes)
    )


def make_queries(count: int) -> list[Query]:
    generator = torch.Generator().manual_seed(1)
    rows = [tuple(torch.randint(2, 64, (1 + i % 5,), generator=generator).tolist()) for i in range(count)]
    return [Query(Prompt("p", {"id": str(i)}), row) for i, row in enumerate(rows)]


@pytest.fixture
def folder(tiny_llama, tmp_path):
    with torch.no_grad():
        tiny_llama.lm_head.weight.mul_(20)
    tiny_llama.save_pretrained(tmp_path / "policy")
    scalar = load_scalar_model(str(tmp_path / "policy"), "eager", fresh_head=True)
    save_scalar_model(scalar, tmp_path / "reward", PAD)
    return tmp_path


def reward_of(folder, packed: bool = True):
    return load_scalar_model(str(folder / "reward"), None if packed else "eager").eval()


def actors_of(model, folder, reward=None, packed: bool = True) -> RolloutModels:
    policy = Policy(model, packed)
    reward = RewardSum([Term("reward", 1.0, [reward or ModelReward(reward_of(folder, packed), PAD, EOS, 16)])])
    sampler = make_sampler(policy, EOS, PAD, 64)
    return RolloutModels(policy, copy.deepcopy(policy), reward_of(folder, packed), reward, sampler, PAD)


def recorder(actors: RolloutModels) -> Learner:
    policy, value_model = actors.policy, actors.value_model
    return Learner(policy, value_model, Recorder(policy.parameters()), Recorder(value_model.parameters()), None)


def moved(rollout, scale: float = 0.3):
    """The rollout as if an older policy and value model had made it, so that ratios and clipping matter."""
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(rollout.logprobs.shape, generator=generator) * scale
    shift = torch.randn(rollout.values.shape, generator=generator) * scale
    return dataclasses.replace(rollout, logprobs=rollout.logprobs + noise, values=rollout.values + shift)


@pytest.fixture(params=[True, False], ids=["packed", "padded"])
def setup(request, tiny_llama, folder, runtime):
    actors = actors_of(tiny_llama, folder, packed=request.param)
    assert actors.policy.packed == actors.value_model.packed == request.param
    rollout = collect_rollout(make_queries(12), actors, config_of(), runtime, 0.1, iteration=0)
    return SimpleNamespace(actors=actors, rollout=rollout, moved=moved(rollout))


def gradients(setup, rollout, runtime, documents=(), **changes):
    learner = recorder(setup.actors)
    stats = optimiser_step(rollout, list(documents), learner, config_of(**changes), runtime)
    return learner.policy_optimizer.steps[0], learner.value_optimizer.steps[0], stats


def flat(grads) -> torch.Tensor:
    return torch.cat([g.flatten() for g in grads])


def close(a, b, tolerance: float) -> None:
    a, b = flat(a), flat(b)
    assert float(b.abs().max()) > 1e-4, "a gradient of nothing proves nothing"
    assert float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


# The policy's and the value model's gradients by a loop over single episodes, no padding, no library code of ours:
# logits and states are those of transformers' own forward passes.


def naive_ppo_loss(policy, rollout, config) -> torch.Tensor:
    total = 0.0
    for i in range(len(rollout)):
        q, n = int(rollout.query_lengths[i]), int(rollout.response_lengths[i])
        ids = rollout.input_ids[i, : q + n]
        logps = (policy.inner(ids[None]).logits[0].double() / config.temperature).log_softmax(-1)
        for r in range(n):
            ratio = (logps[q - 1 + r, ids[q + r]] - rollout.logprobs[i, r].double()).exp()
            advantage = float(rollout.advantages[i, r])
            options = (ratio * advantage, min(max(ratio, 1 - config.cliprange), 1 + config.cliprange) * advantage)
            total = total - min(options, key=lambda x: float(torch.as_tensor(x).detach()))
    return total / int(rollout.response_lengths.sum())


def naive_weighted_gradient(policy, rollout, config) -> list[torch.Tensor]:
    """Of tokens weighed by exp(logprobs - sampler_logprobs), at most the cap: one token's loss at a time."""
    total = 0.0
    for i in range(len(rollout)):
        one, n = rollout.index(torch.tensor([i])), int(rollout.response_lengths[i])
        for r in range(n):
            ratio = math.exp(float(rollout.logprobs[i, r]) - float(rollout.sampler_logprobs[i, r]))
            alone = torch.zeros_like(one.advantages)
            alone[0, r] = one.advantages[0, r] * min(ratio, config.importance_weight_cap)
            total = total + naive_ppo_loss(policy, dataclasses.replace(one, advantages=alone), config) * n
    return grad_of(total / int(rollout.response_lengths.sum()), policy)


def naive_value_loss(value_model, rollout, config) -> torch.Tensor:
    total, clip = 0.0, config.cliprange_value
    for i in range(len(rollout)):
        q, n = int(rollout.query_lengths[i]), int(rollout.response_lengths[i])
        states = value_model.inner.base_model(rollout.input_ids[i : i + 1, : q + n]).last_hidden_state[0]
        values = value_model.head(states).squeeze(-1).double()
        for r in range(n):
            old, target = float(rollout.values[i, r]), float(rollout.returns[i, r])
            value = values[q - 1 + r]
            near = min(max(value, old - clip), old + clip)
            total = total + 0.5 * max(
                (value - target) ** 2, (near - target) ** 2, key=lambda x: float(torch.as_tensor(x).detach())
            )
    return total / int(rollout.response_lengths.sum())


def naive_lm_loss(policy, documents) -> torch.Tensor:
    total = 0.0
    for document in documents:
        logps = policy.inner(torch.tensor([document])).logits[0].double().log_softmax(-1)
        total = total - sum(logps[t, token] for t, token in enumerate(document[1:]))
    return total / sum(len(d) - 1 for d in documents)


def grad_of(loss, model) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_ppo_gradient_is_that_of_a_loop_over_episodes(setup, runtime):
    policy_grads, value_grads, _ = gradients(setup, setup.moved, runtime, per_device_train_batch_size=5)
    close(
        policy_grads, grad_of(naive_ppo_loss(setup.actors.policy, setup.moved, config_of()), setup.actors.policy), 1e-5
    )
    expected = grad_of(naive_value_loss(setup.actors.value_model, setup.moved, config_of()), setup.actors.value_model)
    close(value_grads, expected, 1e-5)


def other_engine(rollout, config, scale: float = 0.6):
    """The rollout as if another engine had drawn its tokens, and what follows from it."""
    noise = torch.randn(rollout.logprobs.shape, generator=torch.Generator().manual_seed(9)) * scale
    changed = dataclasses.replace(rollout, sampler_logprobs=rollout.logprobs + noise)
    return dataclasses.replace(changed, importance_weights=token_weights(vars(changed), changed.response_mask, config))


def test_K4_weights_multiply_the_policy_loss_of_their_tokens_and_no_other(setup, runtime):
    changes = {"importance_weight_cap": 1.3, "per_device_train_batch_size": 5}
    weighed = other_engine(setup.moved, config_of(**changes))
    plain = gradients(setup, setup.moved, runtime, DOCUMENTS[:2], ptx_coef=0.0, per_device_train_batch_size=5)
    ours = gradients(setup, weighed, runtime, DOCUMENTS[:2], ptx_coef=0.0, **changes)
    expected = naive_weighted_gradient(setup.actors.policy, weighed, config_of(**changes))
    close(ours[0], expected, 1e-5)
    assert float((flat(ours[0]) - flat(plain[0])).abs().max()) > 1e-3
    assert torch.equal(flat(ours[1]), flat(plain[1])), "the value loss has no weights"
    for name in ("ratio", "approxkl", "policy_clipped", "entropy", "ptx_loss", "value_loss"):
        assert ours[2].sums[name] == plain[2].sums[name], name


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_K4_an_engine_that_agrees_changes_no_bit(setup, runtime, level):
    config = config_of(importance_weight_cap=2.0, importance_weight_band=3.0, importance_weight_level=level)
    same = other_engine(setup.moved, config, scale=0.0)
    assert torch.equal(same.importance_weights, same.response_mask.float())
    for a, b in zip(gradients(setup, setup.moved, runtime), gradients(setup, same, runtime), strict=True):
        assert a == b if hasattr(a, "sums") else torch.equal(flat(a), flat(b))


@pytest.mark.parametrize("size", [1, 5])
def test_P16_microbatch_size_changes_no_weighted_gradient(setup, runtime, size):
    changes = {"importance_weight_cap": 2.0, "importance_weight_band": 3.0, "importance_weight_level": "sequence"}
    weighed = other_engine(setup.moved, config_of(**changes))
    assert 0 < int((weighed.importance_weights == 0).sum()) < weighed.importance_weights.numel()
    whole = gradients(setup, weighed, runtime, per_device_train_batch_size=12, **changes)
    cut = gradients(setup, weighed, runtime, per_device_train_batch_size=size, **changes)
    close(cut[0], whole[0], 1e-5)


def test_the_mismatch_is_that_of_the_rollout_where_logprobs_were_recomputed(setup, runtime):
    rollout = other_engine(setup.rollout, config_of())
    stats = update(rollout, recorder(setup.actors), lambda count: [], config_of(num_mini_batches=3), runtime, 0)
    differences = [
        abs(float(a) - float(b))
        for mask, *rows in zip(rollout.response_mask, rollout.logprobs, rollout.sampler_logprobs, strict=True)
        for a, b in zip(*(row[mask] for row in rows), strict=True)
    ]
    assert stats.sums["mismatch_tokens"] == len(differences) == int(rollout.response_lengths.sum())
    assert stats.mean("mismatch", "mismatch_tokens") == pytest.approx(sum(differences) / len(differences), rel=1e-5)
    assert stats.sums["max_mismatch"] == pytest.approx(max(differences), rel=1e-5)
    assert stats.sums["mismatch_kl"] > 0


def test_the_mismatch_is_that_of_the_first_minibatch_where_the_samplers_stand(setup, runtime):
    """Later minibatches are seen by a policy that has moved: their ratios hold more than the engines' difference."""
    config = config_of(old_logprobs="sampler", num_mini_batches=3, max_grad_norm=1.0)
    shift = 0.25
    logprobs = setup.rollout.logprobs - shift  # the sampler drew each token with less probability
    rollout = dataclasses.replace(setup.rollout, logprobs=logprobs, sampler_logprobs=logprobs)
    actors = dataclasses.replace(setup.actors, policy=copy.deepcopy(setup.actors.policy))
    learner = Learner(actors.policy, actors.value_model, *adams(actors.policy, actors.value_model, rate=1e-2), None)
    stats = update(rollout, learner, lambda count: [], config, runtime, 0)
    assert 0 < stats.sums["mismatch_tokens"] < stats.sums["tokens"]
    assert stats.mean("mismatch", "mismatch_tokens") == pytest.approx(shift, abs=1e-4)
    assert stats.sums["max_mismatch"] == pytest.approx(shift, abs=1e-4)
    k3 = math.exp(shift) - 1 - shift
    assert stats.mean("mismatch_kl", "mismatch_tokens") == pytest.approx(k3, abs=1e-4)
    assert stats.mean("ratio") != pytest.approx(math.exp(shift), abs=1e-3), "the policy moved after the first"


def test_X1_gradient_is_ppo_plus_coefficient_times_lm(setup, runtime):
    learner, coef = recorder(setup.actors), 27.8
    config = config_of(ptx_coef=coef, per_device_train_batch_size=3)
    optimiser_step(setup.moved, DOCUMENTS, learner, config, runtime)
    assert len(learner.policy_optimizer.steps) == 1, "one optimiser step a minibatch"
    policy = setup.actors.policy
    ppo, lm = (
        grad_of(naive_ppo_loss(policy, setup.moved, config), policy),
        grad_of(naive_lm_loss(policy, DOCUMENTS), policy),
    )
    close(learner.policy_optimizer.steps[0], [a + coef * b for a, b in zip(ppo, lm, strict=True)], 1e-5)


def test_X2_coefficient_0_is_plain_ppo_bit_for_bit(tiny_llama, folder, runtime):
    def weights(**changes):
        config = config_of(num_mini_batches=3, max_grad_norm=1.0, **changes)
        actors = actors_of(copy.deepcopy(tiny_llama), folder)
        policy = actors.policy
        learner = Learner(policy, actors.value_model, *adams(policy, actors.value_model), None)
        asked = []

        def documents(count):
            asked.append(count)
            return DOCUMENTS[:count]

        rollout = collect_rollout(make_queries(12), actors, config, runtime, 0.1, 0)
        stats = update(rollout, learner, documents, config, runtime, 0)
        return policy.state_dict(), asked, stats

    plain, _, _ = weights(ptx_coef=0.0)
    zero, asked, stats = weights(ptx_coef=0.0, ptx_examples_per_episode=1)
    assert asked == [0, 0, 0] and stats.sums["ptx_tokens"] == 0
    assert all(torch.equal(plain[name], zero[name]) for name in plain)
    mixed, asked, _ = weights(ptx_coef=0.5, ptx_examples_per_episode=1)
    assert asked == [4, 4, 4] and any(not torch.equal(plain[name], mixed[name]) for name in plain)


def test_X2_a_coefficient_of_0_on_given_documents_adds_exactly_nothing(setup, runtime):
    alone, _, _ = gradients(setup, setup.moved, runtime)
    with_documents, _, _ = gradients(setup, setup.moved, runtime, DOCUMENTS, ptx_coef=0.0)
    assert torch.equal(flat(alone), flat(with_documents))


def test_X3_documents_consumed_are_ratio_times_episodes(setup, runtime):
    taken = []

    def documents(count):
        taken.append(count)
        return [DOCUMENTS[i % 4] for i in range(count)]

    config = config_of(ptx_coef=1.0, ptx_examples_per_episode=8, num_mini_batches=4, num_ppo_epochs=1)
    update(setup.rollout, recorder(setup.actors), documents, config, runtime, 0)
    assert taken == [24] * 4 and sum(taken) == 8 * 12


def test_X4_lm_loss_sends_no_gradient_to_the_value_model(setup, runtime):
    _, alone, _ = gradients(setup, setup.moved, runtime)
    _, with_documents, _ = gradients(setup, setup.moved, runtime, DOCUMENTS, ptx_coef=27.8)
    assert torch.equal(flat(alone), flat(with_documents))


@pytest.mark.parametrize("size", range(1, 12))
def test_P16_microbatch_size_changes_no_gradient(setup, runtime, size):
    whole = gradients(setup, setup.moved, runtime, DOCUMENTS, ptx_coef=2.0, per_device_train_batch_size=12)
    cut = gradients(setup, setup.moved, runtime, DOCUMENTS, ptx_coef=2.0, per_device_train_batch_size=size)
    close(cut[0], whole[0], 1e-5)
    close(cut[1], whole[1], 1e-5)
    for name, value in whole[2].sums.items():
        assert cut[2].sums[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize("tokens, size", [(1, 16), (9, 16), (20, 16), (20, 2), (10_000, 16)])
def test_P16_a_microbatch_of_so_many_tokens_changes_no_gradient(setup, runtime, tokens, size):
    """From one row a microbatch to all rows in one."""
    whole = gradients(setup, setup.moved, runtime, DOCUMENTS, ptx_coef=2.0, per_device_train_batch_size=12)
    changes = {"per_device_train_batch_size": size, "microbatch_tokens": tokens}
    cut = gradients(setup, setup.moved, runtime, DOCUMENTS, ptx_coef=2.0, **changes)
    close(cut[0], whole[0], 1e-5)
    close(cut[1], whole[1], 1e-5)
    for name, value in whole[2].sums.items():
        assert cut[2].sums[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
    rows = [len(micro) for micro in microbatches(setup.moved, config_of(**changes), runtime)]
    assert rows == [1] * 12 if tokens == 1 else rows == [12] if tokens == 10_000 else 1 < max(rows) <= size


class Others:
    """A process whose peers have `batches` microbatches."""

    sharded = True
    device = torch.device("cpu")
    as_many = Runtime.as_many

    def __init__(self, batches: int):
        self.batches = batches

    def max(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(min=self.batches)


@pytest.mark.parametrize("others", range(1, 13))
def test_P16_every_process_has_as_many_microbatches_as_the_one_that_has_most(setup, others):
    """A model in parts over processes does not bear that one goes forward more often than another."""
    config = config_of(per_device_train_batch_size=5, microbatch_tokens=40)
    numbered = dataclasses.replace(setup.rollout, raw_scores=torch.arange(12.0))
    alone = microbatches(numbered, config, Others(1))
    micros = microbatches(numbered, config, Others(others))
    assert 1 < len(alone) < 12 and len(micros) == max(len(alone), others)
    assert sorted(int(n) for micro in micros for n in micro.raw_scores) == list(range(12))
    for micro in micros:
        assert 1 <= len(micro) <= 5
        lengths = micro.query_lengths + micro.response_lengths
        assert len(micro) == 1 or int(lengths.sum()) <= 40
        for i, n in enumerate(micro.raw_scores.int().tolist()):
            length = int(lengths[i])
            assert torch.equal(micro.input_ids[i, :length], numbered.input_ids[n, :length])
            count = int(micro.response_lengths[i])
            assert torch.equal(micro.advantages[i, :count], numbered.advantages[n, :count])


def test_P4_first_minibatch(setup, runtime):
    _, _, stats = gradients(setup, setup.rollout, runtime, per_device_train_batch_size=5)
    tokens = int(setup.rollout.response_lengths.sum())
    assert stats.sums["tokens"] == tokens
    assert stats.mean("ratio") == pytest.approx(1, abs=1e-6) and stats.sums["max_ratio_deviation"] < 1e-5
    assert stats.sums["policy_clipped"] == 0 and stats.mean("approxkl") < 1e-10
    advantages = [
        a for row, n in zip(setup.rollout.advantages, setup.rollout.response_lengths, strict=True) for a in row[:n]
    ]
    assert stats.mean("policy_loss") == pytest.approx(-float(sum(advantages)) / tokens, abs=1e-5)
    assert abs(stats.mean("policy_loss")) < 1e-5


def test_P7_junk_in_the_padding_changes_no_loss_and_no_gradient(setup, runtime):
    rollout = setup.moved
    off = ~rollout.response_mask
    columns = torch.arange(rollout.input_ids.shape[1])[None, :]
    past = columns >= (rollout.query_lengths + rollout.response_lengths)[:, None]
    assert off.any() and past.any()
    junk = {
        name: getattr(rollout, name).masked_fill(off, value)
        for name, value in {
            "logprobs": float("nan"), "ref_logprobs": 1e30, "values": float("nan"), "rewards": float("inf"),
            "advantages": float("nan"), "returns": float("-inf"),
        }.items()
    }  # fmt: skip
    ids = torch.where(past, torch.randint(2, 64, past.shape), rollout.input_ids)
    dirty = dataclasses.replace(rollout, input_ids=ids, **junk)
    for size in (4, 12):
        clean_result = gradients(setup, rollout, runtime, per_device_train_batch_size=size)
        dirty_result = gradients(setup, dirty, runtime, per_device_train_batch_size=size)
        assert torch.equal(flat(clean_result[0]), flat(dirty_result[0]))
        assert torch.equal(flat(clean_result[1]), flat(dirty_result[1]))
        assert clean_result[2].sums == dirty_result[2].sums


def test_P13_512_episodes_are_8_steps_of_64_each_episode_once_an_epoch(setup, runtime, monkeypatch):
    rows = torch.arange(512) % 12
    many = dataclasses.replace(setup.rollout.index(rows), raw_scores=torch.arange(512.0))
    seen = []

    def spy(minibatch, documents, *rest):
        seen.append(minibatch.raw_scores.int().tolist())
        return SimpleNamespace(sums={"tokens": 1.0})

    monkeypatch.setattr(align.update, "optimiser_step", spy)
    config = PPOConfig(output_dir="o", reward=(ModelTerm("r"),), ptx_coef=0.0, num_ppo_epochs=2)
    assert (config.rollout_batch_size, config.num_mini_batches) == (512, 8)
    update(many, recorder(setup.actors), lambda count: [], config, runtime, 0)
    assert [len(part) for part in seen] == [64] * 16
    first, second = sum(seen[:8], []), sum(seen[8:], [])
    assert sorted(first) == list(range(512)) == sorted(second)
    assert first != second and first != list(range(512)), "each epoch has its own order"


def test_P13_optimisers_step_once_a_minibatch(setup, runtime):
    learner = recorder(setup.actors)
    config = config_of(num_mini_batches=4, per_device_train_batch_size=2, num_ppo_epochs=3)
    stats = update(setup.rollout, learner, lambda count: [], config, runtime, 0)
    assert len(learner.policy_optimizer.steps) == len(learner.value_optimizer.steps) == 12
    assert stats.sums["steps"] == 12 and stats.sums["tokens"] == 3 * int(setup.rollout.response_lengths.sum())


def test_P13_batch_algebra_is_whole():
    algebra = BatchAlgebra.of(PPOConfig(output_dir="o", reward=(ModelTerm("r"),), pretraining_file="t"), 1)
    assert (algebra.rollout, algebra.minibatch, algebra.ptx, algebra.iterations) == (512, 64, 512, 500)
    for changes, processes in (
        ({"rollout_batch_size": 10, "num_mini_batches": 4}, 1),
        ({"rollout_batch_size": 12, "num_mini_batches": 4}, 2),
        ({"total_episodes": 13}, 1),
        ({"ptx_coef": 1.0, "ptx_examples_per_episode": 0.3}, 1),
    ):
        with pytest.raises(UserError):
            BatchAlgebra.of(config_of(**changes), processes)


def test_P14_learning_rates():
    config = PPOConfig(output_dir="o", reward=(ModelTerm("r"),), pretraining_file="t", learning_rate=2e-6)
    learner = SimpleNamespace(
        policy_optimizer=SimpleNamespace(param_groups=[{"lr": 0.0}]),
        value_optimizer=SimpleNamespace(param_groups=[{"lr": 0.0}]),
    )
    rates = []
    for iteration in range(15):
        set_learning_rates(learner, config, iteration, 500)
        rates.append(learner.policy_optimizer.param_groups[0]["lr"])
        assert learner.value_optimizer.param_groups[0]["lr"] == 9e-6
    expected = [0.2e-6, 0.38e-6, 0.56e-6, 0.74e-6, 0.92e-6, 1.1e-6, 1.28e-6, 1.46e-6, 1.64e-6, 1.82e-6] + [2e-6] * 5
    assert rates == pytest.approx(expected, rel=1e-9)
    later, alone = [], dataclasses.replace(config, value_warmup_iterations=3)
    for iteration in range(18):
        set_learning_rates(learner, alone, iteration, 500)
        later.append(learner.policy_optimizer.param_groups[0]["lr"])
    assert later == [0.0] * 3 + rates and learner.value_optimizer.param_groups[0]["lr"] == 9e-6


def test_P14_the_rate_reaches_muons_matrices_and_its_adamw():
    config = config_of(optim="muon", learning_rate=2e-3, value_learning_rate=3e-3, warmup_iterations=4)
    models = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)) for _ in range(2)]
    policy, value = (make_optimizer(model, 1.0, config) for model in models)
    set_learning_rates(SimpleNamespace(policy_optimizer=policy, value_optimizer=value), config, 2, 12)
    for optimizer, rate in ((policy, 1.1e-3), (value, 3e-3)):  # from a tenth to all of it over four iterations
        assert len(optimizer.parts) == 2
        rates = [group["lr"] for part in optimizer.parts for group in part.param_groups]
        assert rates == pytest.approx([rate, rate], rel=1e-9)


def digest(model: torch.nn.Module) -> str:
    blob = b"".join(value.contiguous().numpy().tobytes() for value in model.state_dict().values())
    return hashlib.sha256(blob).hexdigest()


def adams(policy, value_model, rate: float = 3e-3):
    return [torch.optim.AdamW(m.parameters(), rate, (0.9, 0.95), 1e-5, weight_decay=0.0) for m in (policy, value_model)]


def test_P1_reference_and_reward_never_change(folder, runtime, tiny_codec):
    config = dataclasses.replace(
        config_of(
            num_mini_batches=2, max_grad_norm=1.0, ema_decay=0.9, learning_rate=1e-3, value_learning_rate=1e-3,
            microbatch_tokens=40,
        ),
        model_name_or_path=str(folder / "policy"), reward=(ModelTerm(str(folder / "reward")),),
    )  # fmt: skip
    codec = SimpleNamespace(eos_id=EOS, pad_id=PAD)
    learner = build_learner(config, value_start(config, codec), runtime)
    actors = build_rollout_models(config, codec, value_start(config, codec), learner, runtime)
    reward = actors.reward.terms[0].members[0]
    assert (reward.batch_size, reward.max_tokens) == (16, 40)
    names = {"reference": actors.ref_policy, "reward": reward.model}
    before = {name: digest(model) for name, model in names.items()}
    trained = {"policy": learner.policy, "value": learner.value_model}
    started = {name: digest(model) for name, model in trained.items()}
    assert started == {"policy": before["reference"], "value": before["reward"]}
    for iteration in range(3):
        rollout = collect_rollout(make_queries(12), actors, config, runtime, 0.1, iteration)
        update(rollout, learner, lambda count: [], config, runtime, iteration)
    assert before == {name: digest(model) for name, model in names.items()}
    assert all(started[name] != digest(model) for name, model in trained.items())
    assert not any(p.requires_grad for model in names.values() for p in model.parameters())


def test_the_value_model_may_learn_alone_first(folder, runtime, tiny_codec):
    config = dataclasses.replace(
        config_of(
            total_episodes=36, learning_rate=1e-3, value_learning_rate=1e-3, value_warmup_iterations=2,
            warmup_iterations=0,
        ),
        model_name_or_path=str(folder / "policy"), reward=(ModelTerm(str(folder / "reward")),), kl_target=6.0,
    )  # fmt: skip
    ends = SimpleNamespace(eos_id=EOS, pad_id=PAD)
    learner = build_learner(config, value_start(config, tiny_codec), runtime)
    actors = build_rollout_models(config, ends, value_start(config, tiny_codec), learner, runtime)
    seen = [(digest(learner.policy), digest(learner.value_model))]
    kl_coef, asked = config.kl_coef, []

    def documents(count: int) -> list:
        asked.append(count)
        return []

    for iteration in range(3):
        set_learning_rates(learner, config, iteration, 3)
        rollout = collect_rollout(make_queries(12), actors, config, runtime, kl_coef, iteration)
        stats = update(rollout, learner, documents, config, runtime, iteration)
        assert bool(asked) == bool(learner.policy_optimizer.state) == (iteration == 2), "a policy at rest has no state"
        assert (stats.sums["policy_grad_norm"] > 0) == (iteration == 2) and stats.sums["entropy"] > 0
        kl_coef = next_kl_coef(kl_coef, 0.0, config, iteration)
        seen.append((digest(learner.policy), digest(learner.value_model)))
        assert (kl_coef == config.kl_coef) == (iteration < 2), "a KL of 0 that nothing could move adapts nothing"
    policies, values = zip(*seen, strict=True)
    assert policies[0] == policies[1] == policies[2] != policies[3]
    assert len(set(values)) == 4


def test_P15_average_takes_one_step_an_optimiser_step(tiny_llama, folder, runtime):
    actors = actors_of(tiny_llama, folder)
    policy = actors.policy
    ema = EMA(policy, 0.9)
    learner = Learner(policy, actors.value_model, *adams(policy, actors.value_model), ema)
    name = "model.model.layers.0.mlp.up_proj.weight"
    shadow = policy.get_parameter(name).detach().double().clone()
    seen = []
    real = learner.policy_optimizer.step

    def step(*args, **kwargs):
        result = real(*args, **kwargs)
        seen.append(policy.get_parameter(name).detach().double().clone())
        return result

    learner.policy_optimizer.step = step
    config = config_of(num_mini_batches=3)
    rollout = collect_rollout(make_queries(12), actors, config, runtime, 0.1, 0)
    update(rollout, learner, lambda count: [], config, runtime, 0)
    assert len(seen) == 3
    for weights in seen:
        shadow = 0.9 * shadow + 0.1 * weights
    assert float((ema.shadow[name].double() - shadow).abs().max()) < 1e-6


@pytest.mark.parametrize("skipped", [True, False])
def test_P15_a_step_that_was_skipped_leaves_the_average_as_it_is(setup, runtime, skipped):
    """Under float16 a step whose gradients overflowed is not taken."""
    learner = recorder(setup.actors)
    learner.policy_optimizer.step_was_skipped = skipped
    ema = EMA(setup.actors.policy, 0.5)
    for shadow in ema.shadow.values():
        shadow.add_(1.0)  # else the weights, which the recorder leaves alone, would be their own average
    before = {name: shadow.clone() for name, shadow in ema.shadow.items()}
    optimiser_step(setup.rollout, [], dataclasses.replace(learner, ema=ema), config_of(), runtime)
    for name, shadow in ema.shadow.items():
        expected = before[name] if skipped else before[name] - 0.5
        assert torch.allclose(shadow, expected, atol=1e-6), name


@pytest.mark.parametrize("field", ["advantages", "returns", "logprobs"])
def test_a_number_that_is_not_finite_stops_before_any_weight_changes(setup, runtime, field):
    value = getattr(setup.rollout, field).clone()
    value[0, 0] = float("nan")
    wrong = dataclasses.replace(setup.rollout, **{field: value})
    policy, value_model = setup.actors.policy, setup.actors.value_model
    ema = EMA(policy, 0.9)
    learner = Learner(policy, value_model, *adams(policy, value_model), ema)
    before = digest(policy), digest(value_model)
    with pytest.raises(UserError, match=r" is nan; .*(are as before this minibatch|no weight was changed)"):
        optimiser_step(wrong, [], learner, config_of(), runtime)
    assert before == (digest(policy), digest(value_model))


def poison(actors, where: str):
    """A fault that the rollout does not hold, and what it shows in."""
    model = actors.policy if where.startswith("policy") else actors.value_model
    if where == "policy loss":
        model.inner.lm_head.weight.data[0, 0] = float("nan")
        return "approxkl is nan"
    if where == "value loss":
        model.head.bias.data.fill_(1e30)  # its square is over float32
        return "value_loss is inf"
    next(model.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    return f"{where.split()[0]}_grad_norm is nan"


@pytest.mark.parametrize("where", ["policy loss", "policy gradient", "value loss", "value gradient"])
def test_what_is_not_finite_in_an_update_stops_it_and_its_batch_is_kept(setup, runtime, tmp_path, where):
    actors = dataclasses.replace(
        setup.actors, policy=copy.deepcopy(setup.actors.policy), value_model=copy.deepcopy(setup.actors.value_model)
    )
    policy, value_model = actors.policy, actors.value_model
    learner = Learner(policy, value_model, *adams(policy, value_model), EMA(policy, 0.9))
    config = dataclasses.replace(config_of(num_mini_batches=3, ptx_coef=0.5), output_dir=str(tmp_path / "run"))
    what = poison(actors, where)
    before = digest(policy), digest(value_model)
    with pytest.raises(UserError, match=what) as error:
        update(setup.moved, learner, lambda count: DOCUMENTS[:2], config, runtime, 7)
    assert len(str(error.value).splitlines()) == 1 and f"its batch is in {tmp_path / 'run' / 'stopped-0'}" in str(
        error.value
    )

    # In the policy's part nothing has changed; in the value model's, which comes after, the policy has stepped.
    if where.startswith("policy"):
        assert before == (digest(policy), digest(value_model)) and "policy and the value model are as before" in str(
            error.value
        )
    else:
        assert before[1] == digest(value_model) and before[0] != digest(policy)
        assert "the value model is as before this minibatch, the policy has taken its step" in str(error.value)

    about = json.loads((tmp_path / "run" / "stopped-0" / "batch.json").read_text(encoding="utf-8"))
    assert about["why"].startswith(what) and (about["iteration"], about["epoch"]) == (7, 0)
    assert about["config"]["num_mini_batches"] == 3 and about["documents"] == DOCUMENTS[:2] and len(about["rows"]) == 4
    expected = setup.moved.index(torch.tensor(about["rows"]))
    kept = load_file(tmp_path / "run" / "stopped-0" / "batch.safetensors")
    named = {name: value for name, value in expected.tensors().items() if value is not None}
    assert kept.keys() == named.keys() and {"input_ids", "logprobs", "scores/reward", "sampler_logprobs"} <= kept.keys()
    assert all(torch.equal(kept[name], value) for name, value in named.items())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["stopped-0"], "nothing half written beside it"


def test_a_batch_that_cannot_be_written_hides_no_error(setup, runtime, tmp_path):
    (tmp_path / "run").write_text("a file where the folder should be")
    config = dataclasses.replace(config_of(), output_dir=str(tmp_path / "run"))
    wrong = dataclasses.replace(setup.rollout, advantages=setup.rollout.advantages.fill_(float("inf")))
    with pytest.raises(UserError, match="advantages is inf; .*no weight was changed; its batch could not be written: "):
        update(wrong, recorder(setup.actors), lambda count: [], config, runtime, 0)


def share_of_low_tokens(prompts, episodes: list[Episode]) -> list[float]:
    return [sum(token < 32 for token in e.response) / len(e.response) for e in episodes]


def bandit(policy, folder, runtime, reward, kl_coef: float, iterations: int = 12, rate: float = 3e-3):
    """PPO on 'write tokens below 32'; the mean share of them and the mean KL, an entry an iteration."""
    policy = copy.deepcopy(policy)
    policy.lm_head.weight.data.div_(20)  # nearly uniform, as it was made
    config = config_of(
        rollout_batch_size=64, total_episodes=64, num_mini_batches=4, per_device_train_batch_size=64, max_grad_norm=1.0,
        missing_eos_penalty=None,
    )  # fmt: skip
    actors = actors_of(policy, folder, reward)
    policy = actors.policy
    learner = Learner(policy, actors.value_model, *adams(policy, actors.value_model, rate), None)
    shares, kls = [], []
    for iteration in range(iterations):
        rollout = collect_rollout(make_queries(64), actors, config, runtime, kl_coef, iteration)
        low = (rollout.input_ids < 32).float()
        columns = torch.arange(low.shape[1])[None, :]
        inside = (columns >= rollout.query_lengths[:, None]) & (
            columns < (rollout.query_lengths + rollout.response_lengths)[:, None]
        )
        shares.append(float(low[inside].mean()))
        kl = (rollout.logprobs - rollout.ref_logprobs).masked_fill(~rollout.response_mask, 0).sum(1)
        kls.append(float(kl.mean()))
        update(rollout, learner, lambda count: [], config, runtime, iteration)
    return shares, kls


def test_P17_toy_bandit(tiny_llama, folder, runtime):
    def negated(prompts, episodes):
        return [-x for x in share_of_low_tokens(prompts, episodes)]

    up, free = bandit(tiny_llama, folder, runtime, share_of_low_tokens, 0.0)
    down, _ = bandit(tiny_llama, folder, runtime, negated, 0.0)
    _, held = bandit(tiny_llama, folder, runtime, share_of_low_tokens, 100.0)
    assert up[-1] > up[0] + 0.15 and down[-1] < down[0] - 0.15
    assert free[-1] > 0.3 and abs(held[-1]) < 0.1 * free[-1]


def test_a_norm_of_0_clips_nothing(runtime):
    """As in a Trainer; torch would take it for a bound that no gradient but 0 keeps."""
    for bound, expected in ((0, [3.0, 4.0]), (1.0, [0.6, 0.8]), (10.0, [3.0, 4.0])):
        p = torch.nn.Parameter(torch.zeros(2))
        p.grad = torch.tensor([3.0, 4.0])
        assert runtime.clip_grad_norm([p], bound) == 5.0
        assert p.grad.tolist() == pytest.approx(expected, abs=1e-5)


def test_an_overflow_under_float16_is_left_to_the_loss_scaler(runtime, monkeypatch):
    """Its step is skipped by the scaler; in every other type it stops the run."""
    model = torch.nn.Linear(2, 2)
    model.weight.grad = torch.full((2, 2), float("inf"))
    arguments = "policy", model, Recorder(model.parameters()), {"policy_loss": 1.0}, config_of(), runtime
    with pytest.raises(UserError, match="policy_grad_norm is inf"):
        step(*arguments)
    monkeypatch.setattr(Runtime, "scales_loss", True)
    model.weight.grad = torch.full((2, 2), float("inf"))
    assert math.isinf(step(*arguments))
    with pytest.raises(UserError, match="policy_loss is nan"):
        step(*arguments[:3], {"policy_loss": float("nan")}, *arguments[4:])


def test_pretraining_documents_a_minibatch_are_whole_up_to_rounding():
    """0.07 x 100 is 7.000000000000001 in floats."""
    config = PPOConfig(
        output_dir="x", model_name_or_path="m", reward=(ModelTerm("r"),), pretraining_file="t", total_episodes=100,
        rollout_batch_size=100, num_mini_batches=1, ptx_examples_per_episode=0.07,
    )  # fmt: skip
    assert BatchAlgebra.of(config, 1).ptx == 7
    with pytest.raises(UserError, match="choose a whole product"):
        BatchAlgebra.of(dataclasses.replace(config, ptx_examples_per_episode=0.075), 1)


def test_the_order_of_minibatches_is_another_in_each_iteration_epoch_and_seed(setup, runtime, monkeypatch):
    taken = []

    def recorded(minibatch, *rest):
        ends = (minibatch.query_lengths + minibatch.response_lengths).tolist()
        taken.append([tuple(row[:end]) for row, end in zip(minibatch.input_ids.tolist(), ends, strict=True)])
        return UpdateStats({"tokens": 1.0})

    monkeypatch.setattr(align.update, "optimiser_step", recorded)
    orders = {}
    for seed, iteration in ((0, 0), (0, 1), (1, 0)):
        config = config_of(num_mini_batches=3, num_ppo_epochs=2, seed=seed, old_logprobs="recompute")
        taken.clear()
        monkeypatch.setattr(align.update, "sampling_mismatch", lambda *args: {})
        update(setup.rollout, None, lambda count: [], config, runtime, iteration)
        assert len(taken) == 6
        for epoch in (0, 1):
            orders[seed, iteration, epoch] = tuple(row for part in taken[3 * epoch : 3 * epoch + 3] for row in part)
    assert len(set(orders.values())) == 6
    assert len({tuple(sorted(order)) for order in orders.values()}) == 1, "each the whole rollout"


def test_dropout_is_off_in_both_models_that_learn(runtime, tmp_path):
    sizes = dict(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32, eos_token_id=EOS, pad_token_id=PAD)
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None)).save_pretrained(tmp_path)  # 0.1 everywhere
    config = dataclasses.replace(config_of(), model_name_or_path=str(tmp_path), reward=(FunctionTerm("a:b"),))
    learner = build_learner(config, ValueStart(str(tmp_path), fresh_head=True), runtime)
    rates = [m.p for model in (learner.policy, learner.value_model) for m in model.modules() if hasattr(m, "p")]
    assert len(rates) > 6 and set(rates) == {0.0}
