"""Which epoch of a fine-tuning run is the policy (paper section 3.5: validation reward predicts preference best)."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from align.checkpoint import checkpoint_fault
from align.config import SFTConfig
from align.data import load_demonstrations
from align.errors import UserError
from align.generate import make_sampler, uniform_numbers
from align.lengths import demonstration_lengths, prompt_lengths
from align.models import ScalarModel, context_of, load_packed_policy, load_scalar_model
from align.packing import SCORED_TOKENS
from align.reward_models import load_reward
from align.rewards import Reward
from align.runtime import broadcast, gather_list, is_main_process, my_share
from align.text import Codec
from align.track import announce
from align.types import Prompt, Text

Autocast = Callable[[], AbstractContextManager]
Device = torch.device | str
BATCH_SIZE = 128  # rows of a forward pass


def choose_epoch(
    output: Path, log: list[dict[str, Any]], prompts: list[Text], config: SFTConfig, codec: Codec,
    device: Device = "cpu", autocast: Autocast = nullcontext,
) -> dict[str, Any]:  # fmt: skip
    """{"criterion", "checkpoint", "table"}: highest mean reward with a reward model, which scores an answer to each of
    `prompts`, else lowest validation loss.

    The table has a row an epoch, with both numbers where both are known.
    """
    losses = {row["step"]: row["eval_loss"] for row in log if "eval_loss" in row}
    epochs = {row["step"]: row["epoch"] for row in log if "eval_loss" in row}
    table = [
        {"checkpoint": f"checkpoint-{step}", "epoch": round(epochs[step], 3), "validation_loss": losses[step]}
        for step in sorted(losses)
        if whole(output / f"checkpoint-{step}")
    ]
    if not table:
        raise UserError(f"{output}: no checkpoint to choose from; num_train_epochs must reach the end of an epoch")
    if config.reward_model_path:
        reward = load_scorer(config, codec, device)
        for row in table:
            checkpoint = str(output / row["checkpoint"])
            row["reward"] = mean_reward(checkpoint, reward, prompts, config, codec, device, autocast)
    return pick(table)


def whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is complete; one that is there and torn is warned of."""
    fault = broadcast(checkpoint_fault(checkpoint) if is_main_process() else None)
    if fault and checkpoint.is_dir():
        announce(f"warning: {checkpoint}: {fault}: not chosen from")
    return fault is None


def pick(table: list[dict[str, Any]]) -> dict[str, Any]:
    """The best row: by reward where every row has one, else by validation loss; the earlier one of equals."""
    if all("reward" in row for row in table):
        best, criterion = max(table, key=lambda row: row["reward"]), "highest mean reward"
    else:
        best, criterion = min(table, key=lambda row: row["validation_loss"]), "lowest validation loss"
    return {"criterion": criterion, "checkpoint": best["checkpoint"], "table": table}


def selection_prompts(model: str, config: SFTConfig, codec: Codec) -> list[Text]:
    """The first validation prompts that leave room for an answer in the model's context. Raises UserError where none
    does."""
    context = context_of(model) or sys.maxsize
    rows, _ = load_demonstrations(config.validation_file, config.on_bad_rows)
    longest, room = min(context, config.max_length), context - config.max_new_tokens
    whole, asked = demonstration_lengths(rows, codec), prompt_lengths(rows, codec)
    fit = [row.prompt for row, n, m in zip(rows, whole, asked, strict=True) if n <= longest and m <= room]
    prompts = fit[: config.selection_prompts]
    if not prompts:
        remedy = "lower max_new_tokens, or leave reward_model_path out"
        raise UserError(f"max_new_tokens: no validation prompt leaves room for {config.max_new_tokens}: {remedy}")
    return prompts


def load_scorer(config: SFTConfig, codec: Codec, device: Device = "cpu") -> Reward:
    """The reward model that chooses."""
    dtype = torch.bfloat16 if config.bf16 else torch.float32

    def load_scalar(path: str) -> ScalarModel:
        return load_scalar_model(path, config.attn_implementation, dtype=dtype).to(device).eval()

    how = {"batch_size": BATCH_SIZE, "max_tokens": SCORED_TOKENS, "dtype": dtype, "device": device}
    return load_reward(config.reward_model_path, "reward_model_path", codec, load_scalar, **how)


@torch.no_grad()
def mean_reward(
    checkpoint: str, reward: Reward, prompts: list[Text], config: SFTConfig, codec: Codec, device: Device = "cpu",
    autocast: Autocast = nullcontext,
) -> float:  # fmt: skip
    """Mean score of one sample a prompt; every checkpoint gets the same prompts and random numbers.

    Every process answers its share of the prompts, on its device; all return the same.
    """
    mine = list(my_share(len(prompts)))
    uniforms = uniform_numbers(len(prompts), config.max_new_tokens, config.seed, 0)[mine]
    prompts = [prompts[i] for i in mine]
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    policy = load_packed_policy(checkpoint, config.attn_implementation, dtype).to(device)
    scores: list[float] = []
    if prompts:
        with autocast():
            sampler = make_sampler(policy, codec.eos_id, codec.pad_id, BATCH_SIZE)
            episodes = sampler(codec.prompts(prompts), uniforms, config.temperature)
            scores = reward([Prompt(prompt) for prompt in prompts], episodes)
    scores = gather_list(scores)
    return sum(scores) / len(scores)
