"""vLLM as the engine that samples rollouts (`use_vllm: true`; the package vllm is not one of ours to install).

An engine lives in each process, on its device, beside the models that learn. Before each rollout it takes the policy's
weights; the tokens it draws are those that `align.generate` would, up to what its kernels round otherwise: a logits
processor inverts the CDF at the episode's own uniform numbers and leaves the sampler one token.
"""

import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

from align.config import PPOConfig
from align.errors import UserError, first_line
from align.generate import Engine
from align.maths.logprobs import draw
from align.models import Policy, refuse_adapter
from align.runtime import Runtime, ends, random_state, set_random_state
from align.types import Episode

IN_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine shares this process's memory: weights and uniform numbers
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the older runner, whose logits processors `InvertedCdf` is one of
    "VLLM_NO_USAGE_STATS": "1",  # it would tell its makers what runs here
}
FAILURES = (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError, AssertionError, OSError, ImportError)


@dataclass(frozen=True)
class VllmSampler(Engine):
    """`Engine` says how it is called; all processes call it, for sharded weights are gathered around it."""

    llm: LLM | None = None
    sleeps: bool = False  # between rollouts it holds neither weights nor keys and values

    def sample(self, queries: list[list[int]], uniforms: Tensor, temperature: float) -> list[Episode]:
        uniforms = uniforms.to(self.policy.device)
        drawn = Drawn(uniforms, temperature, torch.zeros_like(uniforms))
        prompts = [{"prompt_token_ids": query} for query in queries]
        with self.awake(), torch.autocast(self.policy.device.type, enabled=False), InvertedCdf.drawing(drawn):
            outputs = self.llm.generate(
                prompts,
                [self.parameters(row, uniforms.shape[1]) for row in range(len(queries))],
                use_tqdm=self.progress is not None,
            )
        responses = [tuple(output.outputs[0].token_ids) for output in outputs]
        logprobs = [row[: len(response)] for row, response in zip(drawn.logprobs.tolist(), responses, strict=True)]
        return [
            Episode(tuple(query), response, response[-1] == self.eos_id, tuple(row))
            for query, response, row in zip(queries, responses, logprobs, strict=True)
        ]

    def parameters(self, row: int, max_new_tokens: int) -> SamplingParams:
        """Of one query: no penalty, no cut, no other end than EOS. vLLM takes the likeliest token, the one left to it:
        to draw it would cost it random numbers, which are the run's."""
        return SamplingParams(
            temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=[self.eos_id], ignore_eos=True,
            detokenize=False, extra_args={"row": row},
        )  # fmt: skip

    def load_weights(self) -> None:
        """The policy's, by way of the types and layouts that the engine has made of a checkpoint's."""
        try:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named_weights(self.policy)})
        except FAILURES as error:
            raise UserError(
                f"use_vllm: vLLM cannot take this policy's weights ({reason(error)}); set it to false"
            ) from None

    @contextmanager
    def awake(self) -> Iterator[None]:
        """With the policy's weights, which are laid in before there are keys and values: less is held at once."""
        if self.sleeps:
            self.llm.wake_up(tags=["weights"])
        self.load_weights()
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])
        try:
            yield
        finally:
            if self.sleeps:
                self.llm.sleep(level=2)


def named_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """By their names in the model, tied ones by each of theirs, with the buffers that a model's files hold too. LoRA is
    in them (`PackedModel.merged`)."""
    for name, weight in policy.inner.state_dict().items():
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), weight


def reason(error: Exception) -> str:
    """What is wrong, in a line: vLLM checks its settings by pydantic, whose first line says only how many are."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if line.startswith("Value error, ")), first_line(error))
    return textwrap.shorten(told.removeprefix("Value error, ").split(" [type=")[0], 240)


@dataclass(frozen=True)
class Drawn:
    """What a rollout draws with, and the log-probabilities of what it drew."""

    uniforms: Tensor  # (N, R)
    temperature: float
    logprobs: Tensor  # (N, R)


class InvertedCdf(LogitsProcessor):
    """vLLM's batch of logits -> the same with one token left a row."""

    current: ClassVar[Drawn | None] = None  # of the rollout being sampled; None: vLLM tries its memory out

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        self.rows: dict[int, tuple[int, list[int]]] = {}  # place in the batch: query, its response so far (vLLM's own)

    @classmethod
    @contextmanager
    def drawing(cls, drawn: Drawn) -> Iterator[None]:
        cls.current = drawn
        try:
            yield
        finally:
            cls.current = None

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.rows, batch_update, lambda params, _, out: (params.extra_args["row"], out))

    def apply(self, logits: Tensor) -> Tensor:
        """(S, V) -> (S, V). Of a query that is read in parts every part draws; the last one's token is the one kept."""
        if self.current is None or not self.rows:
            return logits
        at = [(row, len(response)) for row, response in (self.rows[place] for place in range(len(logits)))]
        rows, counts = torch.tensor(at, device=logits.device).T  # (S,), (S,)
        tokens, logprobs = draw(logits, self.current.uniforms[rows, counts], self.current.temperature)
        self.current.logprobs[rows, counts] = logprobs
        return torch.full_like(logits, float("-inf")).scatter_(1, tokens[:, None], 0.0)


def start_vllm(config: PPOConfig, runtime: Runtime) -> LLM:
    """An engine of this process, without weights yet. The run's random numbers, of the CPU, stay where they are."""
    if config.vllm_enable_sleep_mode and runtime.device.type == "cpu":
        raise UserError("vllm_enable_sleep_mode: vLLM does not sleep on a CPU; set it to false")
    refuse_adapter(config.model_name_or_path, "merge it into its base first, or set use_vllm: false")
    os.environ.update(IN_PROCESS)
    before, threads = random_state(), torch.get_num_threads()
    try:
        llm = LLM(
            model=config.model_name_or_path,
            load_format="dummy",
            skip_tokenizer_init=True,
            generation_config="vllm",  # not the checkpoint's habits
            # A CPU lays the head out anew when it is loaded itself: one that is the embedding would stay as it was.
            hf_overrides={"tie_word_embeddings": False} if runtime.device.type == "cpu" else {},
            dtype=str(runtime.compute_dtype).removeprefix("torch."),
            seed=config.seed,
            max_model_len=config.max_prompt_length + config.max_new_tokens,
            max_num_seqs=config.per_device_rollout_batch_size,
            gpu_memory_utilization=config.vllm_gpu_memory_utilization,
            enable_sleep_mode=config.vllm_enable_sleep_mode,
            enable_prefix_caching=False,  # what is kept of a prompt would outlive the weights that made it
            async_scheduling=False,  # `InvertedCdf` counts the tokens drawn so far
            logits_processors=[InvertedCdf],
            distributed_executor_backend="external_launcher" if runtime.world > 1 else None,
            disable_log_stats=True,
        )
    except FAILURES as error:
        remedy = "set it to false, or lower vllm_gpu_memory_utilization where memory is what is short"
        raise UserError(f"use_vllm: vLLM did not start ({reason(error)}; 0.32 was tried); {remedy}") from None
    finally:
        set_random_state(before)
        if torch.get_num_threads() != threads:  # on a GPU vLLM leaves one
            torch.set_num_threads(threads)
    core = llm.llm_engine.engine_core
    core._finalizer.atexit = False  # in a process that fails it would take the group down while others wait in it
    ends.append(core.shutdown)
    if config.vllm_enable_sleep_mode:
        llm.sleep(level=2)
    return llm


def make_vllm_sampler(policy: Policy, eos_id: int, pad_id: int, config: PPOConfig, runtime: Runtime) -> VllmSampler:
    llm = start_vllm(config, runtime)
    size = config.per_device_rollout_batch_size
    return VllmSampler(policy, eos_id, pad_id, size, llm=llm, sleeps=config.vllm_enable_sleep_mode)
