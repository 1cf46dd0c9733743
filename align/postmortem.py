"""What a run that stops leaves behind: the batch it stopped at, for a person to look into."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from align.checkpoint import atomic_folder, plain, redact, versions, write_json
from align.errors import UserError
from align.runtime import Runtime


@contextlib.contextmanager
def kept_for_inspection(
    output_dir: str, tensors: Mapping[str, Tensor | None], about: Mapping[str, Any], runtime: Runtime,
    everywhere: bool = False,
) -> Iterator[None]:  # fmt: skip
    """If the block ends in a UserError, its batch is written first, whole or not at all, and the error says where:
    `output_dir`/stopped-RANK with batch.safetensors (`tensors`, on the CPU) and batch.json (why, `about`, versions).

    The batch holds token ids, no text. `everywhere`: the error is this process's own, so it writes its own batch;
    else all processes stop with the same, and the main one writes.
    """
    try:
        yield
    except UserError as error:
        folder = Path(output_dir) / f"stopped-{runtime.rank if everywhere else 0}"
        where = f"its batch is in {folder}"
        if everywhere or runtime.is_main:
            try:
                write_batch(folder, tensors, {"why": str(error), **about, "versions": versions()})
            except UserError as unwritten:
                where = f"its batch could not be written: {unwritten}"
        if not everywhere:
            runtime.barrier()  # a launcher kills the rest once one process has ended, and the main one may be writing
        raise UserError(f"{error}; {where}") from error


def write_batch(folder: Path, tensors: Mapping[str, Tensor | None], about: Mapping[str, Any]) -> None:
    with atomic_folder(folder) as new:
        kept = {name: x.detach().cpu().clone().contiguous() for name, x in tensors.items() if x is not None}
        save_file(kept, new / "batch.safetensors")
        write_json(new / "batch.json", redact(plain(about)))
