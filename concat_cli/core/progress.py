"""How the core tells of long work without printing: the caller hands in a `Progress`."""

from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
S = TypeVar("S", bound=Sized)


class Progress(Protocol):
    """What the core may say while it works. `console.ConsoleProgress` is the visible one."""

    def say(self, message: str) -> None:
        """One line that matters (a choice made, with its reason)."""
        ...

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Yields the items while showing how far the work has come."""
        ...

    def status(self, text: str) -> None:
        """Latest figures beside the running bar (losses, speed)."""
        ...

    def figures(self, folder: Path, row: dict[str, Any]) -> None:
        """A line of the `metrics.jsonl` of a folder as it is written, for those who draw along."""
        ...


class Silent:
    """Says nothing; the default of every core function."""

    def say(self, message: str) -> None:
        """Drops the message."""

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Yields the items, nothing more."""
        return iter(items)

    def status(self, text: str) -> None:
        """Drops the text."""

    def figures(self, folder: Path, row: dict[str, Any]) -> None:
        """Drops the row."""


SILENT = Silent()


def in_parts(progress: Progress, parts: Sequence[S], what: str) -> Iterator[S]:
    """Yields parts of a work while showing how many of the items in them are done."""
    total = sum(map(len, parts))
    done = iter(progress.track(range(total), what, total))
    next(done, None)  # which shows the bar
    for part in parts:
        yield part
        for _ in range(len(part)):
            next(done, None)
