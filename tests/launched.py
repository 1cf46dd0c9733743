"""A stage as `python -m stages.NAME` runs it, for tests that start several processes."""

import importlib
import sys

import torch

from stages.__main__ import run

if __name__ == "__main__":
    status = run(importlib.import_module(f"stages.{sys.argv[1]}").main, sys.argv[2:])
    print(f"a process group is left: {torch.distributed.is_initialized()}\n", end="", flush=True)
    sys.exit(status)


def rank_one_raises(prompts: list, completions: list, **_) -> list[float]:
    """A reward that fails in the second process, while the first waits for its scores."""
    from align.runtime import state

    if state().process_index == 1:
        raise ValueError("no score today")
    return [0.0] * len(completions)
