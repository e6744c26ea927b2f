"""How the core tells of long work without printing: the caller hands in a `Progress`."""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


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


class Silent:
    """Says nothing; the default of every core function."""

    def say(self, message: str) -> None:
        """Drops the message."""

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Yields the items, nothing more."""
        return iter(items)

    def status(self, text: str) -> None:
        """Drops the text."""


SILENT = Silent()
