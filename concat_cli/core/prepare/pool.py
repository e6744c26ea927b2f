"""Work spread over processes, in order, with errors that a person can read."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from concat_cli.core.errors import UserError
from concat_cli.core.progress import Progress

Job = TypeVar("Job")
Result = TypeVar("Result")


def processes_for(jobs: int, asked: int | None, progress: Progress) -> int:
    """How many processes `jobs` are worth: those asked for, else one a CPU; 1 where none can start,
    which is said."""
    count = max(1, min(asked or os.cpu_count() or 1, jobs))
    if count > 1 and not _can_spawn():
        progress.say("Working in one process: a program read from a pipe cannot start others.")
        return 1
    if count > 1:
        try:
            multiprocessing.Lock()
        except OSError as error:
            progress.say(f"Working in one process: no shared memory (/dev/shm, {error.strerror}).")
            return 1
    return count


@contextmanager
def mapper(
    work: Callable[[Job], Result],
    processes: int,
    setup: Callable[[], None] | None = None,
    chunk: int = 1,
) -> Generator[Callable[[Sequence[Job]], Iterator[Result]]]:
    """`work` over jobs, results in their order: here, or in so many processes, each of which calls
    `setup` first and gets a chunk of jobs at a time."""
    if processes <= 1:
        yield lambda jobs: map(work, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, begin, (setup,)) as pool:
        try:
            yield lambda jobs: pool.map(work, jobs, chunksize=chunk)
        except BrokenProcessPool as error:
            raise UserError(
                "A process was ended from outside or could not start.",
                'Check the memory; a script must call this under `if __name__ == "__main__":`.',
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def begin(setup: Callable[[], None] | None) -> None:
    """What each process of a pool does first: its end is its parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: the parent ends this one
    _end_with_parent()
    if setup is not None:
        setup()


def _end_with_parent() -> None:
    """Ends this process once the one that started it is gone, also where that was killed: the
    queue of a pool would keep it waiting for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _can_spawn() -> bool:
    """Whether a new process could find this one's main file; a program on stdin has none."""
    main = getattr(sys.modules["__main__"], "__file__", None)
    return main is None or Path(main).is_file()
