"""The commands that train: CONCAT's three stages, ZegFormer and CLIP-ZSS."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from concat_cli.commands.options import (
    ConfigFile,
    Device,
    DeviceOption,
    DryRun,
    Force,
    Fresh,
    Name,
    Overrides,
    WeightsFile,
    open_run,
)
from concat_cli.console import Console, duration, relative

if TYPE_CHECKING:
    from concat_cli.core.config import Config
    from concat_cli.core.runs import Run
    from concat_cli.core.train.loop import StageResult


def train_con(
    overrides: Overrides = None,
    config: ConfigFile = None,
    name: Name = None,
    device: DeviceOption = Device.auto,
    fresh: Fresh = False,
    dry_run: DryRun = False,
) -> None:
    """Train the segmentor on seen classes (stage 1, CON)."""
    console = Console()
    cfg, run = open_run("con", config, name, overrides, console)
    if dry_run:
        return show_plan(console, "con", cfg, run)
    from concat_cli.methods.concat.con import train_con as train

    console.say(f"train-con · run {run.name} · seen classes of {cfg.data.root}")
    result = train(cfg, run, device=device.value, fresh=fresh, progress=console.progress)
    show_result(console, result, [f"concat train-cat --name {run.name}"])


def train_cat(
    overrides: Overrides = None,
    config: ConfigFile = None,
    name: Name = None,
    weights: WeightsFile = None,
    device: DeviceOption = Device.auto,
    fresh: Fresh = False,
    dry_run: DryRun = False,
) -> None:
    """Train the generator for unseen classes (stage 2, CAT)."""
    console = Console()
    cfg, run = open_run("cat", config, name, overrides, console)
    if dry_run:
        return show_plan(console, "cat", cfg, run, weights)
    from concat_cli.methods.concat.cat import train_cat as train

    console.say(f"train-cat · run {run.name}")
    result = train(
        cfg, run, weights=weights, device=device.value, fresh=fresh, progress=console.progress
    )
    show_result(console, result, [f"concat finetune --name {run.name}"])


def finetune(
    overrides: Overrides = None,
    vocab: Annotated[
        Path | None, typer.Option(help="Teach these names instead: a class a line.")
    ] = None,
    config: ConfigFile = None,
    name: Name = None,
    weights: WeightsFile = None,
    device: DeviceOption = Device.auto,
    fresh: Fresh = False,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Teach it unseen classes, or any names (stage 3)."""
    console = Console()
    cfg, run = open_run("finetune", config, name, overrides, console)
    if dry_run:
        from concat_cli.core.runs import taught

        stage = "finetune" if vocab is None else taught(vocab)
        return show_plan(console, stage, cfg, run, weights, vocab)
    from concat_cli.methods.concat.finetune import finetune as train

    console.say(f"finetune · run {run.name} · {vocab or 'the unseen classes of the data set'}")
    result = train(
        cfg, run, vocabulary=vocab, weights=weights, device=device.value, fresh=fresh,
        force=force, progress=console.progress,
    )  # fmt: skip
    after = "evaluate" if vocab is None else f"predict photo.jpg --vocab {vocab}"
    show_result(console, result, [f"concat {after} --name {run.name}"])


def train_zegformer(
    overrides: Overrides = None,
    config: ConfigFile = None,
    name: Name = None,
    device: DeviceOption = Device.auto,
    fresh: Fresh = False,
    dry_run: DryRun = False,
) -> None:
    """Train ZegFormer: segments first, then their names."""
    console = Console()
    cfg, run = open_run("zegformer", config, name, overrides, console)
    if dry_run:
        return show_plan(console, "zegformer", cfg, run)
    from concat_cli.methods.zegformer.train import train_zegformer as train

    console.say(f"train-zegformer · run {run.name} · seen classes of {cfg.data.root}")
    result = train(cfg, run, device=device.value, fresh=fresh, progress=console.progress)
    show_result(console, result, [f"concat evaluate --name {run.name}"])


def train_clip_zss(
    overrides: Overrides = None,
    config: ConfigFile = None,
    name: Name = None,
    device: DeviceOption = Device.auto,
    fresh: Fresh = False,
    preview: Annotated[
        Path | None, typer.Option(help="Only write pictures of the pseudo labels to this PNG.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Train CLIP-ZSS: a dense encoder taught by CLIP."""
    console = Console()
    cfg, run = open_run("clip_zss", config, name, overrides, console)
    if dry_run:
        return show_plan(console, "clip_zss", cfg, run)
    from concat_cli.methods.clip_zss.train import train_clip_zss as train

    console.say(f"train-clip-zss · run {run.name} · seen classes of {cfg.data.root}")
    result = train(
        cfg, run, device=device.value, fresh=fresh, preview=preview, progress=console.progress
    )
    if preview is not None:
        return console.done({"pictures": relative(preview)})
    show_result(console, result, [f"concat evaluate --name {run.name}"])


def training_commands() -> dict[str, Callable[..., None]]:
    """The functions of the commands that train, by the commands' names."""
    return {
        "train-con": train_con,
        "train-cat": train_cat,
        "finetune": finetune,
        "train-zegformer": train_zegformer,
        "train-clip-zss": train_clip_zss,
    }


def show_result(console: Console, result: StageResult, following: list[str]) -> None:
    """Where a stage's weights are and what to run next; the same again if it was stopped."""
    facts: dict[str, object] = {
        "weights": relative(result.weights),
        "trained": f"{result.steps} steps in {duration(result.seconds)}",
    }
    facts |= shown_figures(result.figures)
    if not result.finished:
        following = [f"{resume_command()}  # it resumes"]
    console.done(facts, following)


FIGURES = {  # of a stage's last score -> how it is told; what is not here is not told
    "pq": "PQ of seen classes on dev, in percent",
    "miou": "mIoU of seen classes on dev, in percent",
    "ap": "AP of seen classes on dev, in percent",
    "fold_accuracy": "percent of the set-aside classes' queries named right",
    "rest_accuracy": "percent of the other seen classes' queries named right",
}


def shown_figures(figures: dict[str, float]) -> dict[str, object]:
    """The figures that a reader can use, under "dev"; all of them are in metrics.jsonl."""
    told = [f"{100 * figures[key]:.1f} {what}" for key, what in FIGURES.items() if key in figures]
    return {"dev": "; ".join(told)} if told else {}


def resume_command() -> str:
    """This process's command line; --fresh is left out, it would start again."""
    return shlex.join(["concat", *(word for word in sys.argv[1:] if word != "--fresh")])


def show_plan(
    console: Console,
    stage: str,
    cfg: Config,
    run: Run,
    weights: Path | None = None,
    vocabulary: Path | None = None,
) -> None:
    """What a stage would do: every key, the sizes, what it needs, what it would write."""
    from concat_cli.core.config_file import dump_yaml
    from concat_cli.core.train.plan import describe

    console.text(dump_yaml(cfg, full=True))
    plan = describe(stage, cfg, run, weights=weights, vocabulary=vocabulary)
    console.table(["what", "value"], plan.items())
    console.say("dry run: nothing was written")
