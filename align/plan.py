"""`align plan --config PPO.yaml --model FOLDER`: what a process of stage 3 will hold in memory.

Models are built without data and read by the code that trains them, so weights, gradients, optimisers, the average and
what a forward pass keeps for its backward are counted, not estimated. Python, libraries, the allocator's slack and the
short-lived tensors of a pass come on top.
"""

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from align.config import PPOConfig
from align.errors import UserError, first_line
from align.lora import add_adapter
from align.models import PackedModel, Policy, ScalarModel
from align.optimise import hidden_matrices
from align.packing import pack_rows
from align.parse import parse
from align.update import BatchAlgebra

GIB = 2**30
FLOAT = 4
REWARD = "of the reward model's shape; default: the config's, where its folder is there, else as the policy"
MOMENTS = {"adafactor": 0, "adamw_8bit": 2, "adamw_torch_8bit": 2}  # bytes a weight; Adam's own: two floats


@dataclass(frozen=True)
class Part:
    """Bytes of one thing, and when they are held: "always", or in one phase of an iteration."""

    name: str
    size: float
    phase: str = "always"


def main(argv: list[str]) -> int:
    about = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="align plan", description=about, allow_abbrev=False)  # `reward` is a key
    parser.add_argument("--model", metavar="FOLDER", help="of the policy's shape, where sft has not run; a hub id too")
    parser.add_argument("--reward_model", metavar="FOLDER", help=REWARD)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--shard", action="store_true", help="FSDP2: every model in parts over the processes")
    args, rest = parser.parse_known_args(argv)
    config = parse(PPOConfig, rest)
    policy = args.model or config.model_name_or_path
    reward = args.reward_model or trained_reward_model(config) or policy
    parts = plan(config, policy, reward, args.processes, args.shard)
    print(f"policy as {policy}, reward and value model as {reward}")
    print(table(parts, BatchAlgebra.of(config, args.processes)))
    if config.use_vllm:
        print(f"vLLM takes {config.vllm_gpu_memory_utilization:.0%} of a GPU, where its parts here need less")
    return 0


def trained_reward_model(config: PPOConfig) -> str | None:
    """The config's first model of that shape, where its folder is there."""
    paths = [config.value_model_path, *(path for key, path in config.inputs() if key.startswith("reward["))]
    return next((path for path in paths if path and (Path(path) / "config.json").is_file()), None)


def plan(config: PPOConfig, policy: str, reward: str, processes: int = 1, shard: bool = False) -> list[Part]:
    """All parts of one process's memory. `reward` has the shape of the reward and the value model alike."""
    half = torch.bfloat16 if config.bf16 else torch.float32
    one = Policy(shape(policy, AutoModelForCausalLM, half if config.use_peft else torch.float32))
    two = ScalarModel(scalar(reward, half if config.value_use_peft else torch.float32))
    parts = trained("policy", one, config.use_peft, config) + trained("value", two, config.value_use_peft, config)
    if config.ema_decay is not None:
        parts.append(Part("average of the policy", FLOAT * learned(one)))
    if not config.use_peft:
        parts.append(Part("reference", only_scores(shape(policy, AutoModelForCausalLM, half), config)))
    if not config.value_use_peft:
        parts.append(Part("reward model", only_scores(scalar(reward, half), config)))
    if shard:  # gradients too are reduced to each process's own part
        parts = [replace(part, size=part.size / processes) for part in parts]
    parts += sampling(one, config, half, shard)
    own = replace(config, per_device_train_batch_size=BatchAlgebra.of(config, processes).microbatch)
    for name, model in (("policy", one), ("value", two)):
        parts += [replace(part, phase=f"update {name}") for part in backward_needs(model, own, shard)]
    return parts


def shape(path: str, auto: type, dtype: torch.dtype, **options: object) -> nn.Module:
    """A model of the class and sizes that `path` says, without data."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"--model: {path}: no config.json ({first_line(error)}); give a model of the shape") from None
    with torch.device("meta"):
        return auto.from_config(config, dtype=dtype, trust_remote_code=False)


def scalar(path: str, dtype: torch.dtype) -> nn.Module:
    """With the head of `align.models.load_scalar_model`."""
    model = shape(path, AutoModelForSequenceClassification, dtype, num_labels=1)
    model.score = nn.Linear(model.score.in_features, 1, device="meta")
    return model


def trained(name: str, model: PackedModel, peft: bool, config: PPOConfig) -> list[Part]:
    """Weights, optimiser and gradients; the adapter goes on the model."""
    if peft:
        add_adapter(model, config)
    if config.gradient_checkpointing:
        model.checkpoint_activations()
    label = {"policy": "policy", "value": "value model"}[name]
    return [
        Part(label, size(model)),
        Part(f"optimiser of the {label}", optimizer_size(model, config.optim)),
        Part(f"gradients of the {label}", FLOAT * learned(model), f"update {name}"),
    ]


def size(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def learned(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def optimizer_size(model: nn.Module, optim: str) -> int:
    if optim == "adafactor":  # a number a row and one a column of each matrix
        shapes = [p.shape for p in model.parameters() if p.requires_grad]
        return FLOAT * sum(sum(math.prod(s) // n for n in s[-2:]) if len(s) > 1 else s.numel() for s in shapes)
    if optim == "muon":  # one moment of hidden matrices, two of the rest
        hidden = sum(p.numel() for p in hidden_matrices(model).values())
        return FLOAT * (hidden + 2 * (learned(model) - hidden))
    return MOMENTS.get(optim, 2 * FLOAT) * learned(model)


def only_scores(model: nn.Module, config: PPOConfig) -> float:
    """A frozen model: with int8 its linear layers, heads aside, take a byte a weight and a float a row."""
    total = size(model)
    if config.frozen_quantization:
        heads = model.get_output_embeddings(), getattr(model, "score", None)
        for layer in (m for m in model.modules() if type(m) is nn.Linear and m not in heads):
            total += layer.weight.numel() * (1 - layer.weight.element_size()) + FLOAT * layer.out_features
    return total


def sampling(model: Policy, config: PPOConfig, half: torch.dtype, shard: bool) -> list[Part]:
    """Keys and values of all rows at their longest, and weights that are gathered, merged, cast or laid out for it.

    vLLM keeps both from rollout to rollout unless it sleeps, and may hold more: all of its share of a GPU.
    """
    text, bytes_each = model.inner.config.get_text_config(), half.itemsize
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    rows = min(config.per_device_rollout_batch_size, config.rollout_batch_size)
    tokens = rows * (config.max_prompt_length + config.max_new_tokens)
    cache = 2 * text.num_hidden_layers * heads * head * bytes_each * tokens
    copy = bytes_each * sum(p.numel() for p in model.inner.parameters())
    phase = "always" if config.use_vllm and not config.vllm_enable_sleep_mode else "sampling"
    parts = [
        Part(f"keys and values of {rows} rows", cache, phase),
        Part("weights as the sampler reads them", copy, phase),
    ]
    if config.use_vllm and (config.use_peft or shard):
        parts.append(Part("weights gathered or merged for vLLM", copy, "sampling"))
    return parts


def rows_of(config: PPOConfig) -> int:
    """Of a microbatch, each at its longest."""
    length = config.max_prompt_length + config.max_new_tokens
    fit = config.microbatch_tokens // length if config.microbatch_tokens else config.per_device_train_batch_size
    return max(1, min(fit, config.per_device_train_batch_size))


def backward_needs(model: PackedModel, config: PPOConfig, shard: bool) -> list[Part]:
    """What a forward pass of the longest microbatch keeps, and the weights that it casts, where they lie whole."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu")
        kept, casts = kept_by(model, config)
        parts = [Part(f"kept for the backward pass: {rows_of(config)} rows", kept)]
        if not shard:
            parts.append(Part("weights cast", casts))
        if config.gradient_checkpointing:
            model.inner.activation_checkpointing_disable()
            again = kept_by(model, config)[0] / model.inner.config.get_text_config().num_hidden_layers
            parts.append(Part("a layer computed again", again))
    return parts


def kept_by(model: PackedModel, config: PPOConfig) -> tuple[int, int]:
    """Bytes of one forward pass, the model's own on tensors without data: what grows with tokens, and cast weights."""
    pack = pack_rows([[0] * (config.max_prompt_length + config.max_new_tokens)] * rows_of(config))
    count = rows_of(config) * config.max_new_tokens
    kept: dict[int, Tensor] = {}

    def hold(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x
        return x

    at, tokens = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.long)
    inputs = (pack, at, tokens, 1.0) if isinstance(model, Policy) else (pack, at)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=config.bf16),
        torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x),
    ):
        model(*inputs)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape[::-1]) for p in model.parameters()}
    found = [x for key, x in kept.items() if key not in weights]
    casts = [x for x in found if tuple(x.shape) in shapes]
    total = [sum(x.untyped_storage().nbytes() for x in some) for some in (found, casts)]
    return total[0] - total[1], total[1]


def table(parts: list[Part], algebra: BatchAlgebra) -> str:
    phases = ("sampling", "update policy", "update value")
    always = sum(part.size for part in parts if part.phase == "always")
    lines = [str(algebra), f"{'GiB a process':>14}"]
    for phase in ("always", *phases):
        own = [part for part in parts if part.phase == phase and part.size]
        lines += [f"{part.size / GIB:14.2f}  {phase}: {part.name}" for part in own]
    peaks = {phase: always + sum(part.size for part in parts if part.phase == phase) for phase in phases}
    lines += [f"{peak / GIB:14.2f}  in all, {phase}" for phase, peak in peaks.items()]
    lines.append("Python and libraries, the allocator's slack and a pass's short-lived tensors come on top.")
    return "\n".join(lines)
