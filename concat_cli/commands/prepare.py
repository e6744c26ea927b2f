"""`concat prepare-data NAME ROOT` for data sets on disk, and what it says about them."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from concat_cli.console import Console, relative
from concat_cli.examples import epilog

if TYPE_CHECKING:
    from concat_cli.core.data.census import Census
    from concat_cli.core.data.prepare import Report

_SHOWN = 3  # classes that a line names
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


class Pixels(str, Enum):
    """What becomes of unseen classes in training images."""

    drop = "drop"
    void = "void"


Root = Annotated[Path, typer.Argument(help="Folder of the data, unpacked or with its zips.")]
Out = Annotated[Path | None, typer.Option(help="Default: ROOT/concat.")]
Split = Annotated[
    str, typer.Option(help="Unseen classes: a published split or a YAML file.", show_default=False)
]
Dev = Annotated[int | None, typer.Option(help="Images for selection. Default: 2% of train.")]
Unseen = Annotated[
    Pixels,
    typer.Option("--unseen-pixels", help="drop: images with unseen classes leave training."),
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out faulty images: bad.jsonl.")]
Decode = Annotated[bool, typer.Option("--decode", help="Decode images in full, not headers alone.")]
OnePart = Annotated[
    bool, typer.Option("--one-part", help="Where train or val is missing, the other is both.")
]


def add_to(app: typer.Typer) -> None:
    """Registers a command for each data set."""
    commands = {
        "coco": coco,
        "coco-instances": coco_instances,
        "coco-stuff": coco_stuff,
        "voc": voc,
        "pascal-context": pascal_context,
        "ade20k": ade20k,
        "cityscapes": cityscapes,
        "custom": custom,
    }
    for name, function in commands.items():
        app.command(name, epilog=epilog(f"prepare-data {name}"))(function)


def coco(
    context: typer.Context,
    root: Root,
    out: Out = None,
    class_split: Split = "",
    unseen_pixels: Unseen = Pixels.drop,
    dev: Dev = None,
    skip_bad: SkipBad = False,
    decode: Decode = False,
    one_part: OnePart = False,
) -> None:
    """COCO panoptic, 133 classes: train2017, val2017 and panoptic annotations."""
    _prepare("coco", context)


def coco_instances(
    context: typer.Context,
    root: Root,
    out: Out = None,
    class_split: Split = "",
    unseen_pixels: Unseen = Pixels.drop,
    dev: Dev = None,
    skip_bad: SkipBad = False,
    decode: Decode = False,
    one_part: OnePart = False,
    year: Annotated[int, typer.Option(help="2014 or 2017.")] = 2017,
    classes: Annotated[int, typer.Option(help="80, or 65 of the 48/17 split.")] = 80,
) -> None:
    """COCO instances: things alone."""
    _prepare("coco-instances", context)


def coco_stuff(
    context: typer.Context,
    root: Root,
    out: Out = None,
    class_split: Split = "",
    unseen_pixels: Unseen = Pixels.void,
    dev: Dev = None,
    skip_bad: SkipBad = False,
    decode: Decode = False,
    one_part: OnePart = False,
) -> None:
    """COCO-Stuff, 171 classes: stuffthingmaps."""
    _prepare("coco-stuff", context)


def voc(
    context: typer.Context,
    root: Root,
    out: Out = None,
    class_split: Split = "",
    unseen_pixels: Unseen = Pixels.void,
    dev: Dev = None,
    skip_bad: SkipBad = False,
    decode: Decode = False,
    one_part: OnePart = False,
    background: Annotated[
        bool, typer.Option("--background", help="Background is a class, not void.")
    ] = False,
) -> None:
    """PASCAL VOC 2012, 20 classes: SegmentationClassAug, or SegmentationClass."""
    _prepare("voc", context)


def pascal_context(
    context: typer.Context,
    root: Root,
    out: Out = None,
    class_split: Split = "",
    unseen_pixels: Unseen = Pixels.void,
    dev: Dev = None,
    skip_bad: SkipBad = False,
    decode: Decode = False,
    one_part: OnePart = False,
    classes: Annotated[int, typer.Option(help="59 or 459.")] = 59,
) -> None:
    """PASCAL Context: PNGs, or the .mat labels as published."""
    _prepare("pascal-context", context)


def ade20k(
    context: typer.Context,
    root: Root,
    out: Out = None,
    class_split: Split = "",
    unseen_pixels: Unseen = Pixels.void,
    dev: Dev = None,
    skip_bad: SkipBad = False,
    decode: Decode = False,
    one_part: OnePart = False,
    classes: Annotated[int, typer.Option(help="150 or 847.")] = 150,
    task: Annotated[str, typer.Option(help="panoptic or semantic. Default: what is there.")] = "",
) -> None:
    """ADE20K: ADEChallengeData2016 (150 classes) or ADE20K_2021_17_01 (847)."""
    _prepare("ade20k", context)


def cityscapes(
    context: typer.Context,
    root: Root,
    out: Out = None,
    class_split: Split = "",
    unseen_pixels: Unseen = Pixels.void,
    dev: Dev = None,
    skip_bad: SkipBad = False,
    decode: Decode = False,
    one_part: OnePart = False,
) -> None:
    """Cityscapes, 19 classes: leftImg8bit and gtFine."""
    _prepare("cityscapes", context)


def custom(
    context: typer.Context,
    root: Annotated[Path, typer.Argument(help="Folder that the places below are relative to.")],
    images: Annotated[str, typer.Option(help="Folder or zip of the images.")] = "",
    json: Annotated[str, typer.Option(help="COCO JSON: panoptic or of instances.")] = "",
    labels: Annotated[str, typer.Option(help="PNGs of the JSON, or maps of classes.")] = "",
    classes: Annotated[str, typer.Option(help="Names of the values in maps, a line each.")] = "",
    val_images: Annotated[str, typer.Option(help="The same of val; else train is val.")] = "",
    val_json: Annotated[str, typer.Option(help="The same of val.")] = "",
    val_labels: Annotated[str, typer.Option(help="The same of val.")] = "",
    out: Out = None,
    class_split: Split = "",
    unseen_pixels: Unseen = Pixels.drop,
    dev: Dev = None,
    skip_bad: SkipBad = False,
    decode: Decode = False,
) -> None:
    """Your own data: a COCO JSON, label maps with a list of classes, or both."""
    _prepare("custom", context)


def _prepare(name: str, context: typer.Context) -> None:
    """Prepares a data set with the command's options; those of its recipe go there."""
    from concat_cli.core.data.prepare import Options, prepare_data

    given: dict[str, Any] = dict(context.params)
    root, out = Path(given.pop("root")), given.pop("out")
    options = Options(
        class_split=given.pop("class_split"),
        unseen_pixels=Pixels(given.pop("unseen_pixels")).value,
        dev=given.pop("dev"),
        skip_bad=given.pop("skip_bad"),
        decode=given.pop("decode"),
        one_part=given.pop("one_part", False),
    )
    console = Console()
    out = None if out is None else Path(out)
    report = prepare_data(name, root, out, options, console.progress, **given)
    show(console, report)
    where = relative(report.out)
    console.done({"data": where}, [f"concat train-con -c {config_for(report)} data.root={where}"])


def config_for(report: Report) -> str:
    """The configuration to train with on what was prepared."""
    if report.name == "coco" and report.class_split == "all_seen":
        return "concat_coco_to_ade20k"
    return _CONFIGS.get(report.class_split) or _CONFIGS[report.tasks[0]]


def show(console: Console, report: Report) -> None:
    """What was found, what the protocol took away, and what looks odd."""
    rows = [
        (name, t.images, t.segments, t.crowd, f"{100 * t.void / max(1, t.pixels):.1f}%")
        for name, t in ((name, part.totals) for name, part in report.parts.items())
    ]
    console.table(["part", "images", "segments", "crowd", "void pixels"], rows)
    for line in (*_protocol(report), *_classes(report), *_bad(report)):
        console.say(line)
    if report.unchanged:
        console.say("all this was prepared before: nothing is written")


def _protocol(report: Report) -> list[str]:
    seen = len(report.vocabulary.seen_indices)
    taken, unseen = report.taken, len(report.vocabulary) - seen
    lines = [f"{report.class_split}: {seen} seen, {unseen} unseen classes"]
    if "panoptic" not in report.tasks:
        lines.append(f"this truth can score: {', '.join(report.tasks)}; PQ would mean nothing")
    if not unseen:
        return lines
    held = sorted(((n, name) for name, n in taken.images_by_class.items() if n), reverse=True)
    more = ", ..." if len(held) > _SHOWN else ""
    most = ", ".join(f"{name} {count}" for count, name in held[:_SHOWN]) + more or "none"
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


def _classes(report: Report) -> list[str]:
    """Which classes are often, seldom or never there."""
    names, train, val = report.vocabulary.names, report.parts["train"], report.parts["val"]
    seen = sorted(report.vocabulary.seen_indices, key=lambda index: train.segments[index])
    there = [index for index in seen if train.segments[index]]
    lines = []
    if len(there) > 2 * _SHOWN:
        truth = max(1, sum(train.pixels))
        said = {
            index: f"{names[index]} {train.segments[index]} ({train.pixels[index] / truth:.1%})"
            for index in (*there[:_SHOWN], *there[-_SHOWN:])
        }
        often = ", ".join(said[index] for index in reversed(there[-_SHOWN:]))
        seldom = ", ".join(said[index] for index in there[:_SHOWN])
        lines.append(f"segments (pixels) in train: most {often}; fewest {seldom}")
    lines += _absent("train", [names[index] for index in seen if not train.segments[index]])
    lines += _absent("val", _without(val, names))
    return lines


def _without(part: Census, names: Sequence[str]) -> list[str]:
    return [name for name, count in zip(names, part.segments, strict=True) if not count]


def _absent(part: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 2 * _SHOWN} more" if len(names) > 2 * _SHOWN else ""
    shown = ", ".join(names[: 2 * _SHOWN])
    return [f"{len(names)} classes have no segment in {part}: {shown}{more}"]


def _bad(report: Report) -> list[str]:
    count = sum(len(bad) for bad in report.bad.values())
    return [f"{count} faulty images are left out; see {relative(report.out)}/bad.jsonl"] * bool(
        count
    )
