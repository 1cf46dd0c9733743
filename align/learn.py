"""Everything stage 3 loads, builds and saves around its loop."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from align.checkpoint import load_training_state, mark_complete, rotate, save_training_state
from align.config import PPOConfig
from align.data import load_prompts, load_texts
from align.errors import UserError, first_line
from align.files import atomic_contents, atomic_folder
from align.generate import Sampler, make_sampler
from align.interrupt import deferred
from align.lengths import drop_long
from align.lora import (
    WithoutAdapter,
    add_adapter,
    load_trained,
    save_policy_folder,
    save_trained,
    save_value_folder,
)
from align.manifest import check_parent, weights_sha256, write_manifest
from align.maths.control import adapt_eos_penalty
from align.maths.kl import adapt_kl_coef
from align.maths.schedule import linear_decay, warmup_factor
from align.models import (
    EMA,
    PackedModel,
    Policy,
    ScalarModel,
    disable_dropout,
    load_packed_policy,
    load_scalar_model,
    refuse_adapter,
    require_context,
    row_limit,
)
from align.optimise import make_optimizer, require_whole
from align.order import Cursor
from align.quantise import quantise
from align.reward_models import (
    ValueStart,
    build_reward,
    check_reward_models,
    require_same_tokens,
    say_other_end,
    value_start,
)
from align.rollout import Query, RolloutModels
from align.rows import DataReport
from align.runtime import (
    Runtime,
    gather_list,
    is_main_process,
    load_optimizer_state,
    random_state,
    refuse_sharding,
    set_random_state,
    wait_for_everyone,
    whole_state,
    write,
)
from align.splits import keep_apart, refuse_eval_only
from align.text import Codec
from align.track import announce, save_log_sizes
from align.types import Prompt
from align.update import Learner, PtxSource
from align.validate import say_training_leaks


@dataclass(frozen=True)
class Inputs:
    """What stage 3 reads."""

    codec: Codec
    queries: list[Query]
    held_out: list[Query]  # prompts that no rollout takes; may be empty
    texts: list[str]  # pretraining documents; empty for plain PPO
    ptx_limit: int  # their tokens are cut to so many
    parents: list[dict[str, Any]]
    reports: dict[str, DataReport]
    value_start: ValueStart

    def next_documents(self, cursor: Cursor) -> PtxSource:
        """Tokens of the documents drawn: all of a large corpus as Python's numbers would fill the memory."""

        def draw(count: int) -> list[list[int]]:
            return [ids[: self.ptx_limit] for ids in self.codec.documents([self.texts[i] for i in cursor.take(count)])]

        return draw


@dataclass
class Progress:
    """Where a run stands: all that a checkpoint holds besides models and optimisers."""

    prompts: Cursor
    documents: Cursor
    kl_coef: float  # of the next rollout
    eos_penalty: float | None = None  # of the next rollout
    eos_error: float = 0.0  # share of answers wanted minus that which ended, in the last rollout
    done: int = 0  # finished iterations
    step_zero: dict[str, float | None] = field(default_factory=dict)
    row: dict[str, float] = field(default_factory=dict)  # the log's last
    start_scores: dict[str, Any] = field(default_factory=dict)  # of the held-out prompts, before the first iteration

    @staticmethod
    def at_start(inputs: Inputs, config: PPOConfig) -> "Progress":
        documents = Cursor(max(len(inputs.texts), 1), config.seed + 1)
        prompts = Cursor(len(inputs.queries), config.seed)
        return Progress(prompts, documents, config.kl_coef, config.missing_eos_penalty)

    def advance(self, row: dict[str, float], config: PPOConfig) -> None:
        """An iteration has ended with this row, which gets the penalty where it adapts."""
        if config.finished_target is not None:
            row["missing_eos_penalty"] = self.eos_penalty
            error = config.finished_target - row["objective/finished"]
            self.eos_penalty = adapt_eos_penalty(self.eos_penalty, error, self.eos_error)
            self.eos_error = error
        self.kl_coef = next_kl_coef(self.kl_coef, row["objective/kl"], config, self.done)
        self.done, self.row = self.done + 1, row

    def checkpoint_is_due(self, config: PPOConfig) -> bool:
        return config.save_iterations > 0 and self.done % config.save_iterations == 0

    def in_force(self, config: PPOConfig) -> PPOConfig:
        """The config with what has adapted: the penalty for an answer that does not end."""
        return config if config.finished_target is None else replace(config, missing_eos_penalty=self.eos_penalty)


def load_inputs(config: PPOConfig) -> Inputs:
    """Prompts under the cap as tokens, pretraining documents, and the checked parents."""
    if config.value_head_init == "fitted":
        refuse_sharding("value_head_init: fitted", "kept")
    parents = [check_parent(config.model_name_or_path, "model_name_or_path", ("sft", "ppo"))]
    if config.value_model_path:
        parents.append(check_parent(config.value_model_path, "value_model_path", ("rm",)))
    parents += check_reward_models(config.reward)
    if config.use_peft:
        refuse_adapter(config.model_name_or_path)
    codec = Codec.load(config.model_name_or_path)
    say_other_end(config.model_name_or_path, codec)
    if config.value_model_path:
        require_same_tokens(config.value_model_path, "value_model_path", codec)
    start = value_start(config, codec)
    if start.fresh_head:
        refuse_adapter(start.path, "merge it into its base first, or give a value_model_path")
    announce(str(start))
    for path in (config.model_name_or_path, start.path):
        require_context(path, config.max_prompt_length, config.max_new_tokens)
    queries, held_out, reports = load_queries(config, codec)
    say_training_leaks([parent["path"] for parent in parents], [query.prompt for query in held_out])
    texts, limit = [], config.ptx_max_length
    if config.ptx_coef > 0:
        texts, reports["pretraining_file"] = load_texts(config.pretraining_file, config.on_bad_rows)
        limit = row_limit(config.model_name_or_path, "ptx_max_length", limit)
    return Inputs(codec, queries, held_out, texts, limit, parents, reports, start)


def load_queries(config: PPOConfig, codec: Codec) -> tuple[list[Query], list[Query], dict[str, DataReport]]:
    """Prompts to train on, and held-out ones; a prompt in both files is for neither rollout nor gradient."""

    def encoded(prompts: list[Prompt], report: DataReport) -> tuple[list[Query], DataReport]:
        prompts, report = drop_long(prompts, codec, config.max_prompt_length, report)
        tokens = codec.prompts([prompt.prompt for prompt in prompts])
        return [Query(prompt, tuple(ids)) for prompt, ids in zip(prompts, tokens, strict=True)], report

    prompts, report = load_prompts(config.train_file, config.on_bad_rows)
    refuse_eval_only(prompts, report)
    held_out, reports = [], {}
    if config.validation_file:
        others, other_report = load_prompts(config.validation_file, config.on_bad_rows)
        prompts, report = keep_apart(prompts, report, others, config.on_bad_rows)
        held_out, reports["validation_file"] = encoded(others, other_report)
        if len(held_out) < 2:
            raise UserError(f"validation_file: {len(held_out)} prompt that can be used; an interval needs 2 or more")
    queries, reports["train_file"] = encoded(prompts, report)
    return queries, held_out, reports


def build_learner(config: PPOConfig, start: ValueStart, runtime: Runtime) -> Learner:
    """Policy and value model without dropout, an optimiser each, and the average of the policy's trained weights."""
    require_whole(config.optim)
    if runtime.sharded:
        announce(f"weights, gradients and optimiser states lie in parts over {runtime.world} processes")
    # What is trained is float32; weights frozen under an adapter need only the type of the forward passes.
    policy_dtype, value_dtype = (
        runtime.compute_dtype if peft else torch.float32 for peft in (config.use_peft, config.value_use_peft)
    )
    if config.use_peft and runtime.half and config.old_logprobs == "sampler":
        announce(
            "warning: old_logprobs: sampler, but in half precision the sampler rounds the adapter into the weights, so "
            "that it draws from another policy than the one that learns; set old_logprobs: recompute"
        )

    def trained(model: PackedModel, peft: bool, rate: float) -> tuple[nn.Module, torch.optim.Optimizer]:
        if peft:
            add_adapter(model, config)
        disable_dropout(model)
        if config.gradient_checkpointing:
            model.checkpoint_activations()
        return runtime.prepare(model, lambda prepared: make_optimizer(prepared, rate, config))

    # The policy is placed before the value model is loaded, so that one of them alone lies whole in each process.
    policy = load_packed_policy(config.model_name_or_path, config.attn_implementation, policy_dtype)
    policy, policy_optimizer = trained(policy, config.use_peft, config.learning_rate)
    value_model = load_scalar_model(start.path, config.attn_implementation, start.fresh_head, value_dtype)
    value_model, value_optimizer = trained(value_model, config.value_use_peft, config.value_learning_rate)
    ema = EMA(runtime.unwrap(policy), config.ema_decay) if config.ema_decay is not None else None
    return Learner(policy, value_model, policy_optimizer, value_optimizer, ema)


def build_rollout_models(
    config: PPOConfig, codec: Codec, start: ValueStart, learner: Learner, runtime: Runtime
) -> RolloutModels:
    """The frozen reference and reward beside the trained models, and a sampler over the policy."""
    # What is never trained needs no float32 weights when forward passes run in bfloat16.
    dtype = runtime.compute_dtype
    policy, value_model = runtime.unwrap(learner.policy), runtime.unwrap(learner.value_model)
    loaded: list[PackedModel] = []

    def only_scores(model: PackedModel) -> PackedModel:
        loaded.append(model)
        return frozen(model, config, runtime)

    def load_scalar(path: str) -> ScalarModel | WithoutAdapter:
        if config.value_use_peft and path == start.path:
            return WithoutAdapter(value_model)
        return only_scores(load_scalar_model(path, config.attn_implementation, dtype=dtype))

    if config.use_peft:
        ref_policy = WithoutAdapter(policy)
    else:
        ref_policy = only_scores(load_packed_policy(config.model_name_or_path, config.attn_implementation, dtype))
    reward = build_reward(config, codec, load_scalar, runtime)
    if config.frozen_quantization and not loaded:
        raise UserError("frozen_quantization: with LoRA no model is left that only scores; set it to null")
    sampler = rollout_sampler(runtime.whole(learner.policy), codec, config, runtime)
    return RolloutModels(learner.policy, ref_policy, learner.value_model, reward, sampler, codec.pad_id)


def rollout_sampler(policy: Policy, codec: Codec, config: PPOConfig, runtime: Runtime) -> Sampler:
    """Our own engine, or vLLM, which is imported where it is asked for alone."""
    if not config.use_vllm:
        return make_sampler(policy, codec.eos_id, codec.pad_id, config.per_device_rollout_batch_size)
    try:
        from align.vllm_engine import make_vllm_sampler
    except ImportError as error:
        raise UserError(
            f"use_vllm: {first_line(error)}; vllm wants an environment of its own (docs/running.md), or set it to false"
        ) from None
    return make_vllm_sampler(policy, codec.eos_id, codec.pad_id, config, runtime)


def frozen(model: PackedModel, config: PPOConfig, runtime: Runtime) -> PackedModel:
    disable_dropout(model)
    if config.frozen_quantization:
        quantise(model.inner)
    return runtime.place(model.requires_grad_(False).eval())


def set_learning_rates(learner: Learner, config: PPOConfig, iteration: int, num_iterations: int) -> None:
    """Policy: warm-up over the first iterations, then constant; value: constant (App. C.4). Or both decay linearly. The
    policy's warm-up starts after the iterations in which the value model learns alone."""
    decay = linear_decay(iteration, num_iterations) if config.lr_decay == "linear" else 1.0
    learned = iteration - config.value_warmup_iterations
    warm = warmup_factor(learned, config.warmup_iterations) if learned >= 0 else 0.0
    for optimizer, rate in (
        (learner.policy_optimizer, config.learning_rate * warm * decay),
        (learner.value_optimizer, config.value_learning_rate * decay),
    ):
        for group in optimizer.param_groups:
            group["lr"] = rate


def next_kl_coef(kl_coef: float, kl: float, config: PPOConfig, iteration: int) -> float:
    """After an iteration whose rollout had this KL; while the policy stays as it is, its 0 says nothing."""
    if iteration < config.value_warmup_iterations:
        return kl_coef
    return adapt_kl_coef(kl_coef, kl, config.kl_target, config.rollout_batch_size, config.kl_horizon)


def stop_for_kl(row: dict[str, float], done: int, config: PPOConfig) -> str | None:
    """Why the run ends after `done` iterations, the last with this row, which is said too: KL over the limit, where the
    reward means little. None: it goes on."""
    kl = row.get("objective/kl", 0.0)
    if config.kl_stop is None or kl <= config.kl_stop:
        return None
    reason = f"stopped after iteration {done}: KL {kl:.3g} nats an episode is over kl_stop {config.kl_stop:g}"
    announce(f"{reason}; to go on, resume from checkpoint-{done} with a higher kl_stop")
    return reason


def save_state(
    output: Path, progress: Progress, learner: Learner, config: PPOConfig, codec: Codec, runtime: Runtime
) -> None:
    """checkpoint-N: the policy as a model folder, and all that an exact resume needs. N counts finished iterations.

    Nothing in it depends on the number of processes; all of them call this, the main one writes.
    """
    checkpoint = output / f"checkpoint-{progress.done}"
    state = {
        "iteration": progress.done,
        "kl_coef": progress.kl_coef,
        "eos_penalty": (progress.eos_penalty, progress.eos_error),
        "step_zero": progress.step_zero,
        "row": progress.row,
        "start_scores": progress.start_scores,
        "random": gather_list([random_state()]),
        "prompts": progress.prompts.state(),
        "documents": progress.documents.state(),
        "policy_optimizer": whole_state(learner.policy_optimizer.state_dict()),
        "value_optimizer": whole_state(learner.value_optimizer.state_dict()),
        "ema": whole_state(learner.ema.shadow if learner.ema else {}),
    }
    with runtime.for_saving(learner.policy) as policy, runtime.for_saving(learner.value_model) as value_model:
        if is_main_process():
            with atomic_folder(checkpoint) as folder:
                save_trained(policy, folder, codec.pad_id)
                codec.save(folder)
                save_trained(value_model, folder / "value_model", codec.pad_id)
                save_training_state(folder, state)
                save_log_sizes(output, folder)
                mark_complete(folder)
            rotate(checkpoint, config.save_total_limit)
    wait_for_everyone()  # a process that left before, at a signal, would end the others as they write


def load_state(checkpoint: Path, progress: Progress, learner: Learner, config: PPOConfig, runtime: Runtime) -> None:
    """Put everything back. A KL coefficient that does not adapt is the config's."""
    state = load_training_state(checkpoint)
    for model, folder in ((learner.policy, checkpoint), (learner.value_model, checkpoint / "value_model")):
        with runtime.for_loading(model) as loaded:
            load_trained(loaded, folder)
    load_optimizer_state(learner.policy_optimizer, state["policy_optimizer"])
    load_optimizer_state(learner.value_optimizer, state["value_optimizer"])
    if learner.ema:
        for name, value in state["ema"].items():
            write(value, learner.ema.shadow[name])
    same = len(state["random"]) == runtime.world
    set_random_state(state["random"][runtime.rank if same else 0])
    progress.prompts.load(state["prompts"])
    progress.documents.load(state["documents"])
    progress.done, progress.step_zero, progress.row = state["iteration"], state["step_zero"], state["row"]
    progress.start_scores = state.get("start_scores", {})  # a checkpoint of before has none
    if config.kl_target is not None:
        progress.kl_coef = state["kl_coef"]
    if config.finished_target is not None and "eos_penalty" in state:
        progress.eos_penalty, progress.eos_error = state["eos_penalty"]


def save_policy(
    output: Path, learner: Learner, config: PPOConfig, inputs: Inputs, metrics: dict[str, Any], runtime: Runtime
) -> None:
    """The averaged policy as a HuggingFace folder, the value model beside it, the manifest last."""
    if learner.ema:
        learner.ema.copy_to(runtime.unwrap(learner.policy))
    with runtime.for_saving(learner.policy) as policy, runtime.for_saving(learner.value_model) as value_model:
        if not is_main_process():
            return
        with deferred("the results are written first"), atomic_contents(output) as folder:
            save_policy_folder(policy, folder, inputs.codec.pad_id)
            inputs.codec.save(folder)
            start, value_folder = inputs.value_start, folder / "value_model"
            save_value_folder(value_model, start.path, start.fresh_head, config, value_folder, inputs.codec.pad_id)
            if policy.adapted:
                metrics = metrics | {"adapter_sha256": weights_sha256(folder / "adapter")}
            write_manifest(folder, "ppo", config, config.seed, inputs.parents, inputs.reports, metrics)
