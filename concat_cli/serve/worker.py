"""One thread that runs the model, and the bounded number of requests that may wait for it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, TypeVar

from concat_cli.core.errors import UserError

T = TypeVar("T")


class FullError(UserError):
    """As many requests wait as may. seconds: after which another try is likely to succeed."""

    def __init__(self, waiting: int, seconds: int) -> None:
        self.seconds = seconds
        super().__init__(
            f"{waiting} requests are waiting already.", f"Ask again in {seconds} seconds."
        )


class Worker:
    """Work goes to a thread of its own, in order. `place` is called on the event loop alone.

    most: how many requests there may be at a time, the one that is worked on included.
    """

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0
        self.stopping = Event()
        self._seconds = 0.1  # that a piece of work takes
        self._todo: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, daemon=True)  # a running model cannot be ended
        self._thread.start()

    @contextmanager
    def place(self) -> Generator[None]:
        """One of the places of those who wait, taken before anything of a request is read;
        `FullError` where there is none."""
        if self.taken >= self.most:
            raise FullError(self.most, min(60, max(1, math.ceil(self._seconds * self.taken / 2))))
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """What comes of the work; one that is cancelled in time is not done at all."""
        future: Future[T] = Future()
        self._todo.put((future, work))
        return future

    def stop(self) -> None:
        """Nothing more is begun; who waits can see `stopping`."""
        self.stopping.set()
        self._todo.put(None)

    def ended(self, seconds: float) -> bool:
        """Whether the thread has ended, waiting for it so long."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (one := self._todo.get()) is not None and not self.stopping.is_set():
            future, work = one
            if not future.set_running_or_notify_cancel():
                continue
            start = time.perf_counter()
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            self._seconds += 0.2 * (time.perf_counter() - start - self._seconds)
            del one, future, work  # or the last picture would stay in memory
