"""`concat compare`: runs side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from concat_cli.commands.options import Device, DeviceOption, Force, Json
from concat_cli.console import Cell, Console, relative

if TYPE_CHECKING:
    from concat_cli.core.evaluate.compare import Comparison, Difference, Row
    from concat_cli.core.evaluate.cost import Cost
    from concat_cli.core.evaluate.intervals import Interval

_GROUPS = ("seen", "unseen", "harmonic")
_COLUMNS = (
    "run", "seen PQ", "unseen PQ", "hPQ", "seen mIoU", "unseen mIoU", "hIoU", "M parameters",
    "images/s", "MiB", "CLIP's image encoder",
)  # fmt: skip


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN",
            help="Runs below runs/ or weights files, each as RUN, LABEL=RUN or "
            "RUN:KEY=VALUE,KEY=VALUE with config keys to score it with.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for compare.json and compare.md.")] = Path(
        "comparison"
    ),
    bootstrap: Annotated[
        int, typer.Option(min=10, metavar="N", help="95% intervals from N draws of the images.")
    ] = 1000,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only the first N images: a quick look.")
    ] = None,
    as_json: Json = False,
    force: Force = False,
    device: DeviceOption = Device.auto,
) -> None:
    """Compare runs on the same images: quality, speed."""
    from concat_cli.core.evaluate.compare import compare_runs, parse_entry
    from concat_cli.core.files import write_json, write_text

    console = Console(json_only=as_json)
    found = compare_runs(
        [parse_entry(text) for text in runs], device=device.value, bootstraps=bootstrap,
        limit=limit, force=force, progress=console.progress,
    )  # fmt: skip
    if (out / "compare.json").exists():
        console.say(f"replacing the earlier comparison in {relative(out)}")
    write_json(out / "compare.json", found.to_json(), indent=1)
    write_text(out / "compare.md", markdown(found))
    if as_json:
        return console.json(found.to_json())
    for columns, rows in tables(found, "\n"):
        console.table(columns, rows)
    for line in remarks(found):
        console.say(line)
    console.done({"table": relative(out / "compare.md"), "figures": relative(out / "compare.json")})


def tables(found: Comparison, between: str) -> Iterator[tuple[Sequence[str], list[list[Cell]]]]:
    """Columns and rows of the runs and of their differences; `between` figure and interval."""

    def figures(row: Row | Difference, sign: str = "") -> list[Cell]:
        return [
            _shown(one[group], between, sign) for one in (row.pq, row.miou) for group in _GROUPS
        ]

    yield _COLUMNS, [[row.label, *figures(row), *_shown_cost(row.cost)] for row in found.rows]
    if found.differences:
        columns = f"minus {found.differences[0].minus}", *_COLUMNS[1:7]
        yield columns, [[one.label, *figures(one, "+")] for one in found.differences]


def _shown_cost(cost: Cost) -> list[Cell]:
    speed = cost.images_per_second["semantic"]
    return [
        f"{cost.parameters / 1e6:.2f}",
        None if speed is None else f"{speed:.3g}",
        None if cost.peak_mib is None else f"{cost.peak_mib:.0f}",
        "needed" if cost.clip_image else "no",
    ]


def _shown(value: Interval | None, between: str, sign: str) -> str | None:
    """In percent: `48.0 [46.1, 50.2]`."""
    if value is None:
        return None
    whole, low, high = (100 * part for part in (value.value, value.low, value.high))
    return f"{whole:{sign}.1f}{between}[{low:.1f}, {high:.1f}]"


def remarks(found: Comparison) -> Iterator[str]:
    """What has to be known to read the tables."""
    yield (
        f"{found.images} images of {found.data}, {found.seen} seen and {found.unseen} unseen "
        f"classes ({found.class_split}), all of them competing; in percent, 95% intervals over the "
        f"images, drawn again {found.repeats} times: they say nothing of other training runs"
    )
    costs = [row.cost for row in found.rows]
    where = ", ".join(dict.fromkeys(f"{c.device}, {c.threads} threads" for c in costs))
    gpu = costs[0].device.startswith("cuda")
    of_what = "of its tensors" if gpu else "beyond Python and its packages"
    yield (
        f"speed: one image at a time to its semantic map, median ({where}); memory: the "
        f"most while it predicts, {of_what}; parameters: those that run at test"
    )
    if any(row.pq["seen"] is None and row.pq["unseen"] is None for row in found.rows):
        yield "no PQ: these weights name pixels and tell no segments of a class apart"
    for note in found.notes:
        yield f"not alike: {note}"


def markdown(found: Comparison) -> str:
    """The tables and remarks as Markdown."""
    blocks: list[str] = []
    for columns, rows in tables(found, " "):
        shown = [["-" if c is None else str(c).replace("|", "\\|") for c in row] for row in rows]
        lines = [f"| {' | '.join(row)} |" for row in (columns, *shown)]
        blocks.append("\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]]))
    blocks.append("\n".join(f"- {line}" for line in remarks(found)))
    return "\n\n".join(blocks) + "\n"
