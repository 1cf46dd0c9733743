"""Policies and scalar models: loading, heads, dropout, forward passes over responses, weight averages.

A policy is any causal language model. A reward or value model is a `ScalarModel`: the same backbone with a linear head
`score`, one number a token. On disk it is an ordinary sequence classifier (num_labels 1). transformers builds that
class without a bias, so the bias that normalises the reward (paper section 3.5) lies in the weights as `score.bias`,
which `load_scalar_model` and `AutoModelForTokenClassification` read.
"""

import inspect
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging

from align.attention import Layout, layout_inputs
from align.checkpoint import copy_weights
from align.errors import UserError, first_line
from align.files import hub_file
from align.maths.logprobs import entropy, linear_logprobs, token_logprobs
from align.maths.masks import action_positions, length_mask, response_tokens
from align.packing import Pack, pack_rows, packed_states, padded_states, rows_of, set_packed
from align.prepack import prepack
from align.track import announce


def load_policy(
    path: str, attn_implementation: str | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A causal LM from a folder or hub id; a LoRA adapter is merged into its base."""
    auto = AutoPeftModelForCausalLM if (Path(path) / "adapter_config.json").exists() else AutoModelForCausalLM
    model = _load(auto, path, attn_implementation, dtype)
    return model.merge_and_unload().requires_grad_(True) if auto is AutoPeftModelForCausalLM else model


def save_chosen(checkpoint: Path, folder: Path) -> None:
    """A checkpoint's policy as a model folder; of a LoRA run the merged model, and the adapter in adapter/."""
    if not (checkpoint / "adapter_config.json").exists():
        copy_weights(checkpoint, folder)
        return
    load_policy(str(checkpoint)).save_pretrained(folder)
    (folder / "adapter").mkdir()
    copy_weights(checkpoint, folder / "adapter")


def refuse_adapter(path: str, remedy: str = "merge it into its base first, or set use_peft: false") -> None:
    """Refuses to train a second adapter on an adapter: saved, it would name the first one's base, and the first would
    be lost."""
    if (Path(path) / "adapter_config.json").exists():
        raise UserError(f"model_name_or_path: {path} is an adapter; {remedy}")


def context_of(path: str) -> int | None:
    """How many tokens a model can read; None where its config does not say. An adapter reads what its base does."""
    adapter = Path(path) / "adapter_config.json"
    if adapter.exists() and not (Path(path) / "config.json").exists():
        path = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path") or path
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no model could be loaded ({first_line(error)}); give a folder or hub id") from None
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def row_limit(path: str, key: str, max_length: int) -> int:
    """`max_length`, or what the model can read where that is less; said once, as longer rows are dropped or cut."""
    context = context_of(path)
    if context is None or context >= max_length:
        return max_length
    announce(f"{key}: {max_length}, but {path} reads {context} tokens: that is the limit")
    return context


def require_context(path: str, prompt_tokens: int, response_tokens: int) -> None:
    """Prompt and response must fit the model's context together (paper App. C: 1k + 1k of 2k)."""
    context = context_of(path)
    if context is not None and prompt_tokens + response_tokens > context:
        raise UserError(
            f"max_prompt_length {prompt_tokens} + max_new_tokens {response_tokens}: over the {context} tokens that "
            f"{path} can read; lower one"
        )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout meanwhile."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


Cast = Callable[[Tensor], Tensor]


class PackedModel(nn.Module):
    """A transformers model that reads packs (`align.packing`), on weights cast once a call under autocast."""

    sharded = False  # over processes, by `align.runtime`; weights are then cast as they are gathered

    def __init__(self, model: PreTrainedModel, packed: bool = True):
        """`packed` False: rows are padded, and attention stays what the model was loaded with."""
        super().__init__()
        self.model = model
        self.packed = packed and set_packed(model)
        self.train(model.training)
        self.casts: dict[int, Tensor] | None = None  # held casts, by the id of their parameter

    @property
    def adapted(self) -> bool:
        """Whether LoRA lies on the model (`align.lora`)."""
        return hasattr(self.model, "peft_config")

    @property
    def inner(self) -> PreTrainedModel:
        """The transformers model, with or without LoRA around it."""
        return self.model.get_base_model() if self.adapted else self.model

    @property
    def context(self) -> int | None:
        """How many tokens it can read, where its config says."""
        return getattr(self.inner.config.get_text_config(), "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def states(self, pack: Pack, cast: Cast) -> Tensor:
        """Last hidden states, with every weight as `cast` gives it. (N, d)"""
        read = packed_states if self.packed else padded_states
        hidden = read(self.recast(self.inner.base_model, cast), pack)
        return hidden if cast is identity else hidden.to(torch.get_autocast_dtype(hidden.device.type))

    def recast(self, module: nn.Module, cast: Cast) -> Callable:
        """`module`, called with cast weights; under plain autocast where activations are checkpointed, because a layer
        then runs again in the backward pass, when the casts are gone."""
        checkpointed = cast is not identity and self.inner.is_activation_checkpointing
        return Autocast(module) if checkpointed else Recast(module, cast)

    @contextmanager
    def cast_weights(self) -> Iterator[Cast]:
        """Gives the function that casts a weight to autocast's type, each once, and turns autocast off meanwhile.

        Cast whole, a model computes in that type from the embedding to the head; autocast alone keeps the residual
        stream and the norms in float32, which on a CPU costs a quarter of the time. Weights that are trained,
        and gradients, stay float32. Without autocast weights are taken as they are.
        """
        device = next(self.parameters()).device.type
        if not torch.is_autocast_enabled(device):
            yield identity
            return
        if self.sharded:
            with torch.autocast(device, enabled=False):
                yield identity
            return
        casts, dtype = {} if self.casts is None else self.casts, torch.get_autocast_dtype(device)

        def cast(weight: Tensor) -> Tensor:
            if id(weight) not in casts:
                casts[id(weight)] = weight.to(dtype)
            return casts[id(weight)]

        with torch.autocast(device, enabled=False):
            yield cast

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Meanwhile LoRA lies in the weights, so that a sampler computes no adapter; nothing happens without LoRA.

        The frozen weights are laid aside and put back, not computed back: no rounding gathers in them.
        """
        layers = [module for module in self.modules() if isinstance(module, LoraLayer)]
        weights = [layer.get_base_layer().weight for layer in layers]
        frozen = [weight.data for weight in weights]
        try:
            for layer, weight in zip(layers, weights, strict=True):
                weight.data = (weight.data + layer.get_delta_weight("default").detach()).to(weight.dtype)
            with self.model.disable_adapter() if layers else nullcontext():
                yield
        finally:
            for weight, kept in zip(weights, frozen, strict=True):
                weight.data = kept

    def checkpoint_activations(self) -> None:
        """Keep each layer's input alone and compute the layer again in the backward pass.

        Layers do so in training mode only, so the model is put into it: take dropout out first.
        """
        try:
            self.inner.activation_checkpointing_enable()
        except ValueError as error:
            raise UserError(f"gradient_checkpointing: {error}; set it to false") from None
        self.train()

    @contextmanager
    def cached_casts(self) -> Iterator[None]:
        """Without gradients, and while no weight changes: casts are kept from one call to the next."""
        self.casts = {}
        try:
            with torch.no_grad():
                yield
        finally:
            self.casts = None


def identity(weight: Tensor) -> Tensor:
    return weight


@dataclass(frozen=True)
class Recast:
    """A module called with other weights in its parameters' places."""

    module: nn.Module
    cast: Cast

    def __call__(self, **inputs: Any) -> Any:
        if self.cast is identity:
            return self.module(**inputs)
        weights = {name: self.cast(p) for name, p in self.module.named_parameters(remove_duplicate=False)}
        return torch.func.functional_call(self.module, weights, kwargs=inputs)


@dataclass(frozen=True)
class Autocast:
    """A module called under autocast in its type."""

    module: nn.Module

    def __call__(self, **inputs: Any) -> Any:
        device = inputs["input_ids"].device.type
        with torch.autocast(device, torch.get_autocast_dtype(device)):
            return self.module(**inputs)


class Policy(PackedModel):
    """A causal language model as PPO reads it: log-probabilities of chosen tokens, never all logits at once."""

    def __init__(self, model: PreTrainedModel, packed: bool = True):
        super().__init__(model, packed)
        self.plain_head = has_plain_head(self.inner)

    def forward(
        self, pack: Pack, at: Tensor, tokens: Tensor, temperature: float, with_entropies: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability of `tokens` after the states `at`, and the entropy there where that is asked for.
        (M,), (M,) -> 2 x (M,), float32"""
        with self.cast_weights() as cast:
            if not self.plain_head:
                logits = self.own_logits(pack, at, cast)
                entropies = entropy(logits.detach(), temperature) if with_entropies else None
                return token_logprobs(logits, tokens, temperature), entropies
            hidden = self.states(pack, cast)[at]  # (M, d)
            head = self.inner.get_output_embeddings()
            bias = None if head.bias is None else cast(head.bias)
            return linear_logprobs(hidden, cast(head.weight), bias, tokens, temperature, with_entropies=with_entropies)

    def own_logits(self, pack: Pack, at: Tensor, cast: Cast) -> Tensor:
        """Logits as the model itself makes them, for heads that do more than multiply. (M,) -> (M, V)"""
        model = self.recast(self.inner, cast)
        if self.packed:
            return kept_logits(model, type(self.inner), layout_inputs(pack.input_ids, pack.position_ids, pack), at)
        ids, places = rows_of(pack)  # (B, T)
        logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)  # (B x T, V)
        real = (places.flatten() >= 0).nonzero().squeeze(1)
        return logits[torch.zeros_like(pack.input_ids).index_copy(0, places.flatten()[real], real)[at]]

    @contextmanager
    def decoding(self) -> Iterator["Decoder"]:
        """For a sampler: weights cast and laid out once for many short calls. Without gradients, and while no weight
        changes; the model itself is not to be called meanwhile."""
        model, head = (
            (self.inner.base_model, self.inner.get_output_embeddings()) if self.plain_head else (self.inner, None)
        )
        linears = {f"{name}.weight" for name, module in model.named_modules() if type(module) is nn.Linear}
        with torch.no_grad(), self.cast_weights() as cast:
            weights = {name: cast(p) for name, p in model.named_parameters(remove_duplicate=False)}
            weights |= {name: prepack(weights[name]) for name in linears}
            last = () if head is None else (prepack(cast(head.weight)), None if head.bias is None else cast(head.bias))
            with _reparametrize_module(model, weights):  # what functional_call does at each call
                yield Decoder(model, *last)


@dataclass(frozen=True)
class Decoder:
    """A policy as a sampler calls it."""

    model: nn.Module
    head: Tensor | None = None  # (V, d); None: the model makes its logits itself
    bias: Tensor | None = None  # (V,)

    def __call__(self, input_ids: Tensor, position_ids: Tensor, layout: Layout, at: Tensor) -> Tensor:
        """Logits behind the states `at` of N tokens. (N,), (N,), (S,) -> (S, V)"""
        inputs = layout_inputs(input_ids, position_ids, layout)
        if self.head is None:
            return kept_logits(self.model, type(self.model), inputs, at)
        out = self.model(**inputs)
        return nn.functional.linear(out.last_hidden_state[0][at], self.head, self.bias)


def kept_logits(model: Callable, cls: type, inputs: dict, at: Tensor) -> Tensor:
    """A model's own logits at some positions, and no others where its class can make so few. (M,) -> (M, V)"""
    if "logits_to_keep" in inspect.signature(cls.forward).parameters:
        return model(**inputs, logits_to_keep=at).logits[0]
    return model(**inputs).logits[0][at]


HEAD_SCALES = ("final_logit_softcapping", "logits_scaling", "logit_scale")


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """The logits are the last hidden states times the head's weights, nothing before, between or after."""
    scaled = any(getattr(model.config, name, None) not in (None, 1) for name in HEAD_SCALES)
    if scaled or model.base_model is model:
        return False
    if model.device.type == "meta":
        return True
    ids = torch.arange(4, device=model.device)[None] % model.get_input_embeddings().weight.shape[0]
    with eval_mode(model):
        hidden, head = model.base_model(ids, use_cache=False).last_hidden_state, model.get_output_embeddings()
        logits = model(ids, use_cache=False).logits
    product = nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias)
    return torch.allclose(product.float(), logits.float(), rtol=1e-4, atol=1e-5)


class ScalarModel(PackedModel):
    """A backbone and its head `score`: one scalar a token."""

    @property
    def head(self) -> nn.Linear:
        """With LoRA the trained copy, and the frozen one while the adapter is off."""
        score = self.inner.score
        if not hasattr(score, "modules_to_save"):
            return score
        return score.original_module if score.disable_adapters else score.modules_to_save["default"]

    def forward(self, pack: Pack, at: Tensor) -> Tensor:
        """Scalars at the positions `at`, in float32. (M,) -> (M,)"""
        with self.cast_weights() as cast:
            hidden = self.states(pack, cast)[at]
            # The head too: bfloat16 knows a score of 20 to 1/8 only, and ties what lies closer.
            scalars = nn.functional.linear(hidden.float(), self.head.weight.float(), self.head.bias.float()).squeeze(-1)
            return scalars.clone()  # fully_shard wants no view


def load_packed_policy(path: str, attn_implementation: str | None = None, dtype: torch.dtype = torch.float32) -> Policy:
    """A policy that reads packs; padded rows instead where `attn_implementation` names another attention."""
    return Policy(load_policy(path, attn_implementation, dtype), packed=attn_implementation is None)


def load_scalar_model(
    path: str, attn_implementation: str | None = None, fresh_head: bool = False, dtype: torch.dtype = torch.float32
) -> ScalarModel:
    """A reward or value model. `fresh_head`: from a language model, std 1 / sqrt(d + 1), bias 0 (S App. B.1).

    `dtype` is the backbone's; the head is float32, for a value model may train it on a frozen backbone (`align.lora`).
    """
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the fresh head and score.bias are expected, not news
    try:
        model = _load(AutoModelForSequenceClassification, path, attn_implementation, dtype, num_labels=1)
    finally:
        transformers_logging.set_verbosity(level)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(f"{path}: {type(model).__name__} has no linear head `score`; use another architecture")
    weight = model.score.weight
    model.score = nn.Linear(weight.shape[1], 1)
    with torch.no_grad():
        if fresh_head:
            model.score.weight.normal_(std=1.0 / math.sqrt(weight.shape[1] + 1))
            model.score.bias.zero_()
        else:
            stored = _stored_head(path)
            model.score.weight.copy_(weight if stored is None else stored["score.weight"])
            model.score.bias.copy_(torch.zeros(1) if stored is None else stored.get("score.bias", torch.zeros(1)))
    return ScalarModel(model, packed=attn_implementation is None)


def save_scalar_model(scalar: ScalarModel, folder: str | Path, pad_id: int) -> None:
    """Write a sequence classifier that other tools load; LoRA weights are merged first, the bias goes with them."""
    model = scalar.model.merge_and_unload() if hasattr(scalar.model, "peft_config") else scalar.model
    model.config.pad_token_id = pad_id
    model.save_pretrained(folder)


HEAD = ("score.weight", "score.bias")


def _stored_head(path: str) -> dict[str, Tensor] | None:
    """The head's tensors of a checkpoint, a folder's or those that transformers has fetched from the hub; None where
    there are none to be seen, and only the weight that transformers has loaded is known."""
    files = sorted(Path(path).glob("*.safetensors")) or fetched_weights(path)
    if not files:
        return None
    head = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            head |= {key: tensors.get_tensor(key) for key in tensors.keys() if key in HEAD}  # noqa: SIM118
    if "score.weight" not in head:
        raise UserError(f"{path}: has no head `score`, so it is no reward model; give the folder `make rm` writes")
    return head


def fetched_weights(hub_id: str) -> list[Path]:
    """The safetensors in the hub's cache of a model that has been loaded."""
    index = hub_file(hub_id, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        names = [SAFE_WEIGHTS_NAME]
    else:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return [path for path in (hub_file(hub_id, name) for name in names) if path is not None]


def _load(auto: type, path: str, attn_implementation: str | None, dtype: torch.dtype, **kwargs) -> PreTrainedModel:
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    options |= {"use_safetensors": True, "trust_remote_code": False}
    try:
        return auto.from_pretrained(path, dtype=dtype, **options, **kwargs)
    except ImportError as error:
        raise UserError(f"attn_implementation: {attn_implementation}: {first_line(error)}") from None
    except (OSError, ValueError, json.JSONDecodeError) as error:
        what = f"no model could be loaded ({first_line(error)})"
        if auto is AutoModelForSequenceClassification and "Unrecognized configuration class" in what:
            what = f"transformers has no sequence classifier of this kind ({model_type(path)})"
            raise UserError(f"{path}: {what}; start the reward or value model from another architecture") from None
        raise UserError(f"{path}: {what}; give a checkpoint folder or hub id") from None


def model_type(path: str) -> str:
    return AutoConfig.from_pretrained(path, trust_remote_code=False).model_type


def disable_dropout(model: nn.Module) -> None:
    """No dropout in reward modelling and PPO: the ratio of the first minibatch must be 1."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):  # OPT and others keep the number and call the function
            if isinstance(value, float) and any(word in name for word in ("dropout", "pdrop", "jitter")):
                setattr(module, name, 0.0)


RESIDUAL_WRITERS = ("o_proj", "down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "out_proj", "dense", "w2")


def add_residual_dropout(model: nn.Module, p: float) -> int:
    """Dropout on what each block adds to the residual stream (App. C.1), in training mode only. Returns the count."""
    names = [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in RESIDUAL_WRITERS]
    if any(name.rsplit(".", 1)[-1] == "experts" for name, _ in model.named_modules()):
        raise UserError("residual_dropout: experts write the residual stream in ways that are not known; set it to 0")
    if not names:
        raise UserError("residual_dropout: no layer of this model is known to write the residual stream; set it to 0")

    def drop(module: nn.Module, _, output: Tensor) -> Tensor:
        return nn.functional.dropout(output, p=p, training=module.training)

    for name in names:
        model.get_submodule(name).register_forward_hook(drop)
    return len(names)


def response_logprobs(
    policy: nn.Module, input_ids: Tensor, query_lengths: Tensor, response_lengths: Tensor, temperature: float,
    with_entropies: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Log-probability of each response token and, if asked for, the entropy before it, 0 past a row's end.
    (B, T), (B,), (B,) -> 2 x (B, R)

    In float32. Padding is not computed, and only the states that predict response tokens reach the softmax.
    """
    pack, mask, at = pack_responses(input_ids, query_lengths, response_lengths)
    tokens = response_tokens(input_ids, query_lengths, mask.shape[1])[mask]
    logprobs, entropies = policy(pack, at, tokens, temperature, with_entropies)
    empty = torch.zeros(mask.shape, device=mask.device)
    return empty.masked_scatter(mask, logprobs), empty.masked_scatter(mask, entropies) if with_entropies else None


def response_values(
    value_model: nn.Module, input_ids: Tensor, query_lengths: Tensor, response_lengths: Tensor
) -> Tensor:
    """Value of the state before each response token, 0 past a row's end. (B, T), (B,), (B,) -> (B, R)"""
    pack, mask, at = pack_responses(input_ids, query_lengths, response_lengths)
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, value_model(pack, at))


def document_nll(policy: nn.Module, documents: list[list[int]], device: torch.device) -> Tensor:
    """Negative log-likelihood of every token but each document's first, summed: the first is the query. (,)"""
    pack = pack_rows(documents).to(device)
    at = torch.cat([torch.arange(row.start, row.start + row.length - 1) for row in pack.rows]).to(device)
    return -policy(pack, at, pack.input_ids[at + 1], 1.0)[0].sum()


def pack_responses(input_ids: Tensor, query_lengths: Tensor, response_lengths: Tensor) -> tuple[Pack, Tensor, Tensor]:
    """The rows as a pack, the mask of response tokens (B, R), and where in the pack the states before them lie (M,)."""
    ends = (query_lengths + response_lengths).tolist()
    pack = pack_rows([row[:end] for row, end in zip(input_ids.tolist(), ends, strict=True)]).to(input_ids.device)
    mask = length_mask(response_lengths, int(response_lengths.max()))
    at = pack.starts[:, None] + action_positions(query_lengths, mask.shape[1])  # (B, R)
    return pack, mask, at[mask]


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

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """In the block the model holds the average, and this the model's weights: no third copy of all of them."""
        self.swap(model)
        try:
            yield
        finally:
            self.swap(model)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        for name, value in self.shadow.items():
            weights = parameters[name].clone()
            parameters[name].copy_(value)
            value.copy_(weights)
