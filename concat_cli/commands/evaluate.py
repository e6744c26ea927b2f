"""`concat evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from concat_cli.commands.options import (
    FILES,
    Device,
    DeviceOption,
    DryRun,
    FilePngs,
    FileSplit,
    Json,
    Match,
    Overrides,
    PageFile,
    PagePhotos,
    PerClass,
    RunName,
    WeightsFile,
    check_page_options,
    open_share,
    refuse_given,
    with_options,
)
from concat_cli.commands.report_view import show_classes, show_report
from concat_cli.console import Console, rank, relative
from concat_cli.core.errors import UserError

if TYPE_CHECKING:
    from concat_cli.core.evaluate.scores import Scoring

DRAWS = 1000  # of the images, for the intervals of a page
_OF_WEIGHTS = ("overrides", "save", "name", "weights", "device", "dry_run", "force")
_OF_FILES = (
    "predictions_dir", "truth_dir", "classes", "class_split", "match", "kinds",
    "as_panopticapi", "pictures",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Those named like a field of `Scoring` are handed on to it."""

    overrides: Overrides = None
    split: Annotated[
        Literal["all", "seen", "unseen"],
        typer.Option(help="Classes to report; candidates stay all."),
    ] = "all"
    candidates: Annotated[
        Literal["all", "split"],
        typer.Option(help="Classes that compete; split: those of --split, the easier protocol."),
    ] = "all"
    tasks: Annotated[
        str | None, typer.Option(help="Of panoptic,semantic,instance. Default: the first two.")
    ] = None
    bootstraps: Annotated[
        int,
        typer.Option(
            "--bootstrap",
            min=0,
            metavar="N",
            help="95% intervals from N draws of the images. With --report 1000.",
        ),
    ] = 0
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Score a --split whose unseen classes were trained on; allow words the built-in "
            "CLIP never saw.",
        ),
    ] = False
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Also try offsets on the seen logits.")
    ] = False
    diagnostics: Annotated[
        bool, typer.Option("--diagnostics", help="Also how many segments get a mask, and a name.")
    ] = False
    per_class: PerClass = False
    as_json: Json = False
    report: PageFile = None
    save: Annotated[Path | None, typer.Option(help="Also write the predictions there.")] = None
    name: RunName = None
    weights: WeightsFile = None
    device: DeviceOption = Device.auto
    dry_run: DryRun = False
    predictions: Annotated[
        Path | None, typer.Option(help="Score this COCO panoptic JSON.", rich_help_panel=FILES)
    ] = None
    truth: Annotated[Path | None, typer.Option(help="Against this one.", rich_help_panel=FILES)] = (
        None
    )
    predictions_dir: FilePngs = None
    truth_dir: FilePngs = None
    classes: Annotated[
        Path | None,
        typer.Option(
            help="--predictions and --truth are folders of semantic PNGs; their classes by value.",
            rich_help_panel=FILES,
        ),
    ] = None
    pictures: PagePhotos = None
    class_split: FileSplit = None
    match: Match = "auto"
    kinds: Annotated[
        str,
        typer.Option(
            help='"dog; sky : stuff", or a file. Default: isthing.', rich_help_panel=FILES
        ),
    ] = ""
    as_panopticapi: Annotated[
        bool,
        typer.Option(
            "--as-panopticapi", help="The truth's areas by its JSON.", rich_help_panel=FILES
        ),
    ] = False
    official: Annotated[
        bool, typer.Option("--official", help="Also run panopticapi.", rich_help_panel=FILES)
    ] = False

    def scoring(self) -> Scoring:
        """The options that say how to score."""
        from concat_cli.core.evaluate.scores import Scoring

        own = {one.name for one in fields(Scoring)}
        given = {name: value for name, value in vars(self).items() if name in own}
        if self.report is not None:
            given |= {"look": True, "bootstraps": self.bootstraps or DRAWS}
        return Scoring(**given)

    def check(self, files: bool) -> None:
        """UserError for an option that would do nothing, of files or of weights."""
        what, others = ("files", _OF_WEIGHTS) if files else ("weights", _OF_FILES)
        hint = "Leave it out. --predictions and --truth score files, else weights are scored."
        refuse_given(self, others, f"{what} are scored", hint)


@with_options(Options)
def evaluate(options: Options) -> None:
    """Score weights, or existing predictions."""
    score(options)


def score(options: Options) -> None:
    """Scores as the options say, shows the figures, and writes the page if one is asked for."""
    console, scoring = Console(json_only=options.as_json), options.scoring()
    title, run = "", None
    check_page_options(options.report, options.pictures)
    if options.predictions is not None or options.truth is not None:
        if options.predictions is None or options.truth is None:
            raise UserError("--predictions and --truth belong together.", "Give both.")
        options.check(files=True)
        from concat_cli.core.evaluate.compare_files import Against, score_files
        from concat_cli.core.evaluate.files import PanopticFiles, Rules

        rules = Rules(options.match, options.kinds, options.as_panopticapi)
        truth = PanopticFiles(options.truth, options.truth_dir)
        report = score_files(
            PanopticFiles(options.predictions, options.predictions_dir),
            Against(truth, options.classes, options.class_split, rules),
            scoring,
            console.progress,
        )
        title = options.predictions.name
    else:
        options.check(files=False)
        from concat_cli.core.evaluate.weights import evaluate_weights
        from concat_cli.core.runs import find_weights

        found = find_weights(options.name, options.weights)
        console.say(f"weights {relative(found.path)} ({found.reason})")
        keys = options.overrides or []
        if options.dry_run:
            return _show_plan(console, found.path, keys, scoring)
        place, share = open_share(options.device.value, console)
        report = evaluate_weights(
            found.path, keys, scoring, device=place, share=share, progress=console.progress
        )
        title, run = relative(found.path), found.path
    if options.report is not None and rank() == 0:
        from concat_cli.core.evaluate.page.make import run_of, write_page

        write_page(report, options.report, title, run and run_of(run))
    if options.as_json:
        return console.json(report.to_json())
    show_report(console, report)
    if options.per_class:
        show_classes(console, report)
    written = {"predictions": options.save, "page": options.report}
    if any(written.values()):
        console.done({what: relative(path) for what, path in written.items() if path is not None})


def _show_plan(console: Console, weights: Path, keys: Sequence[str], scoring: Scoring) -> None:
    """What would be scored; UserError for what would stop it."""
    from concat_cli.core.clip.prompts import check_names
    from concat_cli.core.evaluate.weights import open_subject
    from concat_cli.core.infer.predictor import check_plan

    subject = open_subject(weights, keys, tensors=False)
    tasks, candidates = subject.tasks(scoring), subject.candidates(scoring)
    check_names(candidates, subject.cfg.clip, scoring.force)
    check_plan(subject.weights, subject.cfg)
    info = subject.info
    seen, classes = len(info.vocabulary.seen_indices), len(info.vocabulary)
    console.table(
        ["what", "value"],
        [
            ("stage", subject.weights.stage),
            ("data", f"{subject.cfg.data.root}, part val"),
            ("classes", f"{seen} seen, {classes - seen} unseen ({info.class_split})"),
            ("candidates", len(candidates)),
            ("tasks", ", ".join(tasks)),
        ],
    )
    console.dry_run()
