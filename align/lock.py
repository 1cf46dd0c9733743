"""One live run a folder: a lock that the kernel holds for its process, and gives free when that dies."""

import contextlib
import errno
import fcntl
import os
import socket
import sys
from pathlib import Path

from align.errors import UserError

LOCK = "run.lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # of a file system without them
_held: dict[Path, int] = {}  # the folders of this process and their locks' descriptors


def take_lock(folder: Path) -> None:
    """Lock `folder` until `release_lock` or the process's end, however it comes. The file names process and machine.

    Raises UserError when another process has it. A network file system may see this machine's processes alone, and
    one without locks is said so and not locked.
    """
    path = folder / LOCK
    while folder.resolve() not in _held:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "starting"
            os.close(descriptor)
            remedy = "wait for it, stop it, or choose another folder"
            raise UserError(f"output_dir: {folder}: another run writes here ({holder}): {remedy}") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"warning: {folder}: its file system has no locks; start no second run in it", file=sys.stderr)
        if not _same_file(descriptor, path):  # another run ended and took it away between the two calls
            os.close(descriptor)
            continue
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        _held[folder.resolve()] = descriptor


def _same_file(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def release_lock(folder: Path) -> None:
    """Release the folder's lock. Does nothing when this process does not hold it."""
    descriptor = _held.pop(folder.resolve(), None)
    if descriptor is not None:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(descriptor)
