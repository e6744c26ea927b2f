"""What the sections of the configuration check their values with."""


def check(ok: bool, message: str) -> None:
    """ValueError with `message` unless `ok`."""
    if not ok:
        raise ValueError(message)
