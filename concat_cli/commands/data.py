"""`concat prepare-data`: draws the built-in world, prepares data sets on disk, tells of them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from enum import Enum
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from concat_cli.commands.options import DryRun, epilog, with_signature
from concat_cli.console import Console, relative
from concat_cli.core.config import ShapesConfig
from concat_cli.core.prepare.recipes import RECIPES
from concat_cli.core.prepare.source import Recipe

if TYPE_CHECKING:
    from concat_cli.core.prepare.run import Report

app = typer.Typer(rich_markup_mode="rich", no_args_is_help=True)
_DEFAULT = ShapesConfig()
_SHOWN = 3  # classes that a line names
OWN, BATCH = "own", 8  # the configuration of one's own data, and its batch
_CONFIGS = {  # of a class split; for others by what the truth can score
    "coco_panoptic_119_14": "concat_coco_119_14",
    "coco_stuff_156_15": "concat_coco_stuff_156_15",
    "coco_instances_48_17": "concat_coco_instances_48_17",
    "coco_instances_65_15": "concat_coco_instances_65_15",
    "voc_15_5": "concat_voc_15_5",
    "panoptic": "concat_coco_119_14",
    "semantic": "concat_coco_stuff_156_15",
    "instance": "concat_coco_instances_65_15",
}


class Exif(str, Enum):
    """Which pixels the labels of photos are of that EXIF turns."""

    turn = "turn"
    stored = "stored"


class Pixels(str, Enum):
    """What becomes of unseen classes in training images."""

    drop = "drop"
    void = "void"


def _option(kind: Any, text: str, name: str, **how: Any) -> Any:
    """An option of that type; a flag has no --no-..."""
    flag = [f"--{name.replace('_', '-')}"] * (kind is bool)
    return Annotated[kind, typer.Option(*flag, help=text, **how)]


def _signed(
    function: Callable[..., None], text: str, options: Mapping[str, tuple[Any, Any]]
) -> Callable[..., None]:
    """A command of a context alone, with the options that Typer reads: declarations, defaults."""

    def command(context: typer.Context, **_: Any) -> None:
        function(context)

    context = {"context": (typer.Context, Parameter.empty)}
    return with_signature(command, text, context | dict(options))


_FOLDER = Annotated[Path, typer.Argument(help="Folder of the data set.")]
_SHAPES = {
    "unseen": (str, 'Unseen classes: "striped star; green water".'),
    "unseen_seed": (int, "Another split of the default's kind."),
    "unseen_pixels": (Pixels, "void: training scenes hold unseen classes, without a label."),
    "train": (int, "Training scenes (seen classes)."),
    "dev": (int, "Scenes for selection (seen classes)."),
    "val": (int, "Scenes for the score (all classes)."),
    "size": (int, "Side of a scene in pixels."),
    "seed": (int, "Seed of the scenes."),
}
# The options of every data set on disk, in the order of its help; those of its recipe come before.
_COMMON: dict[str, tuple[Any, str, Any]] = {
    "out": (Path | None, "Default: ROOT/concat.", None),
    "class_split": (str, "Unseen classes: a published split or a YAML file.", ""),
    "unseen_pixels": (Pixels, "drop: images with unseen classes leave training.", Pixels.drop),
    "dev": (int | None, "Images for selection. Default: 2% of train.", None),
    "skip_bad": (bool, "Leave out faulty images: bad.jsonl.", False),
    "decode": (bool, "Decode images in full, not headers alone.", False),
    "exif": (Exif | None, "Labels of photos that EXIF turns: of upright or stored pixels.", None),
    "white": (int, "White in grey images of 16 bits; of 12 bits: 4095.", 65535),
    "one_part": (bool, "Where train or val is missing, the other is both.", False),
}


def _shapes(context: typer.Context) -> None:
    given: dict[str, Any] = dict(context.params)
    out, dry_run = Path(given.pop("out")), given.pop("dry_run")
    console = Console()
    from concat_cli.core.config_file import load_config

    given["unseen_pixels"] = Pixels(given["unseen_pixels"]).value
    cfg = load_config(None, [f"shapes.{key}={value}" for key, value in given.items()]).shapes
    if dry_run:
        from concat_cli.core.prepare.shapes_scene import unseen_split

        facts = {"folder": relative(out)} | given
        console.table(["what", "value"], [(k, str(v)) for k, v in facts.items()])
        console.say(f"unseen: {', '.join(unseen_split(cfg.unseen, cfg.unseen_seed)[1])}")
        return console.dry_run()
    from concat_cli.core.prepare.shapes import prepare_shapes

    prepare_shapes(out, cfg, console.progress)
    keys = [f"data.root={relative(out)}"]
    keys += [f"shapes.{k}={v}" for k, v in given.items() if v != getattr(_DEFAULT, k)]
    console.done({"data": relative(out)}, [f"concat train-con {shlex.join(keys)}"])


def _shapes_command() -> Callable[..., None]:
    options: dict[str, tuple[Any, Any]] = {"out": (_FOLDER, Parameter.empty)}
    for name, (kind, text) in _SHAPES.items():
        default = getattr(_DEFAULT, name)
        default = Pixels(default) if kind is Pixels else default
        options[name] = (_option(kind, text, name), default)
    options["dry_run"] = (DryRun, False)
    return _signed(_shapes, "Draw the built-in world of shapes and textures.", options)


def _command(recipe: Recipe) -> Callable[..., None]:
    """The command of a data set: its folder, the options of its recipe, and those of all."""
    root = Annotated[Path, typer.Argument(help=recipe.root)]
    options: dict[str, tuple[Any, Any]] = {"root": (root, Parameter.empty)}
    of = recipe.options or recipe.find
    hints = get_type_hints(of, include_extras=True)
    for name, parameter in signature(of).parameters.items():
        if name == "root":
            continue
        kind, text = get_args(hints[name])
        options[name] = (_option(kind, text, name), parameter.default)
    for name, (kind, text, default) in _COMMON.items():
        if not (name == "one_part" and recipe.single):
            show = name != "class_split"
            options[name] = (_option(kind, text, name, show_default=show), default)
    options["unseen_pixels"] = (options["unseen_pixels"][0], Pixels(recipe.unseen_pixels))
    return _signed(partial(_prepare, recipe.name), recipe.help, options)


def _prepare(name: str, context: typer.Context) -> None:
    """Prepares a data set with the command's options; those of its recipe go there."""
    from concat_cli.core.prepare.run import Options, prepare_data

    given: dict[str, Any] = dict(context.params)
    root, out = Path(given.pop("root")), given.pop("out")
    options = Options(
        class_split=given.pop("class_split"),
        unseen_pixels=Pixels(given.pop("unseen_pixels")).value,
        dev=given.pop("dev"),
        skip_bad=given.pop("skip_bad"),
        decode=given.pop("decode"),
        one_part=given.pop("one_part", False),
        exif=Exif(exif).value if (exif := given.pop("exif")) else "",
        white=given.pop("white"),
    )
    console = Console()
    out = None if out is None else Path(out)
    report = prepare_data(name, root, out, options, console.progress, **given)
    show(console, report)
    where = relative(report.out)
    config = config_for(report)
    steps = steps_for(report.parts["train"].totals.images)
    fitted = f" optim.steps={steps}" if config == OWN else ""
    root = shlex.quote(f"data.root={where}")
    console.done({"data": where}, [f"concat train-con -c {config} {root}{fitted}"])


def steps_for(images: int) -> int:
    """Steps of training on so many images of one's own: 50 passes, within bounds [ours]."""
    return min(20_000, max(500, 100 * -(-50 * images // (BATCH * 100))))


def config_for(report: Report) -> str:
    """The configuration to train with on what was prepared."""
    if report.source.single:
        return OWN
    if report.source.name == "coco" and report.class_split == "all_seen":
        return "concat_coco_to_ade20k"
    return _CONFIGS.get(report.class_split) or _CONFIGS[report.source.tasks[0]]


def show(console: Console, report: Report) -> None:
    """What was found, what the protocol took away, and what looks odd."""
    rows = [
        (name, t.images, t.segments, t.crowd, f"{100 * t.void / max(1, t.pixels):.1f}%")
        for name, t in ((name, part.totals) for name, part in report.parts.items())
    ]
    console.table(["part", "images", "segments", "crowd", "void pixels"], rows)
    for line in (*_protocol(report), *_annotations(report), *_classes(report)):
        console.say(line)
    for line in (*_kinds(report), *_crowds(report)):
        console.warn(line)
    if bad := sum(map(len, report.bad.values())):
        console.say(f"{bad} faulty images are left out; see {relative(report.out)}/bad.jsonl")
    if report.unchanged:
        console.say("all this was prepared before: nothing is written")


def _protocol(report: Report) -> list[str]:
    seen = len(report.vocabulary.seen_indices)
    taken, unseen = report.taken, len(report.vocabulary) - seen
    things = sum(report.vocabulary.is_thing)
    stuff = len(report.vocabulary) - things
    lines = [f"{report.class_split}: {seen} seen, {unseen} unseen classes"]
    lines.append(f"kinds: {things} things, {stuff} stuff")
    if "panoptic" not in report.source.tasks:
        tasks = ", ".join(report.source.tasks)
        lines.append(f"this truth can score: {tasks}; PQ would mean nothing")
    if not unseen:
        return lines
    held = sorted(((n, name) for name, n in taken.images_by_class.items() if n), reverse=True)
    most = _some([f"{name} {count}" for count, name in held], _SHOWN) or "none"
    if taken.unseen_pixels == "drop":
        lines.append(
            f"drop: {taken.images_dropped} of {taken.images_listed} training images hold an unseen "
            f"class and are left out ({most})"
        )
    else:
        share = 100 * taken.pixels_void / max(1, taken.pixels_listed)
        lines.append(
            f"void: {taken.segments_void} unseen segments of training images, {share:.1f}% of all "
            f"pixels, are void (images: {most})"
        )
    return lines


def _annotations(report: Report) -> list[str]:
    """What became of annotations that left no segment."""
    return [
        f"annotations of {name}: {a.listed} listed, {a.kept} kept, {a.hidden} hidden under others "
        f"({a.double} with the mask of another), {a.empty} empty (no outline, or no pixels)"
        for name, a in report.annotations.items()
        if a.kept < a.listed and name in report.source.parts  # one part may serve as both
    ]


def _kinds(report: Report) -> list[str]:
    """What is odd about which classes are things, where the truth divides them."""
    if "panoptic" not in report.source.tasks:
        return []
    vocabulary, parts = report.vocabulary, report.parts.values()
    lines: list[str] = []
    if len(set(vocabulary.is_thing)) == 1 < len(vocabulary):
        kind = vocabulary.entries[0].kind
        lines.append(
            f"all {len(vocabulary)} classes are {kind}{'s' * (kind == 'thing')}, as tools write it "
            "that do not know better; custom's --kinds says which can be counted"
        )
    several = [max(part.several[i] for part in parts) for i in range(len(vocabulary))]
    odd = [
        f"{entry.name} ({several[i]} images)"
        for i, entry in enumerate(vocabulary.entries)
        if entry.kind == "stuff" and several[i]
    ]
    if odd:
        lines.append(
            f"stuff with several segments in an image: {_some(odd, _SHOWN)}: of stuff a model "
            "gives one; what can be counted is a thing (custom's --kinds)"
        )
    return lines


def _crowds(report: Report) -> list[str]:
    """The classes of which most segments are crowds."""
    found: dict[str, str] = {}
    for part in ("val", "train"):
        counts = report.parts[part]
        rows = zip(report.vocabulary.names, counts.crowds, counts.segments, strict=True)
        found |= {name: f"{n} of {all_} in {part}" for name, n, all_ in rows if 2 * n > all_}
    if not found:
        return []
    most = _some([f"{name} ({counts})" for name, counts in found.items()], _SHOWN)
    return [
        f"all or most segments are crowds: {most}: nothing is learnt from a crowd, and none is "
        "scored; where each is one object, as brush masks of CVAT and Datumaro are, use custom's "
        "--crowds objects"
    ]


def _classes(report: Report) -> list[str]:
    """Which classes are often, seldom or never there."""
    names, train, val = report.vocabulary.names, report.parts["train"], report.parts["val"]
    seen = sorted(report.vocabulary.seen_indices, key=lambda index: train.segments[index])
    there = [
        f"{names[index]} {train.segments[index]} ({train.pixels[index] / sum(train.pixels):.1%})"
        for index in seen
        if train.segments[index]
    ]
    lines: list[str] = []
    if len(there) > 2 * _SHOWN:
        often, seldom = ", ".join(there[: -_SHOWN - 1 : -1]), ", ".join(there[:_SHOWN])
        lines.append(f"segments (pixels) in train: most {often}; fewest {seldom}")
    for part, counts, classes in (("train", train, seen), ("val", val, range(len(names)))):
        absent = [names[index] for index in classes if not counts.segments[index]]
        if absent:
            some = _some(absent, 2 * _SHOWN)
            lines.append(f"{len(absent)} classes have no segment in {part}: {some}")
    return lines


def _some(names: list[str], count: int) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


_COMMANDS = {"shapes": _shapes_command()} | {n: _command(one) for n, one in RECIPES.items()}
for _name, _made in _COMMANDS.items():
    app.command(_name, epilog=epilog(f"prepare-data {_name}"))(_made)
