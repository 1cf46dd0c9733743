"""Policies and scalar models: loading, heads, dropout, forward passes over responses, weight averages.

A policy is any causal language model. A reward or value model is a `ScalarModel`: the same backbone with a linear head
`score`, one number a token. On disk it is an ordinary sequence classifier (num_labels 1). transformers builds that
class without a bias, so the bias that normalises the reward (paper section 3.5) lies in the weights as `score.bias`,
which `load_scalar_model` and `AutoModelForTokenClassification` read.
"""

import json
import math
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, TaskType
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from align.checkpoint import copy_weights
from align.errors import UserError
from align.maths.logprobs import entropy, token_logprobs
from align.maths.masks import gather_actions, response_tokens


def load_policy(
    path: str, attn_implementation: str | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A causal LM from a folder or hub id; a LoRA adapter is merged into its base."""
    auto = AutoPeftModelForCausalLM if (Path(path) / "adapter_config.json").exists() else AutoModelForCausalLM
    model = _load(auto, path, attn_implementation, dtype)
    return model.merge_and_unload() if auto is AutoPeftModelForCausalLM else model


def save_chosen(checkpoint: Path, folder: Path) -> None:
    """A checkpoint's policy as a model folder; of a LoRA run the merged model, and the adapter in adapter/."""
    if not (checkpoint / "adapter_config.json").exists():
        copy_weights(checkpoint, folder)
        return
    load_policy(str(checkpoint)).save_pretrained(folder)
    (folder / "adapter").mkdir()
    copy_weights(checkpoint, folder / "adapter")


def require_context(path: str, prompt_tokens: int, response_tokens: int) -> None:
    """Prompt and response must fit the model's context together (paper App. C: 1k + 1k of 2k)."""
    context = getattr(AutoConfig.from_pretrained(path), "max_position_embeddings", None)
    if context is not None and prompt_tokens + response_tokens > context:
        raise UserError(
            f"max_prompt_length {prompt_tokens} + max_new_tokens {response_tokens}: over the {context} tokens that "
            f"{path} can read; lower one"
        )


class ScalarModel(nn.Module):
    """A backbone and its head `score`: one scalar a token."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    @property
    def inner(self) -> PreTrainedModel:
        """The sequence classifier, with or without LoRA around it."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    @property
    def head(self) -> nn.Linear:
        score = self.inner.score
        return score.modules_to_save["default"] if hasattr(score, "modules_to_save") else score

    def forward(self, input_ids: Tensor) -> Tensor:
        """Scalars in float32. (B, T) -> (B, T). Right padding needs no mask: nothing looks ahead."""
        hidden = self.inner.base_model(input_ids, use_cache=False).last_hidden_state
        return self.inner.score(hidden).squeeze(-1).float()


def load_scalar_model(
    path: str, attn_implementation: str | None = None, fresh_head: bool = False, dtype: torch.dtype = torch.float32
) -> ScalarModel:
    """A reward or value model. `fresh_head`: from a language model, std 1 / sqrt(d + 1), bias 0 (S App. B.1)."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the fresh head and score.bias are expected, not news
    try:
        model = _load(AutoModelForSequenceClassification, path, attn_implementation, dtype, num_labels=1)
    finally:
        transformers_logging.set_verbosity(level)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(f"{path}: {type(model).__name__} has no linear head `score`; use another architecture")
    weight = model.score.weight
    model.score = nn.Linear(weight.shape[1], 1, dtype=dtype)
    with torch.no_grad():
        if fresh_head:
            model.score.weight.normal_(std=1.0 / math.sqrt(weight.shape[1] + 1))
            model.score.bias.zero_()
        else:
            stored = _stored_head(path)
            model.score.weight.copy_(weight if stored is None else stored["score.weight"])
            model.score.bias.copy_(torch.zeros(1) if stored is None else stored.get("score.bias", torch.zeros(1)))
    return ScalarModel(model)


def save_scalar_model(scalar: ScalarModel, folder: str | Path, pad_id: int) -> None:
    """Write a sequence classifier that other tools load; LoRA weights are merged first, the bias goes with them."""
    model = scalar.model.merge_and_unload() if hasattr(scalar.model, "peft_config") else scalar.model
    model.config.pad_token_id = pad_id
    model.save_pretrained(folder)


HEAD = ("score.weight", "score.bias")


def _stored_head(path: str) -> dict[str, Tensor] | None:
    """The head's tensors of a local checkpoint; None for a hub id, whose head transformers has loaded."""
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        return None
    head = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            head |= {key: tensors.get_tensor(key) for key in tensors.keys() if key in HEAD}  # noqa: SIM118
    if "score.weight" not in head:
        raise UserError(f"{path}: has no head `score`, so it is no reward model; give the folder `make rm` writes")
    return head


def _load(auto: type, path: str, attn_implementation: str | None, dtype: torch.dtype, **kwargs) -> PreTrainedModel:
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        return auto.from_pretrained(path, dtype=dtype, use_safetensors=True, **options, **kwargs)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: no model could be loaded ({first}); give a checkpoint folder or hub id") from None


def lora_config(r: int, alpha: int, scalar: bool = False) -> LoraConfig:
    """LoRA on every linear layer; the head of a scalar model is trained whole."""
    if scalar:
        return LoraConfig(
            r=r, lora_alpha=alpha, target_modules="all-linear", exclude_modules=["score"], modules_to_save=["score"],
            task_type=TaskType.SEQ_CLS,
        )  # fmt: skip
    return LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)


def disable_dropout(model: nn.Module) -> None:
    """No dropout in reward modelling and PPO: the ratio of the first minibatch must be 1."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


RESIDUAL_WRITERS = ("o_proj", "down_proj", "c_proj", "dense_4h_to_h", "fc2", "out_proj", "dense")


def add_residual_dropout(model: nn.Module, p: float) -> int:
    """Dropout on what each block adds to the residual stream (App. C.1), in training mode only. Returns the count."""
    names = [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in RESIDUAL_WRITERS]
    if not names:
        raise UserError("residual_dropout: no layer of this model is known to write the residual stream; set it to 0")

    def drop(module: nn.Module, _, output: Tensor) -> Tensor:
        return nn.functional.dropout(output, p=p, training=module.training)

    for name in names:
        model.get_submodule(name).register_forward_hook(drop)
    return len(names)


def response_logprobs(
    policy: nn.Module, input_ids: Tensor, query_lengths: Tensor, width: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of each response token. (B, T), (B,) -> (B, R), (B, R), float32.

    Only the states that predict response tokens reach the softmax. Columns past a row's end hold junk: mask them.
    """
    logits = policy(input_ids=input_ids, use_cache=False).logits  # (B, T, V)
    positions = torch.arange(width, device=logits.device)[None, :] + query_lengths[:, None] - 1  # (B, R)
    positions = positions.clamp(max=logits.shape[1] - 1)
    logits = logits.gather(1, positions[:, :, None].expand(-1, -1, logits.shape[-1]))  # (B, R, V)
    tokens = response_tokens(input_ids, query_lengths, width)  # (B, R)
    with torch.no_grad():
        entropies = entropy(logits.detach(), temperature)
    return token_logprobs(logits, tokens, temperature), entropies


def response_values(value_model: nn.Module, input_ids: Tensor, query_lengths: Tensor, width: int) -> Tensor:
    """Value of the state before each response token. (B, T), (B,) -> (B, R)"""
    return gather_actions(value_model(input_ids), query_lengths, width)


class EMA:
    """Exponential moving average of the trained weights (App. C.4: 0.992), one update an optimiser step."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """shadow <- decay * shadow + (1 - decay) * weights"""
        parameters = dict(model.named_parameters())
        torch._foreach_lerp_(list(self.shadow.values()), [parameters[n] for n in self.shadow], 1.0 - self.decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        for name, value in self.shadow.items():
            parameters[name].copy_(value)
