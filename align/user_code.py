"""A user's own functions, by import path: reward functions, judges, labelers; and what is said when one fails."""

import importlib
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.errors import UserError, first_line


def import_function(path: str, key: str) -> Callable[..., Any]:
    """`package.module:name` to the object it names. Raises UserError, `key` its config key."""
    module, colon, name = path.partition(":")
    if not (colon and module and name):
        raise UserError(f"{key}: {path!r} is no import path; write package.module:function")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{key}: cannot import {path!r} ({error}); check the path and PYTHONPATH") from None


def raised(error: Exception, path: str) -> str:
    """What a function at `path` raised and, where its module's file is known, the last line there that was reached."""
    source = getattr(sys.modules.get(path.partition(":")[0]), "__file__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == source]
    where = f" ({Path(source).name}:{lines[-1]})" if lines else ""
    return f"raised {type(error).__name__}: {first_line(error)}{where}"


@contextmanager
def blamed(what: str, path: str) -> Iterator[None]:
    """Whatever is raised inside is a UserError that names the user's function: `what`, then what it raised."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} {raised(error, path)}; mend it") from error
