"""The only place that prints: messages, progress, tables, results, errors.

Messages and results go to stdout, bars and errors to stderr. With `--json`, stdout holds the JSON
and nothing else. `--quiet` leaves results, warnings and errors, the last two on stderr; `--verbose`
adds what is read and how long things take, on stderr. Ranks above 0 of a `torchrun` say nothing but
errors. `NO_COLOR` is honoured.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TextIO, TypeVar

from rich.console import Console as RichConsole
from rich.table import Table
from rich.text import Text

from concat_cli.core.errors import UserError

T = TypeVar("T")
Cell = str | int | float | None
LAUNCHED = "CONCAT_LAUNCHED"  # set where `concat_cli.launch` tells how its processes ended
# What a terminal obeys instead of showing: control characters but for tab and newline, marks that
# turn the direction of text, line separators, and halves of characters, which no file can hold.
_OBEYED = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


LEVEL = "CONCAT_LEVEL"  # quiet or verbose; processes that are started inherit it
_READ = (
    ".json",
    ".jsonl",
    ".yaml",
    ".txt",
    ".csv",
    ".png",
    ".jpg",
    ".webp",
    ".safetensors",
    ".npz",
)


def is_quiet() -> bool:
    """Only results, warnings and errors are wanted."""
    return os.environ.get(LEVEL) == "quiet"


def is_verbose() -> bool:
    """Details for who looks for a fault are wanted."""
    return os.environ.get(LEVEL) == "verbose"


@contextmanager
def level_kept() -> Generator[None]:
    """The level of one command line, which ends with it; a verbose one's time is told."""
    before, start, spent = os.environ.get(LEVEL), time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        seconds, cpu = time.perf_counter() - start, time.process_time() - spent
        detail(f"{seconds:.2f} s, of the processor {cpu:.2f} s")
        os.environ.pop(LEVEL, None)
        if before is not None:
            os.environ[LEVEL] = before


def detail(message: str) -> None:
    """A line of `--verbose`, on stderr."""
    if is_verbose():
        sys.stderr.write(f"debug: {shown(message)}\n")


@cache  # a hook cannot be taken away
def tell_reads() -> None:
    """From now on `detail` tells which files of data are opened, each once."""
    seen: set[str] = set()

    def told(event: str, given: tuple[Any, ...]) -> None:
        if event == "open" and is_verbose() and isinstance(given[0], str) and given[1] != "w":
            path = given[0]
            if path.endswith(_READ) and ".dist-info" not in path and path not in seen:
                seen.add(path)
                detail(f"open {path}")

    sys.addaudithook(told)


def shown(text: str) -> str:
    """Text as a terminal may have it, whatever file it is from: what it would obey is told by its
    escape (of JSON, so that JSON stays the same value)."""
    return _OBEYED.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


class Console:
    """What a command says. `progress` is handed to the core.

    Args:
        json_only: stdout is kept for one JSON value; everything else goes to stderr.
        every: seconds between the lines of long work where there is no terminal.
    """

    def __init__(self, json_only: bool = False, every: float = 10.0) -> None:
        self._stream: TextIO = sys.stderr if json_only else sys.stdout
        self.silent = rank() > 0
        width = None if self._stream.isatty() else 160  # a pipe has no width of its own
        self._rich = RichConsole(
            file=self._stream, width=width, highlight=False, soft_wrap=True, quiet=self.silent
        )
        self.progress = ConsoleProgress(self, every)

    def say(self, message: str) -> None:
        """One line of what goes on."""
        if not is_quiet():
            self.result(message)

    def result(self, message: str) -> None:
        """One line that was asked for."""
        self._rich.print(Text(shown(message)))

    def warn(self, message: str) -> None:
        """One line that stands out."""
        rich = RichConsole(stderr=True, highlight=False, soft_wrap=True, quiet=self.silent)
        (rich if is_quiet() else self._rich).print(
            Text("note: ", style="bold yellow") + Text(shown(message))
        )

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
        """Rows under column names; numbers stand right, None is a dash, fractions have 1 digit."""
        table = Table(box=None, header_style="bold", pad_edge=False)
        rows = [list(row) for row in rows]
        for i, name in enumerate(columns):
            numeric = any(isinstance(row[i], (int, float)) for row in rows)
            table.add_column(
                Text(shown(name)), justify="right" if numeric else "left", overflow="fold"
            )
        for row in rows:
            table.add_row(*(Text(shown(_cell(value))) for value in row))
        self._rich.print(table, soft_wrap=False)

    def done(
        self, results: Mapping[str, object], following: Sequence[str] = (), stopped: bool = False
    ) -> None:
        """The last lines of a command: where the results are, and what to run next."""
        lines = [(name, shown(str(value)), "") for name, value in results.items()]
        following = [] if is_quiet() else [shown(text) for text in following]
        lines += [("next" if i == 0 else "", text, "bold") for i, text in enumerate(following)]
        width = max((len(name) for name, _, _ in lines), default=0)
        self._rich.print(
            Text("stopped", style="bold yellow") if stopped else Text("done", style="bold green")
        )
        for name, value, style in lines:
            self._rich.print(Text(f"  {name:<{width}}  ", style="dim") + Text(value, style=style))

    def dry_run(self) -> None:
        """The last line of a dry run."""
        self.say("dry run: nothing was written")

    def text(self, block: str) -> None:
        """A block of text as it is."""
        if not self.silent:
            self._stream.write(shown(block.rstrip("\n")) + "\n")

    def json(self, value: Any, **lists: Iterable[Any]) -> None:
        """The one JSON value of a `--json` command, on stdout; of an object, with lists whose
        values are never in memory together."""
        if self.silent:
            return
        text = shown(json.dumps(value, indent=2, ensure_ascii=False))
        write = sys.stdout.write
        write(text.removesuffix("\n}") if lists else text)
        for name, values in lists.items():
            write(f',\n  "{name}": [')
            for number, one in enumerate(values):
                each = shown(json.dumps(one, indent=2, ensure_ascii=False))
                write(("," if number else "") + "\n" + textwrap.indent(each, "    "))
            write("\n  ]")
        write("\n}\n" if lists else "\n")


class ConsoleProgress:
    """`core.progress.Progress` on a console: tqdm on a terminal, else a line now and then."""

    def __init__(self, console: Console | None = None, every: float = 10.0) -> None:
        self._console, self._every = console or Console(), every
        self._bars: list[Any] = []  # those that run, innermost last
        self.listener: Callable[[Path, dict[str, Any]], None] | None = None  # see `figures`

    def say(self, message: str) -> None:
        """One line, above a running bar."""
        for bar in self._bars:
            bar.clear()
        self._console.say(message)
        for bar in self._bars:
            bar.refresh()

    def status(self, text: str) -> None:
        """Latest figures beside the running bar."""
        if self._bars:
            self._bars[-1].set_postfix_str(shown(text), refresh=False)

    def figures(self, folder: Path, row: dict[str, Any]) -> None:
        """Hands a row of metrics to the listener, if there is one."""
        if self.listener is not None:
            self.listener(folder, row)

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Yields the items while showing how far the work has come; a range that begins above 0
        is work that was resumed."""
        if self._console.silent or is_quiet():
            yield from items
            return
        from tqdm import tqdm

        if total is None and hasattr(items, "__len__"):
            total = len(items)  # pyright: ignore[reportArgumentType]
        first: object = items
        before = first.start if isinstance(first, range) else 0
        bar = tqdm(
            total=None if total is None else total + before,
            initial=before,
            desc=shown(what),
            dynamic_ncols=True,
            leave=not self._bars,
            file=sys.stderr if sys.stderr.isatty() else io.StringIO(),  # lines are said instead
        )
        self._bars.append(bar)
        start = said = time.monotonic()
        try:
            for item in items:
                yield item
                bar.update()
                now = time.monotonic()
                due = now - said >= self._every
                if not sys.stderr.isatty() and (
                    due or (bar.n == bar.total and now - start >= self._every)
                ):
                    said = now
                    self._console.say(_line(bar, (bar.n - before) / max(now - start, 1e-9)))
        finally:
            self._bars.pop()
            bar.close()
            detail(f"{what}: {bar.n - before} in {time.monotonic() - start:.2f} s")


def _line(bar: Any, speed: float) -> str:
    """How far a bar is, without a terminal."""
    left = (bar.total or 0) - bar.n
    parts = [f"{bar.desc}: {bar.n}" + (f"/{bar.total}" if bar.total else ""), f"{speed:.3g}/s"]
    if left > 0:
        parts.append(f"{bar.format_interval(left / speed)} left")
    return " · ".join([*parts, *filter(None, [bar.postfix])])


def rank() -> int:
    """This process's number under `torchrun`, 0 when alone."""
    return int(os.environ.get("RANK", "0"))


def show_error(error: UserError) -> None:
    """What is wrong and what to do, on stderr."""
    console = RichConsole(stderr=True, highlight=False, soft_wrap=True)
    where = f" (process {rank()})" if rank() else ""
    console.print(Text(f"error{where}: ", style="bold red") + Text(shown(error.what)))
    if error.hint:
        console.print(Text(" hint: ", style="bold cyan") + Text(shown(error.hint)))


def relative(path: Path) -> str:
    """A path as seen from here, where that is shorter."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def duration(seconds: float) -> str:
    """`8.3 s`, or `4 min 5 s`, or `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _cell(value: Cell) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value).replace("\n", "\\n")
