"""`concat compare`: runs or files side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from concat_cli.commands.options import (
    FILES,
    Device,
    DeviceOption,
    FilePngs,
    FileSplit,
    Force,
    Json,
    Match,
    PageFile,
    PagePhotos,
    PerClass,
    check_page_options,
    refuse_given,
    with_options,
)
from concat_cli.commands.report_view import filled, kind_of, percent
from concat_cli.console import Cell, Console, relative
from concat_cli.core.errors import UserError

if TYPE_CHECKING:
    from concat_cli.core.evaluate.compare import Comparison, Row
    from concat_cli.core.evaluate.compare_files import FileComparison, FileRow
    from concat_cli.core.evaluate.cost import Cost
    from concat_cli.core.evaluate.differences import Difference
    from concat_cli.core.evaluate.page.comparison import Look

Table = tuple[Sequence[str], list[list[Cell]]]  # columns, rows

_OF_RUNS = ("limit", "force", "device")
_OF_FILES = ("truth_dir", "classes", "class_split", "match", "pictures")
FEW_IMAGES = 8  # of those that differ most, in the terminal
_GROUPS = ("seen", "unseen", "harmonic")
_FIGURES = ("seen PQ", "unseen PQ", "hPQ", "seen mIoU", "unseen mIoU", "hIoU")
_COLUMNS = ("run", *_FIGURES, "M parameters", "images/s", "MiB", "CLIP's image encoder")
_OF_PAIR = ("PQ", *_FIGURES[:3], "mIoU", *_FIGURES[3:])


@dataclass(frozen=True)
class Options:
    """What to compare, and where to write it."""

    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN",
            help="Runs below runs/ or weights files, each as RUN, LABEL=RUN or "
            "RUN:KEY=VALUE,KEY=VALUE with config keys to score it with; or COCO panoptic files of "
            "any methods, as FILE.json, LABEL=FILE.json or FILE.json:PNGS.",
        ),
    ]
    out: Annotated[Path, typer.Option(help="Folder for compare.json and compare.md.")] = Path(
        "comparison"
    )
    bootstrap: Annotated[
        int, typer.Option(min=10, metavar="N", help="95% intervals from N draws of the images.")
    ] = 1000
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only the first N images: a quick look.")
    ] = None
    per_class: PerClass = False
    as_json: Json = False
    force: Force = False
    device: DeviceOption = Device.auto
    truth: Annotated[
        Path | None,
        typer.Option(help="The files' COCO panoptic JSON of the truth.", rich_help_panel=FILES),
    ] = None
    truth_dir: FilePngs = None
    classes: Annotated[
        Path | None,
        typer.Option(
            help="Files and --truth are folders of semantic PNGs; their classes by value.",
            rich_help_panel=FILES,
        ),
    ] = None
    class_split: FileSplit = None
    match: Match = "auto"
    report: PageFile = None
    pictures: PagePhotos = None

    def check(self) -> bool:
        """Whether files are compared; UserError for both kinds at once, and for an option that
        would do nothing."""
        from concat_cli.core.evaluate.compare_files import is_file

        files = [text for text in self.runs if self.classes is not None or is_file(text)]
        if 0 < len(files) < len(self.runs):
            run = next(text for text in self.runs if text not in files)
            raise UserError(
                f"{files[0]} is a file, and {run} a run: these are not scored alike.",
                "Write the run's predictions first, with `concat evaluate --save`.",
            )
        if files and self.truth is None:
            what = f"Nothing says what {files[0]} is scored against."
            raise UserError(what, "Give --truth, the COCO panoptic JSON of the labels.")
        if self.truth is not None and not files:
            raise UserError(
                f"{self.runs[0]} is no COCO panoptic JSON, and no folder with a panoptic.json.",
                "Check the path: `--save` writes it at its end. Runs are compared without --truth.",
            )
        what, others = ("files", _OF_RUNS) if files else ("runs", _OF_FILES)
        refuse_given(self, others, f"{what} are compared", "Leave it out.")
        return bool(files)


@with_options(Options)
def compare(asked: Options) -> None:
    """Compare runs, or files, on the same images."""
    from concat_cli.core.files import write_json, write_text

    console, look = Console(json_only=asked.as_json), None
    check_page_options(asked.report, asked.pictures)
    if asked.check():
        files, look = _files(asked, console)
        found = files
        shown, text = list(file_tables(files, " ")), file_markdown(files)
        lines = list(file_remarks(files))
    else:
        runs = found = _runs(asked, console)
        shown, text, lines = list(tables(runs, " ")), markdown(runs), list(remarks(runs))
    out = asked.out
    if (out / "compare.json").exists():
        console.say(f"replacing the earlier comparison in {relative(out)}")
    write_json(out / "compare.json", found.to_json(), indent=1)
    write_text(out / "compare.md", text)
    if asked.report is not None:
        from concat_cli.core.evaluate.page.comparison import write_comparison

        write_comparison(found, asked.report, lines, look)
    if asked.as_json:
        return console.json(found.to_json())
    for one in found.differences:
        shown += [of_classes(one)] if asked.per_class else []
        columns, rows = of_images(one)
        shown += [(columns, rows[:FEW_IMAGES])] if rows else []
    for columns, rows in shown:
        console.table(columns, rows)
    for line in lines:
        console.result(line)
    page = {} if asked.report is None else {"page": relative(asked.report)}
    written = {"table": relative(out / "compare.md"), "figures": relative(out / "compare.json")}
    console.done(written | page)


def _runs(asked: Options, console: Console) -> Comparison:
    from concat_cli.core.evaluate.compare import compare_runs, parse_entry

    return compare_runs(
        [parse_entry(text) for text in asked.runs], device=asked.device.value,
        bootstraps=asked.bootstrap, limit=asked.limit, force=asked.force, progress=console.progress,
    )  # fmt: skip


def _files(asked: Options, console: Console) -> tuple[FileComparison, Look]:
    from concat_cli.core.evaluate.compare_files import (
        Against,
        compare_files,
        look_again,
        parse_file,
    )
    from concat_cli.core.evaluate.files import PanopticFiles, Rules

    assert asked.truth is not None
    truth = PanopticFiles(asked.truth, asked.truth_dir)
    against = Against(truth, asked.classes, asked.class_split, Rules(asked.match))
    entries = [parse_file(text) for text in asked.runs]
    found = compare_files(entries, against, asked.bootstrap, console.progress)
    return found, partial(look_again, entries, against, asked.pictures)


def tables(found: Comparison, between: str) -> Iterator[Table]:
    """Columns and rows of the runs and of their differences; `between` figure and interval."""
    rows = [[r.label, *_means(r, _GROUPS, between), *_shown_cost(r.cost)] for r in found.rows]
    yield _COLUMNS, rows
    yield from _differences(found.differences, _GROUPS, _FIGURES, between)


def file_tables(found: FileComparison, between: str) -> Iterator[Table]:
    """The same of files, without columns of groups that are not divided or not scored."""
    groups = ("all", *_GROUPS)
    yield filled(["file", *_OF_PAIR], [[r.label, *_means(r, groups, between)] for r in found.rows])
    for table in _differences(found.differences, groups, _OF_PAIR, between):
        yield filled(*table)


def _means(
    row: Row | FileRow | Difference, groups: Sequence[str], between: str, sign: str = ""
) -> list[Cell]:
    found = (one[group] for one in (row.pq, row.miou) for group in groups)
    return [None if each is None else each.percent(sign, between) for each in found]


def _differences(
    found: Sequence[Difference], groups: Sequence[str], columns: Sequence[str], between: str
) -> Iterator[Table]:
    if found:
        rows = [[one.label, *_means(one, groups, between, "+")] for one in found]
        yield (f"minus {found[0].minus}", *columns), rows


def of_classes(one: Difference) -> Table:
    """Columns and rows of the classes, those that lost most first."""
    columns = ["class", "kind", one.minus, one.label, "difference"]
    rows: list[list[Cell]] = [
        [
            each.name, kind_of(each.thing, each.seen), percent(each.theirs), percent(each.ours),
            None if each.difference is None else each.difference.percent("+"),
        ]
        for each in one.classes
    ]  # fmt: skip
    return columns, rows


def of_images(one: Difference) -> Table:
    """Columns and rows of the images that differ most."""
    columns = ["differ most", one.minus, one.label, "difference"]
    rows: list[list[Cell]] = [
        [each.image, 100 * each.theirs, 100 * each.ours, f"{100 * each.gap:+.1f}"]
        for each in one.images
    ]
    return columns, rows


def _shown_cost(cost: Cost) -> list[Cell]:
    speed = cost.images_per_second["semantic"]
    return [
        f"{cost.parameters / 1e6:.2f}",
        None if speed is None else f"{speed:.3g}",
        None if cost.peak_mib is None else f"{cost.peak_mib:.0f}",
        "needed" if cost.clip_image else "no",
    ]


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


def file_remarks(found: FileComparison) -> Iterator[str]:
    """The same of files."""
    split = f", divided by {found.class_split}" if found.class_split else ""
    yield (
        f"{found.images} images of {found.truth}, {found.classes} classes{split}; in percent, 95% "
        f"intervals over the images, drawn again {found.repeats} times"
    )
    if found.differences:
        yield (
            "of 20 classes that do not differ, one has an interval without 0; an image counts by "
            "the mean over the classes in it"
        )


def markdown(found: Comparison) -> str:
    """The tables and remarks of runs as Markdown."""
    return _markdown([*tables(found, " ")], found.differences, [*remarks(found)])


def file_markdown(found: FileComparison) -> str:
    """The same of files."""
    return _markdown([*file_tables(found, " ")], found.differences, [*file_remarks(found)])


def _markdown(
    shown: Sequence[Table], differences: Sequence[Difference], lines: Sequence[str]
) -> str:
    """With every class, and the images that differ most."""
    more = [table for one in differences for table in (of_classes(one), of_images(one))]
    blocks: list[str] = []
    for columns, rows in (*shown, *(table for table in more if table[1])):
        cells = [[_cell(c).replace("|", "\\|") for c in row] for row in (columns, *rows)]
        table = [f"| {' | '.join(row)} |" for row in cells]
        blocks.append("\n".join([table[0], "|---" * len(columns) + "|", *table[1:]]))
    blocks.append("\n".join(f"- {line}" for line in lines))
    return "\n\n".join(blocks) + "\n"


def _cell(value: Cell) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
