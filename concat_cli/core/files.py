"""Files that are either complete or not there: written beside their place, then renamed into it."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from concat_cli.core.errors import UserError

_HINTS = {
    errno.ENOSPC: "The disk is full: free some space, then run the same command again.",
    errno.EDQUOT: "The disk quota is used up: free some space, then run the same command again.",
    errno.EACCES: "No permission to write there: choose another folder or change its rights.",
    errno.EPERM: "No permission to write there: choose another folder or change its rights.",
    errno.EROFS: "That file system is read-only: choose another folder.",
    errno.ENOTDIR: "A part of that path is a file, not a folder: choose another path.",
    errno.EEXIST: "A part of that path is a file, not a folder: choose another path.",
    errno.EISDIR: "There is a folder of that name: move it away or choose another path.",
    errno.ENAMETOOLONG: "The name is too long for the file system: choose a shorter one.",
}


def write_error(path: Path, error: OSError) -> UserError:
    """What the user reads when the system refuses to write `path`."""
    reason = error.strerror or str(error)
    hint = _HINTS.get(error.errno or 0, "Check the disk and the path, then run it again.")
    return UserError(f"Cannot write {path}: {reason}.", hint)


@contextmanager
def atomic_path(path: Path, sync: bool = True) -> Generator[Path, None, None]:
    """Yields a temporary path in the folder of `path`; renames it to `path` on success.

    The folder is made if need be. On any error the temporary file is removed; `OSError` becomes
    `UserError`.

    Args:
        sync: fsync before the rename, so that even a power cut leaves the old file or the new one.
            Without it (many small files that can be made again) only a killed process is safe.
    """
    path = Path(path)
    temp = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.name[:80]}."
        handle, name = tempfile.mkstemp(suffix=".tmp", prefix=prefix, dir=path.parent)
        os.close(handle)
        temp = Path(name)
        temp.chmod(0o666 & ~_umask())
        yield temp
        if sync:
            _sync(temp)
        os.replace(temp, path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        if temp is not None:
            temp.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes, sync: bool = True) -> None:
    """Writes `data` to `path` atomically; UserError where the system refuses."""
    with atomic_path(path, sync) as temp:
        temp.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8 to `path` atomically; UserError where the system refuses."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Writes `value` as JSON to `path` atomically; UserError where the system refuses."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    """The rights that new files of this process do not get (there is no way to only read it)."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
