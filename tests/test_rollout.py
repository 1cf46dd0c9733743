"""align/rollout.py: rollouts, the missing-EOS rule, and the checks before the first update."""

import copy
import dataclasses
import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from align.config import ModelTerm, PPOConfig
from align.errors import UserError
from align.generate import make_sampler
from align.models import Policy, add_residual_dropout, disable_dropout, load_packed_policy, load_scalar_model
from align.rewards import ModelReward, RewardSum, Term
from align.rollout import (
    Query,
    RolloutModels,
    apply_eos_rule,
    collect_rollout,
    shape_rewards,
    token_weights,
)
from align.runtime import Runtime
from align.step_zero import CAUSES, check_step_zero, microbatch_rows, step_zero_limits, warn_of_rewarded_cuts
from align.types import Prompt

EOS, PAD, BETA = 1, 0, 0.3
SHARED = {"total_episodes": 16, "rollout_batch_size": 16, "num_mini_batches": 2, "ptx_coef": 0.0}


@pytest.fixture(scope="module")
def runtime():
    os.environ["ACCELERATE_USE_CPU"] = "true"
    return Runtime(seed=0)


def config_of(**changes) -> PPOConfig:
    values = SHARED | {"max_new_tokens": 6, "per_device_rollout_batch_size": 4, "per_device_train_batch_size": 3}
    return PPOConfig(output_dir="out", model_name_or_path="m", reward=(ModelTerm("r"),), **(values | changes))


def rewarded(reward) -> RewardSum:
    return RewardSum([Term("model", 1.0, [reward])])


def make_queries(count: int) -> list[Query]:
    generator = torch.Generator().manual_seed(1)
    lengths = [1 + i % 5 for i in range(count)]
    tokens = [tuple((torch.randint(2, 64, (n,), generator=generator)).tolist()) for n in lengths]
    return [Query(Prompt("p", {"id": f"row-{i}"}), ids) for i, ids in enumerate(tokens)]


def sharpen(policy: torch.nn.Module) -> None:
    """A fresh policy is nearly uniform and almost never ends; make it opinionated, with some EOS."""
    with torch.no_grad():
        policy.lm_head.weight.mul_(20)
        policy.lm_head.weight[EOS] = policy.lm_head.weight[2:10].mean(0) + policy.lm_head.weight[7]


@pytest.fixture(params=[True, False], ids=["packed", "padded"])
def actors(request, tiny_llama, tmp_path) -> RolloutModels:
    sharpen(tiny_llama)
    tiny_llama.save_pretrained(tmp_path)
    reward_model = load_scalar_model(str(tmp_path), None if request.param else "eager", fresh_head=True)
    reward_model.head.bias.data.fill_(0.4)
    policy = Policy(tiny_llama, request.param)
    assert policy.packed == reward_model.packed == request.param
    sampler = make_sampler(policy, EOS, PAD, 4)
    reference, value_model = copy.deepcopy(policy), copy.deepcopy(reward_model)
    return RolloutModels(policy, reference, value_model, rewarded(ModelReward(reward_model, PAD, EOS, 4)), sampler, PAD)


def test_a_response_that_fills_the_context(runtime, tmp_path):
    """GPT-2 looks positions up in a table, so a token too many is an error; EOS behind a cut-off response is one."""
    longest, new = 5, 6
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=longest + new, n_embd=16, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=EOS
    )
    GPT2LMHeadModel(config).eval().save_pretrained(tmp_path)
    policy, scalar = load_packed_policy(str(tmp_path)), load_scalar_model(str(tmp_path), fresh_head=True)
    for model in (policy, scalar):
        disable_dropout(model)
    reward = rewarded(ModelReward(copy.deepcopy(scalar), PAD, EOS, 4))
    actors = RolloutModels(policy, copy.deepcopy(policy), scalar, reward, make_sampler(policy, EOS, PAD, 4), PAD)
    rollout = collect_rollout(make_queries(16), actors, config_of(max_new_tokens=new), runtime, BETA, iteration=0)
    ends = rollout.query_lengths + rollout.response_lengths
    assert bool(((ends == longest + new) & ~rollout.finished).any()), "no row is as long as this test needs"
    numbers = check_step_zero(rollout, actors, config_of(), runtime, EOS, value_term="model")
    assert numbers["value_minus_score"] < 1e-5
    full = rollout.index((ends == longest + new).nonzero()[:, 0])
    assert check_step_zero(full, actors, config_of(), runtime, EOS, "model")["value_minus_score"] is None


@pytest.fixture
def rollout(actors, runtime):
    return collect_rollout(make_queries(16), actors, config_of(), runtime, BETA, iteration=0)


def test_rollout_is_laid_out_as_query_response_padding(rollout):
    queries = make_queries(16)
    for i, query in enumerate(queries):
        total = int(rollout.query_lengths[i] + rollout.response_lengths[i])
        row = rollout.input_ids[i].tolist()
        response = row[len(query.tokens) : total]
        assert tuple(row[: len(query.tokens)]) == query.tokens
        assert bool(rollout.finished[i]) == (response[-1] == EOS) and EOS not in response[:-1]
        assert rollout.response_mask[i].tolist() == [c < len(response) for c in range(rollout.response_mask.shape[1])]
        assert set(row[total:]) <= {PAD}
    assert 0 < int(rollout.finished.sum()) < 16, "the setup should hold both kinds of episodes"


def test_D3_every_finished_response_ends_in_exactly_one_eos(rollout):
    for i in range(len(rollout)):
        start, length = int(rollout.query_lengths[i]), int(rollout.response_lengths[i])
        response = rollout.input_ids[i, start : start + length].tolist()
        assert response.count(EOS) == int(rollout.finished[i])


def last_value(value_model, row: torch.Tensor) -> float:
    """At the row's last token, by transformers' backbone on the row alone."""
    with torch.no_grad():
        return float(value_model.head(value_model.inner.base_model(input_ids=row[None]).last_hidden_state[0, -1]))


def test_P2_value_at_the_last_token_is_the_score(rollout, actors):
    for i in range(len(rollout)):
        total = int(rollout.query_lengths[i] + rollout.response_lengths[i])
        row = rollout.input_ids[i, :total]
        read = row if rollout.finished[i] else torch.cat([row, torch.tensor([EOS])])
        value = last_value(actors.value_model, read)
        assert value == pytest.approx(float(rollout.raw_scores[i]), abs=1e-4)


def test_values_are_read_at_the_state_before_each_token(rollout, actors):
    for i in range(len(rollout)):
        start, length = int(rollout.query_lengths[i]), int(rollout.response_lengths[i])
        for r in range(length):
            value = last_value(actors.value_model, rollout.input_ids[i, : start + r])
            assert value == pytest.approx(float(rollout.values[i, r]), abs=1e-4)


def test_P3_kl_to_the_reference_is_0(rollout):
    u = (rollout.logprobs - rollout.ref_logprobs)[rollout.response_mask]
    assert float(u.abs().max()) < 1e-6


def test_P2_P3_P4_step_zero_passes(rollout, actors, runtime):
    numbers = check_step_zero(rollout, actors, config_of(), runtime, EOS, value_term="model")
    assert numbers["ratio_max_deviation"] < 1e-5 and numbers["kl"] < 1e-6 and numbers["value_minus_score"] < 1e-4


def nudged(model: torch.nn.Module) -> torch.nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def with_dropout(policy: Policy) -> Policy:
    if policy.packed:  # whose attention never drops anything
        add_residual_dropout(policy.inner, 0.3)
        return policy.train()
    for module in policy.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    return policy.train()


def test_P4_dropout_in_training_mode_is_caught(rollout, actors, runtime):
    with_dropout(actors.policy)
    with pytest.raises(UserError, match="step-zero check: ratio_max_deviation .*dropout"):
        check_step_zero(rollout, actors, config_of(), runtime, EOS, value_term="model")


def test_P4_another_temperature_is_caught(rollout, actors, runtime):
    with pytest.raises(UserError, match="step-zero check: ratio_max_deviation .*temperature"):
        check_step_zero(rollout, actors, config_of(temperature=0.7), runtime, EOS, value_term="model")


def test_P3_another_reference_is_caught(actors, runtime):
    changed = dataclasses.replace(actors, ref_policy=nudged(actors.ref_policy))
    rollout = collect_rollout(make_queries(16), changed, config_of(), runtime, BETA, iteration=0)
    with pytest.raises(UserError, match="step-zero check: kl "):
        check_step_zero(rollout, changed, config_of(), runtime, EOS, value_term="model")


def test_P2_another_value_model_is_caught(actors, runtime):
    changed = dataclasses.replace(actors, value_model=nudged(actors.value_model))
    rollout = collect_rollout(make_queries(16), changed, config_of(), runtime, BETA, iteration=0)
    with pytest.raises(UserError, match="step-zero check: value_minus_score "):
        check_step_zero(rollout, changed, config_of(), runtime, EOS, value_term="model")
    assert check_step_zero(rollout, changed, config_of(), runtime, EOS, None)["value_minus_score"] is None


def test_a_finished_response_without_eos_is_caught(rollout, actors, runtime):
    wrong = dataclasses.replace(rollout, finished=torch.ones_like(rollout.finished))
    with pytest.raises(UserError, match="step-zero check: a finished response does not end in EOS"):
        check_step_zero(wrong, actors, config_of(), runtime, EOS, value_term="model")


def test_nan_never_passes_the_step_zero_check(rollout, actors, runtime):
    wrong = dataclasses.replace(rollout, part_scores={"scores/model": torch.full((16,), float("nan"))})
    with pytest.raises(UserError, match="step-zero check: value_minus_score is nan"):
        check_step_zero(wrong, actors, config_of(), runtime, EOS, value_term="model")


def test_P7_rewards_sum_to_score_minus_kl(actors, runtime):
    changed = dataclasses.replace(actors, ref_policy=nudged(actors.ref_policy))
    rollout = collect_rollout(make_queries(16), changed, config_of(), runtime, BETA, iteration=0)
    for i in range(len(rollout)):
        length = int(rollout.response_lengths[i])
        u = [float(rollout.logprobs[i, r]) - float(rollout.ref_logprobs[i, r]) for r in range(length)]
        expected = float(rollout.scores[i]) - BETA * sum(u)
        assert sum(rollout.rewards[i].tolist()) == pytest.approx(expected, abs=1e-4)
        assert rollout.rewards[i, : length - 1].tolist() == pytest.approx([-BETA * x for x in u[:-1]], abs=1e-5)
        assert rollout.rewards[i, length:].abs().sum() == 0
    assert float((rollout.logprobs - rollout.ref_logprobs)[rollout.response_mask].abs().max()) > 0.01


def test_P8_no_eos_replaces_the_score(actors, runtime):
    rollout = collect_rollout(make_queries(16), actors, config_of(missing_eos_penalty=-1.5), runtime, BETA, 0)
    for score, raw, done in zip(rollout.scores.tolist(), rollout.raw_scores.tolist(), rollout.finished, strict=True):
        assert score == (raw if done else -1.5)


@pytest.mark.parametrize("penalty", [-1.5, 1.5])
def test_P8_no_eos_is_subtracted(actors, runtime, penalty):
    config = config_of(missing_eos_penalty=penalty, missing_eos_mode="subtract")
    rollout = collect_rollout(make_queries(16), actors, config, runtime, BETA, 0)
    for score, raw, done in zip(rollout.scores.tolist(), rollout.raw_scores.tolist(), rollout.finished, strict=True):
        assert score == pytest.approx(raw if done else raw - 1.5, abs=1e-6)


def test_P8_goldens():
    scores, finished = torch.tensor([2.0, 2.0]), torch.tensor([True, False])
    assert apply_eos_rule(scores, finished, -1.0, "replace").tolist() == [2.0, -1.0]
    assert apply_eos_rule(scores, finished, -1.0, "subtract").tolist() == [2.0, 1.0]
    assert apply_eos_rule(scores, finished, None, "replace").tolist() == [2.0, 2.0]


def test_reward_clip_comes_after_the_eos_rule(actors, runtime):
    config = config_of(reward_clip=0.25, missing_eos_penalty=-9.0)
    rollout = collect_rollout(make_queries(16), actors, config, runtime, BETA, 0)
    assert float(rollout.scores.abs().max()) <= 0.25
    assert rollout.scores[~rollout.finished].tolist() == [-0.25] * int((~rollout.finished).sum())


def test_P10_advantages_are_whitened_over_the_rollout(rollout):
    values = rollout.advantages[rollout.response_mask].double()
    assert float(values.mean()) == pytest.approx(0, abs=1e-5)
    assert float(((values - values.mean()) ** 2).mean()) == pytest.approx(1, abs=1e-3)


def test_P5_batching_of_the_rollout_changes_nothing(actors, runtime):
    rollouts = []
    for size, tokens in ((1, None), (3, None), (16, None), (16, 1), (3, 20)):
        sampler = make_sampler(actors.policy, EOS, PAD, size)
        config = config_of(per_device_rollout_batch_size=size, microbatch_tokens=tokens)
        changed = dataclasses.replace(actors, sampler=sampler)
        rollouts.append(collect_rollout(make_queries(16), changed, config, runtime, BETA, 0))
    first = rollouts[0]
    for other in rollouts[1:]:
        assert torch.equal(first.input_ids, other.input_ids)
        for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"):
            a, b = (getattr(r, name).masked_fill(~first.response_mask, 0) for r in (first, other))
            assert torch.allclose(a, b, atol=1e-4), name


def test_the_iteration_and_the_seed_change_what_is_sampled(actors, runtime):
    def ids(iteration, **changes):
        return collect_rollout(make_queries(16), actors, config_of(**changes), runtime, BETA, iteration).input_ids

    assert torch.equal(ids(3), ids(3))
    assert not torch.equal(ids(0), ids(1))
    assert not torch.equal(ids(0), ids(0, seed=1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_names_the_prompt_and_keeps_the_batch(actors, runtime, bad, tmp_path):
    before = copy.deepcopy(actors.policy.state_dict())

    def broken(prompts, episodes):
        return [bad if prompt.columns["id"] == "row-5" else 0.0 for prompt in prompts]

    changed = dataclasses.replace(actors, reward=rewarded(broken))
    config = dataclasses.replace(config_of(), output_dir=str(tmp_path))
    with pytest.raises(UserError, match=f"'row-5'.*; its batch is in {tmp_path / 'stopped-0'}") as error:
        collect_rollout(make_queries(16), changed, config, runtime, BETA, 3)
    assert "\n" not in str(error.value)
    about = json.loads((tmp_path / "stopped-0" / "batch.json").read_text(encoding="utf-8"))
    assert "'row-5'" in about["why"] and about["iteration"] == 3
    kept, expected = (
        load_file(tmp_path / "stopped-0" / "batch.safetensors"),
        collect_rollout(make_queries(16), actors, config, runtime, BETA, 3),
    )
    for name in ("input_ids", "query_lengths", "response_lengths", "finished", "logprobs", "ref_logprobs", "values"):
        assert torch.equal(kept[name], getattr(expected, name)), name
    assert all(torch.equal(before[name], value) for name, value in actors.policy.state_dict().items())


def test_whitened_rewards_keep_rewards_as_paid(rollout):
    """`rewards` is what was paid; whitening acts on what GAE sees."""
    names = ("input_ids", "query_lengths", "response_lengths", "finished", "logprobs", "ref_logprobs", "values")
    tensors = {name: getattr(rollout, name) for name in names}
    plain = shape_rewards(tensors, rollout.raw_scores, config_of(), BETA)
    whitened = shape_rewards(tensors, rollout.raw_scores, config_of(whiten_rewards=True), BETA)
    assert torch.equal(plain.rewards, whitened.rewards) and not torch.allclose(plain.returns, whitened.returns)


def test_P4_logprobs_of_the_sampler_may_stand_for_those_of_the_training_forward(actors, runtime, monkeypatch):
    recomputed = collect_rollout(make_queries(16), actors, config_of(), runtime, BETA, 0)
    config = config_of(old_logprobs="sampler")
    read = []
    forward = Policy.forward
    monkeypatch.setattr(Policy, "forward", lambda self, *args: (read.append(self), forward(self, *args))[1])
    sampled = collect_rollout(make_queries(16), actors, config, runtime, BETA, 0)
    assert set(map(id, read)) == {id(actors.ref_policy)}, "the policy has no forward pass of its own"
    assert torch.equal(sampled.input_ids, recomputed.input_ids)
    assert float((sampled.logprobs - recomputed.logprobs).abs().max()) < 1e-4
    numbers = check_step_zero(sampled, actors, config, runtime, EOS, value_term="model")
    assert numbers["ratio_max_deviation"] < 1e-4 and numbers["kl"] < 1e-3


class Engine:
    """Another engine: it draws at a temperature of its own, or says that its numbers are off by `shift`."""

    def __init__(self, sampler, temperature: float | None = None, shift: float = 0.0):
        self.sampler, self.temperature, self.shift = sampler, temperature, shift

    def __call__(self, queries, uniforms, temperature):
        episodes = self.sampler(queries, uniforms, self.temperature or temperature)
        return [dataclasses.replace(e, logprobs=tuple(x - self.shift for x in e.logprobs)) for e in episodes]


def test_an_engine_at_another_temperature_is_caught_or_warned_of(actors, runtime, capsys):
    changed = dataclasses.replace(actors, sampler=Engine(actors.sampler, temperature=0.9))

    def check(**changes):
        config = config_of(**changes)
        rollout = collect_rollout(make_queries(16), changed, config, runtime, BETA, 0)
        check_step_zero(rollout, changed, config, runtime, EOS, value_term="model")
        return capsys.readouterr().out

    with pytest.raises(UserError, match="ratio_max_deviation is .*, over 0.001: .*temperature.*old_logprobs: sampler"):
        check(old_logprobs="sampler")
    assert check().startswith("warning: the sampler's log-probabilities are ")
    assert check(importance_weight_cap=2.0) == ""


@pytest.mark.parametrize("cap", [None, 2.0])
def test_vllm_with_other_weights_than_the_policys_stops_the_run(actors, runtime, capsys, cap):
    for vllm, shift in ((True, 1.1), (True, 0.9), (False, 1.1)):
        config = config_of(use_vllm=vllm, importance_weight_cap=cap)
        changed = dataclasses.replace(actors, sampler=Engine(actors.sampler, shift=shift))
        rollout = collect_rollout(make_queries(16), changed, config, runtime, BETA, 0)
        if vllm and shift > 1:
            with pytest.raises(UserError, match="vLLM's log-probabilities are 1.1 nats a token from.*use_vllm: false"):
                check_step_zero(rollout, changed, config, runtime, EOS, value_term="model")
        else:
            check_step_zero(rollout, changed, config, runtime, EOS, value_term="model")
            assert ("warning" in capsys.readouterr().out) == (cap is None)


def test_our_engines_are_not_warned_of(rollout, actors, runtime, capsys):
    check_step_zero(rollout, actors, config_of(), runtime, EOS, value_term="model")
    assert capsys.readouterr().out == ""


def test_step_zero_reads_no_more_than_a_microbatch_may_hold(rollout):
    lengths = (rollout.query_lengths + rollout.response_lengths).tolist()
    config = config_of(per_device_train_batch_size=4)
    assert microbatch_rows(rollout, config) == 4
    two = dataclasses.replace(config, microbatch_tokens=lengths[0] + lengths[1])
    assert microbatch_rows(rollout, two) == 2
    assert microbatch_rows(rollout, dataclasses.replace(config, microbatch_tokens=1)) == 1
    assert microbatch_rows(rollout.index(torch.arange(3)), config) == 3


class Half(Runtime):
    """A process whose forward passes are said to run in half precision."""

    half = True


@pytest.mark.parametrize("old_logprobs", ["recompute", "sampler"])
@pytest.mark.parametrize("shift, passes", [(0.04, True), (0.06, False)])
def test_P4_in_half_precision_the_mean_is_bounded(actors, old_logprobs, shift, passes):
    """One token in bfloat16 may be far off (0.36 nats with a model of 135M), so that no bound holds for the largest."""
    config, half = config_of(old_logprobs=old_logprobs), Half(seed=0)
    rollout = collect_rollout(make_queries(16), actors, config, half, BETA, 0)
    drawn = rollout.logprobs.clone()
    drawn[0, 0] -= shift * int(rollout.response_mask[:3].sum())  # all on one token of the first microbatch
    rollout = dataclasses.replace(rollout, logprobs=drawn, ref_logprobs=drawn, sampler_logprobs=drawn)
    if passes:
        check_step_zero(rollout, actors, config, half, EOS, value_term="model")
    else:
        with pytest.raises(UserError, match=r"mean \|log ratio\| is 0.06, over 0.05"):
            check_step_zero(rollout, actors, config, half, EOS, value_term="model")


def test_step_zero_limits():
    """bfloat16 keeps 8 bits: between 16 and 32 its numbers are 1/8 apart."""
    assert step_zero_limits(False, False, 30.0) == dict.fromkeys(CAUSES, 1e-3)
    assert step_zero_limits(True, False, 2.0) == {"ratio_max_deviation": 0.05, "kl": 0.05, "value_minus_score": 0.1}
    assert step_zero_limits(False, True, 2.0) == {"ratio_max_deviation": 1e-3, "kl": 1.0, "value_minus_score": 1.0}
    rounded = step_zero_limits(True, True, 2.0)
    assert rounded["ratio_max_deviation"] == 0.05 and rounded["kl"] == pytest.approx(0.1), (
        "nats a token, not an episode"
    )


@pytest.mark.parametrize(
    "shift, rounded, limit", [(0.04, None, None), (0.06, None, 0.05), (0.06, "int8", None), (0.3, "int8", 0.1)]
)
def test_P3_in_half_precision_the_mean_is_bounded(actors, shift, rounded, limit):
    """Twice as far where the reference was rounded to 8 bits; a third of a nat a token is another model."""
    config, half = config_of(frozen_quantization=rounded), Half(seed=0)
    rollout = collect_rollout(make_queries(16), actors, config, half, BETA, 0)
    rollout = dataclasses.replace(rollout, ref_logprobs=rollout.logprobs - shift)
    if limit is None:
        check_step_zero(rollout, actors, config, half, EOS, value_term="model")
    else:
        message = rf"mean \|log policy - log ref_policy\| is {shift}, over {limit}: .*reference"
        with pytest.raises(UserError, match=message):
            check_step_zero(rollout, actors, config, half, EOS, value_term="model")


@pytest.mark.parametrize("offset, passes", [(0.2, True), (0.6, False)])
def test_P2_a_large_score_may_differ_by_what_half_precision_rounds(actors, offset, passes):
    """Between 16 and 32 its numbers are 1/8 apart, so 0.1 would stop a sound run at one step."""
    half = Half(seed=0)
    rollout = collect_rollout(make_queries(16), actors, config_of(), half, BETA, 0)
    with torch.no_grad():
        actors.value_model.head.bias += 24.0
    scores = rollout.part_scores["scores/model"] + 24.0 + offset
    rollout = dataclasses.replace(rollout, part_scores={"scores/model": scores})
    if passes:
        check_step_zero(rollout, actors, config_of(), half, EOS, value_term="model")
    else:
        with pytest.raises(UserError, match="value_minus_score is 0.6, over 0.3"):
            check_step_zero(rollout, actors, config_of(), half, EOS, value_term="model")


def test_K4_weights_of_an_engine_that_says_other_numbers(actors, runtime):
    changed = dataclasses.replace(actors, sampler=Engine(actors.sampler, shift=math.log(1.5)))
    config = config_of(importance_weight_cap=4.0)
    rollout = collect_rollout(make_queries(16), changed, config, runtime, BETA, 0)
    expected = torch.where(rollout.response_mask, 1.5, 0.0)
    assert torch.allclose(rollout.importance_weights, expected, atol=1e-3)
    capped = collect_rollout(make_queries(16), changed, config_of(importance_weight_cap=1.25), runtime, BETA, 0)
    assert torch.equal(capped.importance_weights, torch.where(rollout.response_mask, 1.25, 0.0))
    plain = collect_rollout(make_queries(16), changed, config_of(), runtime, BETA, 0)
    assert plain.importance_weights is None
    for name in ("logprobs", "rewards", "advantages", "returns", "sampler_logprobs"):
        assert torch.equal(getattr(plain, name), getattr(rollout, name)), "weights change the policy loss alone"
    part = rollout.index(torch.tensor([3, 1]))
    width = int(part.response_lengths.max())
    assert torch.equal(part.importance_weights, rollout.importance_weights[[3, 1], :width])
    assert torch.equal(part.sampler_logprobs, rollout.sampler_logprobs[[3, 1], :width])


def test_K4_weights_of_another_engines_tokens_act_by_band_and_level():
    """Two tokens twice and half as likely to the trainer; one token four times as likely."""
    drawn = torch.tensor([[-math.log(2), math.log(2)], [-math.log(4), 0.0]])
    tensors = {"logprobs": torch.zeros(2, 2), "sampler_logprobs": drawn}
    mask = torch.tensor([[True, True], [True, False]])
    for changes, expected in (
        ({"importance_weight_cap": 3.0}, [[2.0, 0.5], [3.0, 0.0]]),
        ({"importance_weight_band": 3.0}, [[2.0, 0.5], [0.0, 0.0]]),
        ({"importance_weight_cap": 3.0, "importance_weight_level": "sequence"}, [[1.0, 1.0], [3.0, 0.0]]),
        ({"importance_weight_band": 3.0, "importance_weight_level": "sequence"}, [[1.0, 1.0], [0.0, 0.0]]),
    ):
        weights = token_weights(tensors, mask, config_of(**changes))
        assert torch.allclose(weights, torch.tensor(expected), atol=1e-6), changes


def test_a_sampler_without_logprobs_cannot_stand_for_the_training_forward(actors, runtime):
    def sampler(queries, uniforms, temperature):
        return [dataclasses.replace(e, logprobs=None) for e in actors.sampler(queries, uniforms, temperature)]

    changed = dataclasses.replace(actors, sampler=sampler)
    rollout = collect_rollout(make_queries(16), changed, config_of(), runtime, BETA, 0)
    assert rollout.sampler_logprobs is None and rollout.index(torch.tensor([0])).sampler_logprobs is None
    check_step_zero(rollout, changed, config_of(), runtime, EOS, value_term="model")
    with pytest.raises(UserError, match="importance_weight_cap.*this sampler gives no log-probabilities"):
        collect_rollout(make_queries(16), changed, config_of(importance_weight_cap=2.0), runtime, BETA, 0)
    with pytest.raises(UserError, match="old_logprobs: sampler, but this sampler gives none"):
        collect_rollout(make_queries(16), changed, config_of(old_logprobs="sampler"), runtime, BETA, 0)


@pytest.mark.parametrize(
    ("mode", "penalty", "warned"), [("replace", -1.0, True), ("replace", -3.0, False), ("subtract", -1.0, False)]
)
def test_a_penalty_that_pays_for_not_ending_is_warned_of(rollout, capsys, mode, penalty, warned):
    finished = torch.arange(len(rollout)) > 0
    scores = torch.full((len(rollout),), -2.0)
    found = dataclasses.replace(rollout, finished=finished, raw_scores=scores)
    warn_of_rewarded_cuts(found, config_of(missing_eos_mode=mode, missing_eos_penalty=penalty))
    said = capsys.readouterr().out
    assert ("answers that end score -2.00 on average" in said) == warned and bool(said) == warned
