"""Every image of a part checked before anyone trains: in parallel, once, also after a kill."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from concat_cli.core.data.check import Checker
from concat_cli.core.data.index import Row
from concat_cli.core.data.ledger import Ledger, key_of
from concat_cli.core.data.pool import mapper, processes_for
from concat_cli.core.data.source import Item
from concat_cli.core.errors import UserError
from concat_cli.core.progress import Progress

CHUNK = 64  # images that a process checks at a time
SHOWN = 10  # faulty images that an error names
_HINT = "Mend or download them again, or leave them out with --skip-bad."


@dataclass(frozen=True)
class Bad:
    """An image that cannot be used, and why."""

    image_id: int
    image: str
    reason: str


@dataclass(frozen=True)
class Verified:
    """The rows of the good images in the order of the items, the bad ones, and how many had been
    checked before."""

    rows: list[Row]
    bad: list[Bad]
    known: int


@dataclass(frozen=True)
class _Chunk:
    """Images that one process checks."""

    checker: Checker
    places: list[int]
    items: list[Item]


def verify(
    part: str,
    checker: Checker,
    items: Sequence[Item],
    ledger_path: Path,
    *,
    skip_bad: bool,
    progress: Progress,
    processes: int | None = None,
) -> Verified:
    """Checks each image that the ledger does not know as it is now.

    UserError naming the first faulty images unless `skip_bad`.
    """
    stamps = [checker.stamps(item) for item in items]
    if not skip_bad:
        _refuse_missing(checker, items, stamps)
    keys = [key_of(item, stamp) for item, stamp in zip(items, stamps, strict=True)]
    ledger = Ledger(ledger_path, checker)
    rows = ledger.read(items, keys)
    todo = [place for place, row in enumerate(rows) if row is None]
    known = len(items) - len(todo)
    if known and todo:
        progress.say(f"{part}: {known} of {len(items)} images were checked before")
    bad: dict[int, Bad] = {}
    jobs = _chunks(checker, items, todo)
    if jobs:
        count = processes_for(len(jobs) // 2, processes, progress)
        with mapper(_check, count) as work, ledger.open():
            results = _flat(work(jobs))
            for place, result in progress.track(results, f"checking {part}", len(todo)):
                if isinstance(result, Bad):
                    bad[place] = result
                else:
                    rows[place] = result
                    ledger.add(keys[place], result)
    if bad and not skip_bad:
        raise _faulty([bad[place] for place in sorted(bad)], len(items))
    good = [row for row in rows if row is not None]
    return Verified(good, [bad[place] for place in sorted(bad)], known)


def _chunks(checker: Checker, items: Sequence[Item], places: list[int]) -> list[_Chunk]:
    parts = [places[i : i + CHUNK] for i in range(0, len(places), CHUNK)]
    return [_Chunk(checker, part, [items[place] for place in part]) for part in parts]


def _check(chunk: _Chunk) -> list[tuple[int, Row | Bad]]:
    results: list[tuple[int, Row | Bad]] = []
    for place, item in zip(chunk.places, chunk.items, strict=True):
        try:
            results.append((place, chunk.checker.row(item)))
        except UserError as error:
            results.append((place, Bad(item.image_id, item.image, error.what)))
    return results


def _flat(chunks: Iterable[list[tuple[int, Row | Bad]]]) -> Iterator[tuple[int, Row | Bad]]:
    for chunk in chunks:
        yield from chunk


def _refuse_missing(
    checker: Checker, items: Sequence[Item], stamps: Sequence[Sequence[tuple[int, int] | None]]
) -> None:
    """UserError where files are missing: found in seconds, before the long work."""
    missing = [
        name
        for item, found in zip(items, stamps, strict=True)
        if None in found
        for name, stamp in zip(checker.names(item), found, strict=True)
        if stamp is None
    ]
    if missing:
        more = f" and {len(missing) - 1} more files" if len(missing) > 1 else ""
        raise UserError(
            f"Missing: {missing[0]}{more}.",
            "Finish the download or unpacking, or leave these images out with --skip-bad.",
        )


def _faulty(bad: list[Bad], total: int) -> UserError:
    if len(bad) == 1:
        return UserError(f"1 of {total} images is faulty: {bad[0].reason}", _HINT)
    lines = [f"  {entry.image}: {entry.reason}" for entry in bad[:SHOWN]]
    more = [f"  and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
    return UserError("\n".join([f"{len(bad)} of {total} images are faulty:", *lines, *more]), _HINT)
