"""What a run over many pictures has done, on disk: a killed one goes on where it stopped.

OUT/.predict/settings.json   what the results depend on
OUT/.predict/NAME.jsonl      of each process: the number of a chunk of pictures, its key and what
                             was found in it, a line each, added when all its files are written

It is gone when the run has ended.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from concat_cli.core import files
from concat_cli.core.errors import UserError
from concat_cli.core.lock import locked

NAME = ".predict"
Json = dict[str, Any]


@dataclass
class Journal:
    """The chunks of one run; every process adds to a file of its own."""

    folder: Path
    _own: BinaryIO | None = None

    def begin(self, settings: Json) -> list[str]:
        """Makes the folder; where what is there was made with other settings it is forgotten, and
        the names of those that differ are returned."""
        path = self.folder / "settings.json"
        settings = json.loads(json.dumps(settings))
        before: Any = None
        if path.exists():
            before = files.read_json(path, f"Delete {self.folder}: the run begins anew then.")
        if before == settings:
            return []
        for old in self.folder.glob("*.jsonl"):
            old.unlink()
        files.write_json(path, settings)
        return [key for key in settings if before and before.get(key) != settings[key]]

    def keep(self, is_valid: Callable[[int, str, Json], bool]) -> tuple[Path, set[int], int]:
        """Brings the chunks that still hold into one file; it, their numbers, and how many chunks
        did not hold."""
        old = sorted(self.folder.glob("*.jsonl"))
        kept, numbers, dropped = self.folder / f"{secrets.token_hex(4)}.jsonl", set[int](), 0
        with files.atomic_path(kept) as temp, temp.open("wb") as file:
            for line in (line for path in old for line in _lines(path)):
                number, key, value = _split(line)
                if number in numbers:  # it was killed while it did this
                    continue
                if is_valid(number, key, json.loads(value)):
                    numbers.add(number)
                    file.write(line)
                else:
                    dropped += 1
        for path in old:
            path.unlink()
        return kept, numbers, dropped

    def add(self, number: int, key: str, value: Json) -> None:
        """A chunk of which everything is written."""
        try:
            if self._own is None:
                self._own = (self.folder / f"{secrets.token_hex(4)}.jsonl").open("xb")
            self._own.write(f"{number} {key} {json.dumps(value)}\n".encode())
            self._own.flush()
        except OSError as error:
            raise files.write_error(self.folder, error) from error

    def close(self) -> Path | None:
        """The file of this process, complete; None where it added nothing."""
        if self._own is None:
            return None
        self._own.close()
        return Path(self._own.name)

    def remove(self) -> None:
        """Forgets everything."""
        shutil.rmtree(self.folder, ignore_errors=True)


def read(paths: Iterable[Path]) -> Iterator[tuple[int, Json]]:
    """The chunks in some files, in the order of their numbers, one in memory at a time."""
    places: dict[int, tuple[Path, int]] = {}
    for path in paths:
        start = 0
        for line in _lines(path):
            places[_split(line)[0]] = path, start
            start += len(line)
    for number in sorted(places):
        path, start = places[number]
        with path.open("rb") as file:
            file.seek(start)
            yield number, json.loads(_split(file.readline())[2])


@contextmanager
def opened(out: Path, lasting: bool, say: Callable[[str], None]) -> Generator[Journal]:
    """The journal of a folder of results, locked while it is used; left behind by an error where
    the run can be continued.

    lasting: whether it can. It cannot where another process predicts into the folder, either.
    """
    with ExitStack() as stack:
        folder = files.temporary_name(out / "predict")
        if lasting:
            try:
                stack.enter_context(locked(out / NAME, say))
                folder = out / NAME
            except UserError as error:
                say(f"{error.what} If this process is stopped, it will begin anew")
        journal = Journal(folder)
        try:
            yield journal
        except BaseException:
            if folder.name != NAME:
                journal.remove()
            raise
        journal.remove()


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file but for one that a kill has cut off."""
    with path.open("rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))


def _split(line: bytes) -> tuple[int, str, bytes]:
    number, key, value = line.split(b" ", 2)
    return int(number), key.decode("ascii"), value
