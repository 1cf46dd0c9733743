"""As much of vLLM as `align.vllm_engine` calls, over transformers, for machines without it.

`tests/test_vllm.py` runs the same checks on vLLM itself where it is installed.
"""

import random
import sys
from collections import namedtuple
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

BatchUpdate = namedtuple("BatchUpdate", "batch_size removed added moved")


class LogitsProcessor:
    pass


@dataclass
class SamplingParams:
    temperature: float
    max_tokens: int
    stop_token_ids: list[int]
    ignore_eos: bool
    detokenize: bool
    extra_args: dict[str, Any] = field(default_factory=dict)


def process_dict_updates(entries: dict, update: BatchUpdate | None, new_state) -> bool:
    """In vLLM's own order; a place that is filled anew is not among the removed. A move is (from, to, whether it is a
    swap)."""
    if update is None:
        return False
    for place, params, prompt, response in update.added:
        entries[place] = new_state(params, prompt, response)
    for place in update.removed:
        entries.pop(place, None)
    for start, end, swap in update.moved:
        first, second = entries.pop(start), entries.pop(end, None)
        entries[end] = first
        if swap:
            entries[start] = second
    return True


@dataclass
class Request:
    number: int
    prompt: list[int]
    params: SamplingParams
    response: list[int] = field(default_factory=list)
    read: bool = False  # the prompt, wholly

    @property
    def done(self) -> bool:
        ended = self.response and self.response[-1] in self.params.stop_token_ids
        return bool(ended) or len(self.response) == self.params.max_tokens


class LLM:
    """Recomputes every row at every step; queries longer than 4 tokens are read in two parts; rows change places; one
    row in eight steps is put back among the waiting ones, with what it has written."""

    def __init__(self, model: str, logits_processors: list, max_num_seqs: int, hf_overrides: dict, **options):
        torch.manual_seed(options["seed"])
        self.options = options | {"max_num_seqs": max_num_seqs}
        config = AutoConfig.from_pretrained(model)
        config.update(hf_overrides)
        self.model = AutoModelForCausalLM.from_config(config).eval()
        self.processors = [make(None, torch.device("cpu"), False) for make in logits_processors]
        self.events: list[str] = []
        core = SimpleNamespace(shutdown=lambda: self.events.append("shutdown"), _finalizer=SimpleNamespace(atexit=True))
        self.llm_engine = SimpleNamespace(engine_core=core)

    def collective_rpc(self, method: str, kwargs: dict) -> None:
        self.events.append(method)
        self.model.load_state_dict(dict(kwargs["weights_iterator"]))

    def wake_up(self, tags: list[str]) -> None:
        self.events.append(f"wake {tags[0]}")

    def sleep(self, level: int) -> None:
        self.events.append(f"sleep {level}")

    def generate(self, prompts: list[dict], params: list[SamplingParams], use_tqdm: bool) -> list:
        self.events.append("generate")
        requests = [Request(i, p["prompt_token_ids"], q) for i, (p, q) in enumerate(zip(prompts, params, strict=True))]
        waiting, batch, rng = list(requests), [], random.Random(0)
        while waiting or batch:
            update = self.fill(waiting, batch, rng)
            for processor in self.processors:
                processor.update_state(update)
            self.advance(batch)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=request.response)]) for request in requests]

    def fill(self, waiting: list[Request], batch: list[Request], rng: random.Random) -> BatchUpdate:
        """Finished requests leave, new ones come, the last ones move into what is still free, two change places."""
        free = [place for place, request in enumerate(batch) if request.done]
        if batch and waiting and rng.random() < 1 / 8:  # preempted: read again, its response too, in parts
            place = rng.randrange(len(batch))
            if not batch[place].done:
                batch[place].read = False
                waiting.append(batch[place])
                free.append(place)
        added, moved, removed = [], [], []
        while waiting and (free or len(batch) < self.options["max_num_seqs"]):
            place = free.pop(0) if free else len(batch)
            request = waiting.pop(0)
            batch[place : place + 1] = [request]
            added.append((place, request.params, request.prompt, request.response))
        for place in reversed(free):
            removed.append(place)
            last = len(batch) - 1
            if place != last:
                batch[place] = batch[last]
                moved.append((last, place, False))
            batch.pop()
        if len(batch) > 1:
            one, other = rng.sample(range(len(batch)), 2)
            batch[one], batch[other] = batch[other], batch[one]
            moved.append((one, other, True))
        return BatchUpdate(len(batch), removed, added, moved)

    def advance(self, batch: list[Request]) -> None:
        if not batch:
            return
        logits = torch.stack([self.logits(request) for request in batch])
        for processor in self.processors:
            logits = processor.apply(logits)
        assert (logits > float("-inf")).sum(1).eq(1).all(), "more than one token is left to a row"
        assert all(request.params.temperature == 0 for request in batch)
        for request, token in zip(batch, logits.argmax(1).tolist(), strict=True):
            if request.read or len(request.prompt) + len(request.response) <= 4:
                request.response.append(token)
            request.read = True

    def logits(self, request: Request) -> torch.Tensor:
        ids = [*request.prompt, *request.response]
        seen = ids if request.read or len(ids) <= 4 else ids[:2]
        return self.model(torch.tensor([seen])).logits[0, -1].float()


def install(monkeypatch) -> None:
    """`import vllm` gives this."""
    modules = {name: ModuleType(name) for name in NAMES}
    modules["vllm"].LLM, modules["vllm"].SamplingParams = LLM, SamplingParams
    modules["vllm.config"].VllmConfig = object
    for thing in (BatchUpdate, LogitsProcessor, process_dict_updates):
        setattr(modules[NAMES[-1]], thing.__name__, thing)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "align.vllm_engine", raising=False)


NAMES = ("vllm", "vllm.config", "vllm.v1", "vllm.v1.sample", "vllm.v1.sample.logits_processor")
