"""What a run that stops leaves behind: the batch it stopped at, for a person to look into."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from align.errors import UserError
from align.files import atomic_folder, plain, write_json
from align.manifest import redact, versions
from align.runtime import is_main_process, state, wait_for_everyone


@contextlib.contextmanager
def kept_for_inspection(
    output_dir: str, tensors: Mapping[str, Tensor | None], about: Mapping[str, Any], everywhere: bool = False
) -> Iterator[None]:
    """If the block ends in a UserError, its batch is written first, whole or not at all, and the error says where:
    `output_dir`/stopped-RANK with batch.safetensors (`tensors`, on the CPU) and batch.json (why, `about`, versions).

    The batch holds token ids, no text. `everywhere`: a process writes what it holds itself; else all processes hold
    the same and stop together, and the main one writes.
    """
    try:
        yield
    except UserError as error:
        folder = Path(output_dir) / f"stopped-{state().process_index if everywhere else 0}"
        where = f"its batch is in {folder}"
        if everywhere or is_main_process():
            try:
                write_batch(folder, tensors, {"why": str(error), **about, "versions": versions()})
            except UserError as unwritten:
                where = f"its batch could not be written: {unwritten}"
        if not everywhere:
            wait_for_everyone()  # a launcher kills the rest once one process has ended, and the main one may be writing
        raise UserError(f"{error}; {where}") from error


def write_batch(folder: Path, tensors: Mapping[str, Tensor | None], about: Mapping[str, Any]) -> None:
    with atomic_folder(folder) as new:
        kept = {name: x.detach().cpu().clone().contiguous() for name, x in tensors.items() if x is not None}
        save_file(kept, new / "batch.safetensors")
        write_json(new / "batch.json", redact(plain(about)))


class StopsAtNaN:
    """Mixed into a Trainer: a loss or gradient that is not finite stops the run before the step that would take it.

    The Trainer itself would go on with weights of NaN, and log such losses as the mean of those before them. Under
    float16 infinite gradients are the loss scaler's business, which skips their step.
    """

    def get_batch_samples(self, *args: Any) -> tuple[list, Any]:
        self.step_batches, count = super().get_batch_samples(*args)
        return self.step_batches, count

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        numbers = {"loss": float(self._tr_loss)}  # summed since the last row of the log
        if self.accelerator.scaler is None:
            numbers["grad_norm"] = float(norm)
        wrong = [name for name, number in numbers.items() if not math.isfinite(number)]
        if not wrong:
            return norm
        step, name = self.state.global_step + 1, wrong[-1]
        tensors = {}
        for number, batch in enumerate(self.step_batches):
            tensors |= tensors_of(batch, f"{number}.")
        with kept_for_inspection(self.args.output_dir, tensors, {"step": step}, everywhere=True):
            remedy = "lower learning_rate or check the data; the model is as before this step"
            raise UserError(f"{name} is {numbers[name]} at step {step}; {remedy}")


def tensors_of(batch: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """A Trainer's batch, flat: tensors by name, those of a pack as name.field."""
    found = {}
    for name, value in batch.items():
        parts = {f"{name}.{field}": part for field, part in getattr(value, "__dict__", {}).items()}
        named = {name: value} if isinstance(value, Tensor) else parts
        found |= {prefix + key: part for key, part in named.items() if isinstance(part, Tensor)}
    return found
