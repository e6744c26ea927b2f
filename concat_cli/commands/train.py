"""The commands that train, made from the table of stages."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from concat_cli.commands.options import (
    ConfigFile,
    Device,
    DeviceOption,
    DryRun,
    Fresh,
    Name,
    Overrides,
    WeightsFile,
    open_run,
    with_signature,
)
from concat_cli.console import Console, duration, rank, relative
from concat_cli.core.method import Stage, loaded, stages

if TYPE_CHECKING:
    from concat_cli.core.train.loop import StageResult

Vocabulary = Annotated[
    Path | None, typer.Option("--vocab", help="Teach these names instead: a class a line.")
]
Preview = Annotated[
    Path | None, typer.Option(help="Only write pictures of what is learned from to this PNG.")
]
GoOn = Annotated[
    bool, typer.Option("--force", help="Allow unfinished weights, and words CLIP never saw.")
]
Log = Annotated[
    Literal["tensorboard", "wandb"] | None,
    typer.Option(help="Also send the metrics there while training."),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="With --dry-run: every key as well.")]
SHARED = {  # declaration, default
    "overrides": (Overrides, None),
    "config": (ConfigFile, None),
    "name": (Name, None),
    "device": (DeviceOption, Device.auto),
    "fresh": (Fresh, False),
    "dry_run": (DryRun, False),
    "log": (Log, None),
    "verbose": (Verbose, False),
}
OWN = {  # of `Stage.options`
    "weights": (WeightsFile, None),
    "vocabulary": (Vocabulary, None),
    "force": (GoOn, False),
    "preview": (Preview, None),
}


def training_commands() -> dict[str, Callable[..., None]]:
    """A function for each stage of each method, by the name of its command."""
    return {stage.command: _command(stage) for _, stage in stages() if stage.command}


def _command(stage: Stage) -> Callable[..., None]:
    def command(**given: Any) -> None:
        _train(stage, given)

    return with_signature(command, stage.help, SHARED | {name: OWN[name] for name in stage.options})


def _train(stage: Stage, given: dict[str, Any]) -> None:
    from concat_cli.core.runs import unread

    console = Console()
    cfg, run = open_run(stage.name, given["config"], given["name"], given["overrides"], console)
    for note in unread(stage.name, (text.partition("=")[0] for text in given["overrides"] or ())):
        console.warn(note)
    own = {name: given[name] for name in stage.options}
    vocabulary, preview = own.get("vocabulary"), own.get("preview")
    if given["dry_run"]:
        from concat_cli.core.config_file import dump_yaml
        from concat_cli.core.runs import taught
        from concat_cli.core.train.plan import describe

        part = stage.name if vocabulary is None else taught(vocabulary)
        weights, force = own.get("weights"), own.get("force", False)
        plan = describe(part, cfg, run, weights=weights, vocabulary=vocabulary, force=force)
        if given["verbose"]:
            console.text(dump_yaml(cfg, full=True))
        console.table(["what", "value"], plan.items())
        return console.say("dry run: nothing was written; --verbose shows every key")
    told = f"data {cfg.data.root}" if vocabulary is None else f"names of {vocabulary}"
    console.say(f"{stage.command} · run {run.name} · {told}")
    with ExitStack() as stack:
        if not rank():
            stack.enter_context(run.alone(console.warn))
            if given["log"]:
                from concat_cli.core.train.live import LOGS

                console.progress.listener = stack.enter_context(LOGS[given["log"]](run.name))
        result: StageResult = loaded(stage.train)(
            cfg,
            run,
            device=given["device"].value,
            fresh=given["fresh"],
            progress=console.progress,
            **own,
        )
    if preview is not None:
        return console.done({"pictures": relative(preview)})
    after = stage.following if has_unseen(result.weights) else "evaluate"
    if vocabulary is not None:
        after = f"predict photo.jpg --vocab {vocabulary}"
    if result.finished and result.began >= result.steps and given["overrides"]:
        console.warn(
            f"all {result.steps} steps were done before, so {' '.join(given['overrides'])} changed "
            "nothing here; --fresh trains again"
        )
    show_result(console, result, [f"concat {after} --name {run.name}"])
    if not result.finished:
        raise typer.Exit(128 + result.signal)


def has_unseen(weights: Path) -> bool:
    """Whether weights were made for classes that had no labels; also where there are none yet."""
    from concat_cli.core.checkpoint import read_meta

    return not weights.is_file() or not all(e["seen"] for e in read_meta(weights)["vocabulary"])


def show_result(console: Console, result: StageResult, following: list[str]) -> None:
    """Where a stage's weights are and what to run next; the same again if it was stopped."""
    facts: dict[str, object] = {}
    if result.weights.exists():
        facts["weights"] = relative(result.weights)
    facts["trained"] = f"{result.steps} steps in {duration(result.seconds)}"
    figures = result.figures
    told = [f"{100 * figures[key]:.1f} {what}" for key, what in FIGURES.items() if key in figures]
    if told:
        facts["dev"] = "; ".join(told)
    if not result.finished:
        following = [f"{resume_command()}  # it resumes"]
    console.done(facts, following, stopped=not result.finished)


FIGURES = {  # of a stage's last score -> how it is told; all of them are in metrics.jsonl
    "pq": "PQ of seen classes on dev, in percent",
    "miou": "mIoU of seen classes on dev, in percent",
    "ap": "AP of seen classes on dev, in percent",
    "fold_accuracy": "percent of the set-aside classes' queries named right",
    "rest_accuracy": "percent of the other seen classes' queries named right",
}


def resume_command() -> str:
    """This process's command line; --fresh is left out, it would start again."""
    return shlex.join(["concat", *(word for word in sys.argv[1:] if word != "--fresh")])
