"""SIGTERM and SIGINT: a stage that trains saves a checkpoint at its next step and ends; any other ends at once.

Exit status 143 for SIGTERM, 130 for SIGINT, as a shell has it (128 + the signal's number).
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from align.runtime import most

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME = 1.0  # seconds: Ctrl-C reaches a launcher's processes twice, from the terminal and from the launcher


class Interrupted(KeyboardInterrupt):
    """The run was told to end. `checkpoint` holds it, if any does."""

    def __init__(self, number: int, checkpoint: Path | None = None):
        super().__init__(number)
        self.number, self.checkpoint = number, checkpoint

    @property
    def status(self) -> int:
        return 128 + self.number

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        if self.checkpoint is None:
            return f"stopped by {name}; where the stage saves checkpoints, resume with --resume_from_checkpoint latest"
        return f"stopped by {name}; {self.checkpoint} holds the run: resume with --resume_from_checkpoint latest"


class _State:
    deferred = False  # until the next step
    first = ""
    arrived = 0  # the signal's number, once it came
    when = 0.0


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Around a stage, in the main thread: both signals raise `Interrupted`, at once but within `deferred`."""
    before = {number: signal.signal(number, _handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _State.deferred, _State.arrived = False, 0


def _handle(number: int, frame: object) -> None:
    if not _State.deferred or (_State.arrived and time.monotonic() > _State.when + SAME):
        raise Interrupted(number)
    if _State.arrived:
        return
    _State.arrived, _State.when = number, time.monotonic()
    name = signal.Signals(number).name  # os.write: a handler may have interrupted a print
    os.write(2, f"\n{name}: {_State.first}; a second one ends at once\n".encode())


@contextlib.contextmanager
def deferred(first: str = "ending after this step, its checkpoint saved") -> Iterator[None]:
    """Around the steps: the first signal only shows in `arrived`, which each step asks. One that comes after the last
    step has asked is forgotten, and so is one around the writing of the results: a run that comes so far ends with
    them. `first` is what is done before the end."""
    _State.deferred, _State.first = True, first
    try:
        yield
    finally:
        _State.deferred, _State.arrived = False, 0


def arrived() -> int:
    """The number of the signal that came in any process, 0 for none; the same in all. They ask together, each step."""
    return most(_State.arrived)
