"""One process at a time in a folder: a lock that tells who holds it and that no kill leaves behind.

The kernel frees it with the process, whatever ends that. A record lock, not `flock`: that one would
live on in the loader processes which a killed run leaves for seconds. The file itself tells who has
it, for which the usual lock libraries, which empty theirs at every attempt, have no place.
"""

from __future__ import annotations

import errno
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

from concat_cli.core.errors import UserError
from concat_cli.core.files import write_error

NAME = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_FAR = 1 << 30  # the byte that is locked, where Windows keeps nobody from reading the others


@contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Generator[None]:
    """Holds the lock of a folder, which is made if need be.

    say: told where the file system has no locks, so that nothing keeps a second process out.
    UserError that names the process which holds it.
    """
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        file = os.open(path, flags, 0o666)
    except OSError as error:
        raise write_error(path, error) from error
    try:
        try:
            _take(file)
        except OSError as error:
            os.lseek(file, 0, os.SEEK_SET)
            if error.errno in _HELD:
                raise _refused(folder, os.read(file, 4096)) from None
            say(f"{path} cannot be locked ({error.strerror}): start no second process on {folder}")
        else:
            os.ftruncate(file, 0)
            os.write(file, _who().encode("utf-8", "replace"))
        yield
    finally:
        os.close(file)


def _take(file: int) -> None:
    """OSError of `_HELD` where another process holds it."""
    os.lseek(file, _FAR, os.SEEK_SET)
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _FAR)
    os.lseek(file, 0, os.SEEK_SET)


def _who() -> str:
    command = shlex.join(["concat", *sys.argv[1:]])
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} on {socket.gethostname()} since {since}: {command}\n"


def _refused(folder: Path, who: bytes) -> UserError:
    told = shorten(who.decode("utf-8", "replace"), 200, placeholder=" ...") or "another process"
    return UserError(
        f"{folder} is in use by {told}.",
        "Wait until that one ends, or stop it; or choose another --name.",
    )
