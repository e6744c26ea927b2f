"""The one exception that a user is meant to read."""


class UserError(Exception):
    """A mistake that the user can mend: what happened and what to do about it.

    Args:
        what: what is wrong and where, one or two sentences, with names and values.
        hint: what to do next, ideally a command. May be empty.
    """

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint
