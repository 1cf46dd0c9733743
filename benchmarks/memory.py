"""What each memory key of stage 3 saves, on a Llama of 20 million weights made on the fly; prints a Markdown table.

python -m benchmarks.memory [MODEL REWARD_MODEL KEY=VALUE ...]

With arguments: one setting, as one JSON line, in the process whose memory is measured. One rollout and one update of
16 episodes of 96 + 64 tokens, all in one microbatch, in bfloat16. Bytes of weights, gradients and optimiser are counted
tensor by tensor; the peak is the process's resident memory over what it held before loading, and includes what the
engines and the allocator take.
"""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from align.config import ModelTerm, PPOConfig
from align.learn import build_learner, build_rollout_models
from align.models import load_scalar_model, save_scalar_model
from align.reward_models import value_start
from align.rollout import Query, collect_rollout
from align.runtime import Runtime
from align.types import Prompt
from align.update import update

PAD, EOS, VOCABULARY = 0, 1, 8192
EPISODES, QUERY, RESPONSE = 16, 96, 64
LORA = ("use_peft=true", "value_use_peft=true")
SETTINGS = (
    (),
    ("gradient_checkpointing=true",),
    ("optim=adafactor",),
    ("optim=muon",),
    ("frozen_quantization=int8",),
    ("ema_decay=null",),
    ("use_peft=true",),
    LORA,
    (*LORA, "gradient_checkpointing=true"),
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = make_models(Path(folder))
        print("| keys | weights | gradients | optimiser | average | peak |\n|---|---|---|---|---|---|")
        for settings in SETTINGS:
            command = [sys.executable, "-m", "benchmarks.memory", *paths, *settings]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            numbers = json.loads(done.stdout.strip().splitlines()[-1])
            keys = ", ".join(f"`{setting.replace('=', ': ')}`" for setting in settings) or "none"
            print(f"| {keys} | " + " | ".join(f"{value / 1e6:.1f}" for value in numbers.values()) + " |", flush=True)


def make_models(folder: Path, hidden: int = 384, layers: int = 10) -> tuple[str, str]:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "policy")
    save_scalar_model(load_scalar_model(str(folder / "policy"), fresh_head=True), folder / "reward", PAD)
    return str(folder / "policy"), str(folder / "reward")


def measure(policy: str, reward: str, *settings: str) -> dict[str, int]:
    """Bytes of weights (all four models), of the larger model's gradients, of optimisers, average, and the peak."""
    changes = {key: yaml.safe_load(value) for key, value in (setting.split("=", 1) for setting in settings)}
    values = {
        "model_name_or_path": policy, "reward": (ModelTerm(reward),), "output_dir": "none", "ptx_coef": 0.0,
        "bf16": True,
        "total_episodes": EPISODES, "rollout_batch_size": EPISODES, "num_mini_batches": 1, "max_new_tokens": RESPONSE,
        "per_device_train_batch_size": EPISODES, "per_device_rollout_batch_size": EPISODES,
    }  # fmt: skip
    config = PPOConfig(**(values | changes))
    runtime = Runtime(config.seed, config.bf16)
    before = psutil.Process().memory_info().rss
    codec = SimpleNamespace(eos_id=EOS, pad_id=PAD)
    learner = build_learner(config, value_start(config, codec), runtime)
    models = build_rollout_models(config, codec, value_start(config, codec), learner, runtime)
    gradients = []
    for model, optimizer in (
        (learner.policy, learner.policy_optimizer),
        (learner.value_model, learner.value_optimizer),
    ):
        count_gradients(model, optimizer, gradients)
    tokens = torch.randint(2, VOCABULARY, (EPISODES, QUERY), generator=torch.Generator().manual_seed(0)).tolist()
    rollout = collect_rollout([Query(Prompt(""), tuple(ids)) for ids in tokens], models, config, runtime, 0.1, 0)
    update(rollout, learner, lambda count: [], config, runtime, 0)
    models = learner.policy, models.ref_policy, learner.value_model, models.reward.terms[0].members[0].model
    return {
        "weights": size([t for model in models for t in (*model.parameters(), *model.buffers())]),
        "gradients": max(gradients),
        "optimiser": size(tensors([learner.policy_optimizer.state_dict(), learner.value_optimizer.state_dict()])),
        "average": size(list(learner.ema.shadow.values())) if learner.ema else 0,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
    }


def count_gradients(model: torch.nn.Module, optimizer: torch.optim.Optimizer, into: list[int]) -> None:
    step = optimizer.step

    def counted(*args, **options):
        into.append(size([p.grad for p in model.parameters() if p.grad is not None]))
        return step(*args, **options)

    optimizer.step = counted


def tensors(tree: object) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [found for child in children for found in tensors(child)]


def size(found: list[torch.Tensor]) -> int:
    """Bytes, each memory once."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in found}.values())


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        torch.set_num_threads(1)
        print(json.dumps(measure(*sys.argv[1:])))
