"""The one exception that a user is meant to read."""

import re

_ADDRESS = re.compile(
    r" ?<(?:[^<>]|<\w+>)* at 0x[0-9A-Fa-f]+>"
)  # of an object, as other packages show it


class UserError(Exception):
    """A mistake that the user can mend: what happened and what to do about it.

    Args:
        what: what is wrong and where, one or two sentences, with names and values.
        hint: what to do next, ideally a command. May be empty.

    Both may quote what a file holds; what cannot be printed, such as half a character, is told by
    its escape, and where an object of Python's lies in memory is left out.
    """

    def __init__(self, what: str, hint: str = "") -> None:
        self.what, self.hint = _printable(what), _printable(hint)
        super().__init__(self.what)


def _printable(text: str) -> str:
    return _ADDRESS.sub("", text).encode("utf-8", "backslashreplace").decode("utf-8")
