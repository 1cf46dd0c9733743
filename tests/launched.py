"""A stage as `python -m stages.NAME` runs it, for tests that start several processes."""

import importlib
import os
import signal
import sys
from dataclasses import replace
from types import SimpleNamespace

import torch

from align.generate import TorchSampler
from align.runtime import state
from align.types import Episode
from stages.__main__ import run


def end_at_once() -> None:
    """Queries with odd numbers, over all processes, are answered with EOS alone."""
    sample = TorchSampler.__call__

    def sampled(self: TorchSampler, *args) -> list[Episode]:
        episodes, here = sample(self, *args), state()
        odd = [(here.process_index + i * here.num_processes) % 2 for i in range(len(episodes))]
        return [
            replace(episode, response=(self.eos_id,), finished=True, logprobs=episode.logprobs[:1]) if cut else episode
            for episode, cut in zip(episodes, odd, strict=True)
        ]

    TorchSampler.__call__ = sampled


if __name__ == "__main__":
    if os.environ.get("ENDS_AT_ONCE"):
        end_at_once()
    status = run(importlib.import_module(f"stages.{sys.argv[1]}").main, sys.argv[2:])
    print(f"a process group is left: {torch.distributed.is_initialized()}\n", end="", flush=True)
    sys.exit(status)


def judge(row: dict, response: str, finished: bool = True) -> SimpleNamespace:
    """Likes finished answers, short ones more."""
    likert = max(1.0, 7.0 - len(response.split())) if finished else 1.0
    return SimpleNamespace(likert=likert, as_dict=lambda: {"likert": likert, "empty": not response.strip()})


def rank_one_raises(prompts: list, completions: list, **_) -> list[float]:
    """A reward that fails in the second process, while the first waits for its scores."""
    if state().process_index == 1:
        raise ValueError("no score today")
    return [0.0] * len(completions)


def rank_one_is_told_to_end(prompts: list, completions: list, **_) -> list[float]:
    """A reward during which the second process alone gets a signal."""
    if state().process_index == 1:
        signal.raise_signal(signal.SIGTERM)
    return [0.0] * len(completions)
