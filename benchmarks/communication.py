"""Bytes that one PPO optimiser step hands to collectives, counted, beside what theory says, data parallel and sharded.

    python -m benchmarks.communication [--processes 2]

Counted on gloo, in processes of this machine; the calls are the same on GPUs. Of B bytes a ring of n processes sends
2 (n - 1) / n x B from each in an all-reduce, and (n - 1) / n x B in an all-gather or a reduce-scatter.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from align.config import ModelTerm, PPOConfig
from align.models import Policy, ScalarModel
from align.optimise import make_optimizer
from align.runtime import Runtime, end_processes, is_main_process
from align.types import Rollout
from align.update import Learner, microbatches, optimiser_step

ROOT = Path(__file__).parents[1]
EPISODES, QUERY, RESPONSE, DOCUMENTS = 16, 5, 7, 8
SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": True, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
COLLECTIVES = {  # by their names in torch
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "broadcast_": "broadcast",
}


class Counting(TorchDispatchMode):
    """Counts the bytes of each collective of float32 numbers; counters and statistics are integers and float64."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        space, _, name = function._schema.name.partition("::")
        if space == "c10d" and name in COLLECTIVES:
            self.bytes[COLLECTIVES[name]] += largest(args[:2])
        elif space == "_c10d_functional" and name == "all_gather_into_tensor":
            self.bytes["all-gather"] += largest(args[:1]) * args[1]
        return function(*args, **(kwargs or {}))


def largest(tensors: Any) -> int:
    """Bytes of the largest float32 tensor, or list of them: the side of a collective that holds everything."""
    sizes = [0]
    for item in tensors:
        parts = [item] if isinstance(item, Tensor) else [x for x in flatten(item) if isinstance(x, Tensor)]
        sizes.append(sum(x.numel() * x.element_size() for x in parts if x.dtype == torch.float32))
    return max(sizes)


def flatten(item: Any) -> list:
    return [x for part in item for x in flatten(part)] if isinstance(item, (list, tuple)) else [item]


def theory(model: nn.Module, microbatches: int, processes: int, sharded: bool) -> Counter[str]:
    """What one optimiser step of a model moves. `model` whole; its parameters are cut along their first dimension.

    Data parallel: every gradient is all-reduced once, in the last microbatch. Sharded: in every microbatch weights are
    gathered in the forward pass and again in the backward pass, and gradients scattered, padded so that all processes
    hold as much of each. What the gradient's norm moves, some numbers of four bytes, is not counted.
    """
    if not sharded:
        return Counter({"all-reduce": sum(4 * p.numel() for p in model.parameters())})
    padded = sum(4 * p.numel() // p.shape[0] * (-(-p.shape[0] // processes) * processes) for p in model.parameters())
    return Counter({"all-gather": 2 * microbatches * padded, "reduce-scatter": microbatches * padded})


def work() -> dict[str, Any]:
    """Two steps in this process, the second counted: {"counted", "theory", "sampling", "policy"} in bytes; and, to
    compare runs by, the policy's weights, its gradient's norm, and the bytes that a GPU holds meanwhile."""
    config = PPOConfig(
        output_dir="unused", model_name_or_path="unused", reward=(ModelTerm("unused"),), pretraining_file="unused",
        per_device_train_batch_size=2, rollout_batch_size=EPISODES, num_mini_batches=1, ptx_coef=1.0,
        total_episodes=EPISODES, ptx_examples_per_episode=DOCUMENTS / EPISODES,
    )  # fmt: skip
    runtime = Runtime(0)
    policy = Policy(LlamaForCausalLM(LlamaConfig(**SHAPE)))
    classifier = LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=1))
    classifier.score = nn.Linear(SHAPE["hidden_size"], 1)
    value_model = ScalarModel(classifier)
    torch.manual_seed(0)
    rollout = made_up_rollout(runtime.device)
    share = len(
        microbatches(
            rollout.index(torch.arange(runtime.rank, EPISODES, runtime.world, device=runtime.device)), config, runtime
        )
    )
    pretraining = DOCUMENTS // runtime.world // config.per_device_train_batch_size
    expected = theory(policy, share + pretraining, runtime.world, runtime.sharded)
    expected += theory(value_model, share, runtime.world, runtime.sharded)
    size = sum(4 * p.numel() for p in policy.parameters())

    policy, policy_optimizer = runtime.prepare(policy, lambda m: make_optimizer(m, 1e-4, config))
    value_model, value_optimizer = runtime.prepare(value_model, lambda m: make_optimizer(m, 1e-4, config))
    learner = Learner(policy, value_model, policy_optimizer, value_optimizer, None)
    documents = [[2 + i, 3, 4, 1] for i in range(DOCUMENTS)]
    optimiser_step(rollout, documents, learner, config, runtime)  # the first step also sets the wrappers up
    with Counting() as counted:
        stats = optimiser_step(rollout, documents, learner, config, runtime)
    held = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    with Counting() as sampling, runtime.for_sampling(policy):
        pass
    with runtime.for_saving(policy) as whole:
        weights = torch.cat([p.flatten() for p in whole.parameters()]).tolist() if is_main_process() else []
    found = {"counted": counted.bytes, "theory": expected, "sampling": sampling.bytes["all-gather"], "policy": size}
    found |= {"weights": weights, "gradient": stats.sums["policy_grad_norm"], "held": held}
    return found | {"main": is_main_process()}


def made_up_rollout(device: torch.device) -> Rollout:
    generator = torch.Generator().manual_seed(0)
    rows, full = (EPISODES, RESPONSE), torch.ones(EPISODES, dtype=torch.long)
    numbers = [torch.randn(rows, generator=generator) for _ in range(6)]
    logprobs, ref_logprobs, values, rewards, advantages, returns = numbers
    made = Rollout(
        input_ids=torch.randint(2, SHAPE["vocab_size"], (EPISODES, QUERY + RESPONSE), generator=generator),
        query_lengths=QUERY * full, response_lengths=RESPONSE * full, finished=full.bool(),
        response_mask=torch.ones(rows, dtype=torch.bool), logprobs=logprobs - 4, ref_logprobs=ref_logprobs - 4,
        values=values, scores=full.float(), raw_scores=full.float(), rewards=rewards, advantages=advantages,
        returns=returns,
    )  # fmt: skip
    given = {name: x.to(device) for name, x in made.tensors().items() if x is not None}
    return Rollout(**given)


def count(processes: int, sharded: bool) -> dict[str, Any]:
    """`work` in so many gloo processes, as the main one reports it."""
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    env |= {"ACCELERATE_USE_FSDP": str(sharded).lower(), "FSDP_VERSION": "2"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *torchrun, "-m", "benchmarks.communication", "--worker"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"counted"')]
    if done.returncode or not lines:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(lines[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        found = work()
        if found.pop("main"):
            print(json.dumps(found), flush=True)
        end_processes()
        return
    print(f"{options.processes} processes, bytes a step       counted       theory")
    for name, sharded in (("data parallel", False), ("sharded", True)):
        found = count(options.processes, sharded)
        for kind in sorted(found["counted"] | found["theory"]):
            print(f"{name:14} {kind:14} {found['counted'].get(kind, 0):12,} {found['theory'].get(kind, 0):12,}")
        print(f"{name:14} {'sampling':14} {found['sampling']:12,} {found['policy'] if sharded else 0:12,}")


if __name__ == "__main__":
    main()
