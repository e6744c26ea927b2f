"""What ends a command: the one exception that a user is meant to read, and a signal."""

from __future__ import annotations

import re
import signal

MOST = 5000  # characters of a message, such as one that quotes a name of a damaged file
_ADDRESS = re.compile(r" ?<(?:[^<>]|<\w+>)* at 0x[0-9A-Fa-f]+>")  # as other packages show objects


class UserError(Exception):
    """A mistake that the user can mend: what happened and what to do about it.

    Args:
        what: what is wrong and where, one or two sentences, with names and values.
        hint: what to do next, ideally a command. May be empty.

    Both may quote what a file holds; what cannot be printed, such as half a character, is told by
    its escape; where an object of Python's lies in memory, and the middle of what nobody would read
    to its end, are left out.
    """

    def __init__(self, what: str, hint: str = "") -> None:
        self.what, self.hint = _printable(what), _printable(hint)
        super().__init__(self.what)


def _printable(text: str) -> str:
    text = _ADDRESS.sub("", text)
    if len(text) > MOST:
        text = f"{text[: MOST - 500]} ... ({len(text) - MOST} characters more) ... {text[-500:]}"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class Stopped(BaseException):
    """SIGTERM or Ctrl-C, by its number. Typer has exit codes of its own for a KeyboardInterrupt."""

    def __init__(self, number: int) -> None:
        self.number = number


def exit_code(stop: Stopped | KeyboardInterrupt) -> int:
    """Of a command that a signal ended, as shells have it."""
    return 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)
