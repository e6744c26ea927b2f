"""Files that are either complete or not there: written beside their place, then renamed into it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import zlib
from collections.abc import Callable, Generator
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
    errno.EMFILE: "Too many files are open: raise the limit (ulimit -n), or set data.workers=0.",
    errno.ENAMETOOLONG: "The name is too long for the file system: choose a shorter one.",
}

# Temporary names tell who writes them, so that what a killed process left is known as such.
_MACHINE = f"{zlib.crc32(socket.gethostname().encode()):08x}"
_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.tmp")


def below_or_here(
    root: Path, name: str, exists: Callable[[str], bool] = os.path.isfile
) -> str | None:
    """Where something lies that is read: below the root, else as seen from the folder that the user
    is in; None where it is in neither. Of impossible names `os.path.isfile` is False."""
    return next((place for place in (str(root / name), name) if place and exists(place)), None)


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
        sync: fsync before the rename, so that even a power cut leaves the old file or the new one,
            and remove what killed processes left in the folder. Without it (many small files that
            can be made again) only a killed process is safe.
    """
    path = Path(path)
    temp = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if sync:
            remove_leftovers(path.parent, deep=False)
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


def temporary_name(path: Path) -> Path:
    """A hidden name beside a path that nobody can foresee and that tells which process chose it."""
    owner = f"{_MACHINE}-{os.getpid()}-{secrets.token_hex(4)}"
    return path.parent / f".{path.name[:80]}.{owner}.tmp"


@contextmanager
def workspace(folder: Path, name: str) -> Generator[Path]:
    """A hidden folder of a temporary name inside of a folder; removed at the end."""
    temp = temporary_name(folder / name)
    temp.mkdir(parents=True)
    try:
        yield temp
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def remove_leftovers(folder: Path, alone: bool = False, deep: bool = True) -> None:
    """Removes what killed processes left below a folder: files and folders of temporary names.

    Args:
        deep: also in the folders in it.
        alone: nobody else writes here, so that those of other machines can go as well, and those
            whose process number has been given to another process.
    """
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            found = _TEMPORARY.fullmatch(name)
            if found is None or not (alone or (found[1] == _MACHINE and not _alive(int(found[2])))):
                continue
            path = Path(parent, name)
            if name in folders:
                folders.remove(name)
                shutil.rmtree(path, ignore_errors=True)  # which follows no link
            with suppress(OSError):  # a folder, or somebody else was faster
                path.unlink()
        if not deep:
            break


def _alive(pid: int) -> bool:
    """Whether a process of this machine still runs; True where that cannot be told."""
    if os.name == "posix":
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except (PermissionError, OverflowError):
            pass
    return True


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


def read_json(path: Path, hint: str) -> Any:
    """What a JSON file holds; UserError where it cannot be read, with what to do about it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # nested deeper than Python goes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} cannot be read: {reason:.160}.", hint) from error


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()
