"""Files that are either complete or not there: written beside their place, then renamed into it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
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
    temp = path.parent / f".{path.name[:80]}.{secrets.token_hex(4)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temp.touch(exist_ok=False)
        yield temp
        if sync:
            with temp.open("r+b") as file:
                os.fsync(file.fileno())
        os.replace(temp, path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with suppress(OSError):  # it is renamed, or never was
            temp.unlink()


def write_bytes(path: Path, data: bytes, sync: bool = True) -> None:
    """Writes `data` to `path` atomically; UserError where the system refuses."""
    with atomic_path(path, sync) as temp:
        temp.write_bytes(data)


def copy(source: Path, path: Path) -> None:
    """Copies a file atomically; UserError where the system refuses."""
    with atomic_path(path, sync=False) as temp:
        shutil.copyfile(source, temp)


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8 to `path` atomically; UserError where the system refuses."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Writes `value` as JSON to `path` atomically; UserError where the system refuses."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()
