"""LoRA: adapters on frozen weights, which in stage 3 serve a second model with the adapter off (Hu et al. 2021).

The policy's weights are the reference's, the value model's are the reward model's. There a frozen trunk lies in the
type of the forward passes; what is trained is float32.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from align.config import PPOConfig, RMConfig, SFTConfig
from align.errors import UserError, first_line
from align.models import (
    PackedModel,
    Policy,
    ScalarModel,
    load_policy,
    load_scalar_model,
    save_scalar_model,
)

LINEAR = (nn.Linear, Conv1D)  # Conv1D is GPT-2's, with a transposed weight
PEFT_NAMES = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_target_modules": "target_modules"}


def with_lora(model: PreTrainedModel, config: SFTConfig | RMConfig | PPOConfig) -> PeftModel:
    """The model frozen, with an adapter that changes nothing yet on its linear layers, or on those of the names that
    the config gives; a scalar head is trained whole. Raises UserError for a name that no linear layer has."""
    heads = model.get_output_embeddings(), getattr(model, "score", None)
    linears = [name for name, part in model.named_modules() if isinstance(part, LINEAR) and part not in heads]
    known = sorted({name.rsplit(".", 1)[-1] for name in linears})
    for name in config.lora_target_modules:
        if name not in known:
            there = f"no linear layer in the body of {type(model).__name__}; {', '.join(known)} are"
            raise UserError(f"lora_target_modules: {name!r} is {there}")
    scalar = heads[1] is not None
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules=list(config.lora_target_modules) or "all-linear",
        exclude_modules=["score"] if scalar else None,
        modules_to_save=["score"] if scalar else None,
        task_type=TaskType.SEQ_CLS if scalar else TaskType.CAUSAL_LM,
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise UserError(f"lora_target_modules: {first_line(error)}; name other layers") from None


def adapter_config(model: nn.Module) -> LoraConfig | None:
    """Of the adapter on a transformers model or on ours around it; None without one."""
    configs = getattr(model if isinstance(model, PeftModel) else getattr(model, "model", None), "peft_config", None)
    return configs["default"] if configs else None


def require_same_adapter(model: nn.Module, checkpoint: Path) -> None:
    """Raises UserError where the checkpoint's adapter has another rank or scale or lies on other layers than the
    model's: peft would take what fits, and leave the rest as it is."""
    own, path = adapter_config(model), checkpoint / "adapter_config.json"
    if own is None or not path.exists():
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    for key, name in PEFT_NAMES.items():
        was, now = saved[name], getattr(own, name)
        if name == "target_modules":
            was, now = sorted(was), sorted(now)
        if was != now:
            raise UserError(f"resume_from_checkpoint: {checkpoint}: its {key} is {was}, not {now}; set it as it was")


def add_adapter(model: PackedModel, config: PPOConfig) -> None:
    """A float32 adapter on the frozen model. Raises UserError where it would lie on tensors that are no layer's weight
    (experts' in some mixtures), which `PackedModel.merged` cannot add it to."""
    model.model = with_lora(model.model, config)
    if adapter_config(model).target_parameters:
        raise UserError("use_peft: LoRA on the tensors of a mixture's experts cannot be sampled from; set it to false")


class WithoutAdapter(nn.Module):
    """The model under an adapter: the frozen weights alone, without a copy, called without gradients."""

    def __init__(self, adapted: PackedModel):
        super().__init__()
        self.adapted = adapted
        self.held = False

    @property
    def context(self) -> int | None:
        return self.adapted.context

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Any:
        with nullcontext() if self.held else self.adapted.model.disable_adapter():
            return self.adapted(*inputs)

    @contextmanager
    def cached_casts(self) -> Iterator[None]:
        """As `PackedModel.cached_casts`; the adapter stays off from call to call, for peft takes 20 ms to turn it."""
        with self.adapted.model.disable_adapter(), self.adapted.cached_casts():
            self.held = True
            try:
                yield
            finally:
                self.held = False


def save_trained(model: Policy | ScalarModel, folder: Path, pad_id: int) -> None:
    """What a resume needs of a model: the adapter (in peft's format, with a scalar head) or all weights."""
    if model.adapted:
        model.model.save_pretrained(folder, save_embedding_layers=False)
    elif isinstance(model, ScalarModel):
        save_scalar_model(model, folder, pad_id)
    else:
        model.model.save_pretrained(folder)


@torch.no_grad()
def load_trained(model: Policy | ScalarModel, folder: Path) -> None:
    """Put back what `save_trained` wrote."""
    if model.adapted != (folder / "adapter_config.json").exists():
        key = "value_use_peft" if isinstance(model, ScalarModel) else "use_peft"
        raise UserError(
            f"resume_from_checkpoint: {folder}: written with another {key}; set {key} to {not model.adapted}"
        )
    if model.adapted:
        require_same_adapter(model, folder)
        set_peft_model_state_dict(model.model, load_peft_weights(str(folder), device="cpu"))
    elif isinstance(model, ScalarModel):
        model.load_state_dict(load_scalar_model(str(folder)).state_dict())
    else:
        model.model.load_state_dict(load_policy(str(folder)).state_dict())


def save_policy_folder(policy: Policy, folder: Path, pad_id: int) -> None:
    """An ordinary model folder; of LoRA the merged weights, and the adapter in adapter/.

    Weights are merged in float32 into a fresh copy of the base, whatever type the trunk has here.
    """
    if not policy.adapted:
        save_trained(policy, folder, pad_id)
        return
    save_trained(policy, folder / "adapter", pad_id)
    load_policy(str(folder / "adapter")).save_pretrained(folder)


def save_value_folder(
    model: ScalarModel, base: str, fresh_head: bool, config: PPOConfig, folder: Path, pad_id: int
) -> None:
    """A sequence classifier; of LoRA merged like the policy, into `base`, which has a head unless that was fresh."""
    if model.adapted:
        state = get_peft_model_state_dict(model.model, save_embedding_layers=False)
        model = load_scalar_model(base, fresh_head=fresh_head)
        add_adapter(model, config)
        set_peft_model_state_dict(model.model, {name: tensor.cpu() for name, tensor in state.items()})
    save_scalar_model(model, folder, pad_id)
