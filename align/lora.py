"""LoRA in stage 3: adapters on frozen weights, which serve a second model with the adapter off (Hu et al. 2021).

The policy's weights are the reference's, the value model's are the reward model's. A frozen trunk lies in the type of
the forward passes; what is trained is float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn

from align.config import PPOConfig
from align.errors import UserError
from align.models import (
    PackedModel,
    Policy,
    ScalarModel,
    load_policy,
    load_scalar_model,
    save_scalar_model,
    with_lora,
)


def add_adapter(model: PackedModel, config: PPOConfig) -> None:
    """Freeze the model and put a float32 adapter on it that changes nothing yet; a scalar head is trained whole."""
    model.model = with_lora(model.model, config)


def adapter_state(model: PackedModel) -> dict[str, Tensor]:
    """The adapter's weights, and a scalar head, by peft's names."""
    return get_peft_model_state_dict(model.model, save_embedding_layers=False)


class WithoutAdapter(nn.Module):
    """The model under an adapter: the frozen weights alone, without a copy, called without gradients."""

    def __init__(self, adapted: PackedModel):
        super().__init__()
        self.adapted = adapted
        self.held = False

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Any:
        with nullcontext() if self.held else self.adapted.model.disable_adapter():
            return self.adapted(*inputs)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """As `PackedModel.hold`; the adapter is off from one call to the next, for peft takes 20 ms to turn it."""
        with self.adapted.model.disable_adapter(), self.adapted.hold():
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
        saved, own = load_peft_weights(str(folder), device="cpu"), adapter_state(model)
        if {name: x.shape for name, x in saved.items()} != {name: x.shape for name, x in own.items()}:
            was = "was written with another lora_r or lora_target_modules"
            raise UserError(f"resume_from_checkpoint: {folder}: {was}; set them as they were")
        set_peft_model_state_dict(model.model, saved)
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
        state = adapter_state(model)
        model = load_scalar_model(base, fresh_head=fresh_head)
        add_adapter(model, config)
        set_peft_model_state_dict(model.model, {name: tensor.cpu() for name, tensor in state.items()})
    save_scalar_model(model, folder, pad_id)
