"""align/learn.py: what stage 3 reads, and what a checkpoint brings back."""

import dataclasses
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from align.config import FunctionTerm, ModelTerm, PPOConfig
from align.errors import UserError
from align.learn import Progress, build_learner, load_inputs, load_state, save_state
from align.models import load_scalar_model, save_scalar_model
from align.order import Cursor
from align.reward_models import value_start
from align.runtime import Runtime
from tests.folders import lines


@pytest.fixture(scope="module")
def runtime():
    os.environ["ACCELERATE_USE_CPU"] = "true"
    return Runtime(seed=0)


def save_llama(folder: Path, codec, context: int) -> None:
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(codec.tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=context, pad_token_id=codec.pad_id,
            eos_token_id=codec.eos_id, bos_token_id=None,
        )
    ).save_pretrained(folder)  # fmt: skip


@pytest.fixture
def config(tiny_codec, tmp_path) -> PPOConfig:
    """A policy that reads 128 tokens, a reward model that reads 16, prompts and texts."""
    save_llama(tmp_path / "policy", tiny_codec, 128)
    tiny_codec.save(tmp_path / "policy")
    save_llama(tmp_path / "body", tiny_codec, 16)
    scalar = load_scalar_model(str(tmp_path / "body"), fresh_head=True)
    save_scalar_model(scalar, tmp_path / "reward", tiny_codec.pad_id)
    tiny_codec.save(tmp_path / "reward")
    return PPOConfig(
        output_dir=str(tmp_path / "out"), model_name_or_path=str(tmp_path / "policy"),
        reward=(ModelTerm(str(tmp_path / "reward")),), max_prompt_length=10, max_new_tokens=6, ptx_max_length=2048,
        train_file=lines(tmp_path / "prompts.jsonl", {"prompt": "hot"}, {"prompt": "a cow"}),
        pretraining_file=lines(tmp_path / "texts.jsonl", {"text": "a cow and a dog " * 40}),
    )  # fmt: skip


def test_documents_are_cut_to_what_the_policy_can_read(config, capsys):
    inputs = load_inputs(config)
    assert inputs.ptx_limit == 128 and "ptx_max_length: 2048, but " in capsys.readouterr().out
    (document,) = inputs.next_documents(Cursor(1, 0))(1)
    assert document == inputs.codec.documents(inputs.texts)[0][:128] and len(document) == 128
    assert load_inputs(dataclasses.replace(config, ptx_max_length=9)).ptx_limit == 9


def test_prompt_and_response_fit_the_value_models_context_too(config):
    load_inputs(config)
    with pytest.raises(UserError, match="max_prompt_length 11 .* max_new_tokens 6: over the 16 tokens that .*/reward"):
        load_inputs(dataclasses.replace(config, max_prompt_length=11))
    own = dataclasses.replace(config, max_prompt_length=11, reward=(FunctionTerm("math:sqrt"),))
    assert load_inputs(own).value_start.path == config.model_name_or_path


def test_an_adapter_is_no_place_for_a_value_model_to_start(config, tmp_path):
    """transformers would lay it in unmerged, under a head that is trained whole."""
    own = dataclasses.replace(config, reward=(FunctionTerm("math:fsum"),))
    adapter = tmp_path / "adapter"
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(own.model_name_or_path), LoraConfig(r=2))
    policy.save_pretrained(adapter)
    AutoTokenizer.from_pretrained(own.model_name_or_path).save_pretrained(adapter)
    with pytest.raises(UserError, match="adapter is an adapter; merge it into its base first, or give a value_model"):
        load_inputs(dataclasses.replace(own, model_name_or_path=str(adapter)))


def test_what_a_reward_function_draws_goes_on_from_a_checkpoint(config, runtime, tiny_codec, tmp_path):
    learner = build_learner(config, value_start(config, tiny_codec), runtime)
    progress = Progress(Cursor(2, 0), Cursor(1, 0), kl_coef=0.1, done=3)
    save_state(tmp_path, progress, learner, config, tiny_codec, runtime)

    def draws() -> tuple[list[float], float, float]:
        return torch.rand(3).tolist(), random.random(), np.random.rand()

    expected = draws()
    assert draws() != expected
    load_state(tmp_path / "checkpoint-3", progress, learner, config, runtime)
    assert draws() == expected
