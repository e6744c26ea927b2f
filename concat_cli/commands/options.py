"""Options that several commands share, what they lead to, and the examples of every command."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, fields
from enum import Enum
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_type_hints

import typer
from typer.core import TyperCommand

from concat_cli import __version__
from concat_cli.console import LEVEL, Console, detail, tell_reads
from concat_cli.core.errors import UserError
from concat_cli.core.method import methods, stage_named

if TYPE_CHECKING:
    import torch

    from concat_cli.core.config import Config
    from concat_cli.core.device import Share
    from concat_cli.core.runs import Run

T = TypeVar("T")
KEY_VALUE = "KEY=VALUE"


class Device(str, Enum):
    """Where to compute."""

    auto = "auto"
    cuda = "cuda"
    mps = "mps"
    cpu = "cpu"


def _run_names(begun: str) -> list[str]:
    """Names of runs that a shell may complete to."""
    return sorted(path.name for path in Path("runs").glob("*/") if path.name.startswith(begun))


def _config_names(begun: str) -> list[str]:
    """Names of shipped configurations, or files of that beginning."""
    from concat_cli.core.config_file import SHIPPED

    names = sorted(path.stem for path in SHIPPED.glob("*.yaml") if path.stem.startswith(begun))
    return [*names, *sorted(str(path) for path in Path().glob(f"{begun or '?'}*.yaml"))]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar=KEY_VALUE, help="Config keys, e.g. optim.steps=500."),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        autocompletion=_config_names,
        help="A shipped configuration, such as demo, or a YAML file.",
    ),
]
Name = Annotated[
    str | None,
    typer.Option(
        autocompletion=_run_names, help="Run folder below runs/. Default: the config's name."
    ),
]
RunName = Annotated[
    str | None,
    typer.Option("--name", autocompletion=_run_names, help="Run below runs/. Default: shapes."),
]
DeviceOption = Annotated[Device, typer.Option("--device", help="auto: cuda, else mps, else cpu.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start again; the old folder is kept.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only show the configuration and what would be done.")
]
WeightsFile = Annotated[
    Path | None,
    typer.Option("--weights", help="Other weights than the run's: a file, or of `concat weights`."),
]
Force = Annotated[bool, typer.Option("--force", help="Allow words the built-in CLIP never saw.")]
FILES = "Existing files"  # the panel of options of files that are scored
FilePngs = Annotated[
    Path | None, typer.Option(help="PNGs. Default: as the JSON.", rich_help_panel=FILES)
]
FileSplit = Annotated[
    str | None, typer.Option(help="Which classes are unseen.", rich_help_panel=FILES)
]
PageFile = Annotated[
    Path | None, typer.Option(metavar="FILE.html", help="Also write a page to look at.")
]
PagePhotos = Annotated[
    Path | None,
    typer.Option(help="Photos for --report. Default: by the truth.", rich_help_panel=FILES),
]
Match = Annotated[
    Literal["auto", "id", "name"],
    typer.Option(help="Images by id or file name. auto: id if it fits.", rich_help_panel=FILES),
]
PerClass = Annotated[bool, typer.Option("--per-class", help="Show each class, worst first.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout.")]

EXAMPLES: dict[str, tuple[str, ...]] = {  # by command, but for those of recipes
    "": (
        "concat weights get photos",
        'concat predict photo.jpg --classes "dog; cat" --weights photos',
        "concat train-con && concat train-cat && concat finetune && concat evaluate",
    ),
    "weights": (
        "concat weights",
        "concat weights get photos",
    ),
    "weights get": (
        "concat weights get photos",
        "concat weights get photos --to usb",
        "concat weights get photos --from usb",
    ),
    "prepare-data": (
        "concat prepare-data shapes data/shapes",
        "concat prepare-data coco data/coco",
        "concat prepare-data custom data/own --images photos --json panoptic.json --labels pngs",
    ),
    "prepare-data shapes": (
        "concat prepare-data shapes data/shapes",
        'concat prepare-data shapes data/other --unseen "striped star; green water"',
        "concat prepare-data shapes data/split-1 --unseen-seed 1 --val 1000",
        "concat prepare-data shapes data/shapes-void --unseen-pixels void",
    ),
    "evaluate": (
        "concat evaluate",
        "concat evaluate --name demo --split unseen --json",
        "concat evaluate --name demo --tasks panoptic,semantic,instance --bootstrap 1000",
        "concat evaluate --name demo --calibrate data.root=data/shapes",
        "concat evaluate --weights runs/demo/con/last.safetensors --save scores",
        "concat evaluate --weights photos data.root=data/ade",
        "concat evaluate --predictions scores/panoptic.json "
        "--truth data/shapes/annotations/panoptic_val.json",
        "concat evaluate --predictions scores/panoptic.json "
        "--truth data/shapes/annotations/panoptic_val.json --report page.html",
    ),
    "report": (
        "concat report",
        "concat report --name demo --out demo.html",
    ),
    "predict": (
        'concat predict photo.jpg --classes "dog; cat, kitten; grass : stuff" --weights photos',
        "concat predict photo.jpg --vocab classes.txt",
        "concat predict data/shapes/val --out pictures --min-score 0.3",
        'concat predict "data/shapes/val/*1.png" --json',
    ),
    "serve": (
        "concat serve",
        "concat serve --weights photos --port 8000",
        "concat serve --host 0.0.0.0",
    ),
    "export": (
        "concat export model.onnx",
        "concat export mine --name own",
        "concat export fitted --weights runs/own/con --pictures data/shapes/val",
    ),
    "texts": (
        'concat texts names.npz --classes "striped star; green water : stuff"',
        "concat texts names.npz --name own --vocab classes.txt",
    ),
    "doctor": (
        "concat doctor",
        "concat doctor --data data/shapes --json",
    ),
}
for _method in methods():
    for _command, _lines in _method.examples.items():
        EXAMPLES[_command] = EXAMPLES.get(_command, ()) + _lines


def open_run(
    stage: str, config: Path | None, name: str | None, overrides: list[str] | None, console: Console
) -> tuple[Config, Run]:
    """The run and the configuration of a stage.

    Without `-c`, a later stage takes the configuration of the stage before it in the same run;
    where there is none, the reference configuration of the method is taken.
    """
    from concat_cli.core.config_file import find_config, load_config
    from concat_cli.core.runs import Run, relevant_diff

    method, wanted = stage_named(stage)
    chosen = find_config(config or method.reference)
    run = Run(name or chosen.stem)
    earlier = [run.stage(s.name).config_yaml for s in method.stages[: method.stages.index(wanted)]]
    saved = next((path for path in reversed(earlier) if path.exists()), None)
    if config is None:
        return load_config(saved or chosen, overrides or ()), run
    cfg = load_config(chosen, overrides or ())
    if saved is not None:
        lines = relevant_diff(method.stages[0].name, load_config(saved), cfg)
        if lines:
            console.warn(f"unlike {saved}: {'; '.join(lines)}")
    return cfg, run


def with_options(kind: type[T]) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    """A command of a function that takes one dataclass, whose fields are the command's options."""
    types = get_type_hints(kind, include_extras=True)
    options: dict[str, tuple[Any, Any]] = {
        one.name: (types[one.name], Parameter.empty if one.default is MISSING else one.default)
        for one in fields(kind)  # type: ignore[arg-type]
    }

    def command_of(function: Callable[[T], None]) -> Callable[..., None]:
        def command(**given: Any) -> None:
            function(kind(**given))

        return with_signature(command, function.__doc__, options)

    return command_of


def _level(asked: str, given: bool) -> None:
    if not given:
        return
    if os.environ.get(LEVEL, asked) != asked:
        raise UserError("--quiet and --verbose exclude each other.", "Give one of them.")
    os.environ[LEVEL] = asked
    if asked == "verbose":
        tell_reads()
        detail(f"concat {__version__}, Python {sys.version.split()[0]}, {sys.platform}")


def _quiet(given: bool) -> None:
    _level("quiet", given)


def _verbose(given: bool) -> None:
    _level("verbose", given)


def _levels(
    quiet: Annotated[
        bool,
        typer.Option("--quiet", callback=_quiet, expose_value=False, help="Only results, errors."),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            callback=_verbose,
            expose_value=False,
            help="Also what is read, times, and errors with their traceback.",
        ),
    ] = False,
) -> None: ...


class Once(TyperCommand):
    """A command with `--quiet` and `--verbose`. It says which options of one value, and which
    configuration keys, are given twice: the last one counts, as scripts put lines together from
    several parts."""

    def __init__(self, *given: Any, **how: Any) -> None:
        super().__init__(*given, **how)
        own = typer.Typer(add_completion=False)
        own.command()(_levels)
        there = {name for one in self.params for name in one.opts}
        levels: Any = typer.main.get_command(own)
        self.params += [one for one in levels.params if not there.intersection(one.opts)]

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; its own `--verbose` counts as that of all."""
        _verbose(bool(ctx.params.get("verbose")))
        return super().invoke(ctx)

    def make_parser(self, ctx: Any) -> Any:
        """The parser, whose answer is looked through."""
        parser: Any = super().make_parser(ctx)
        parse = parser.parse_args

        def once(args: list[str]) -> Any:
            options, rest, order = parse(args)
            given = [
                one.opts[0]
                for one in order
                if one.param_type_name == "option" and not (one.multiple or one.is_flag)
            ]
            for one in self.get_params(ctx):
                if one.metavar == KEY_VALUE:
                    given += [text.partition("=")[0] for text in options.get(one.name) or ()]
            for name, times in Counter(given).items():
                if times > 1:
                    what = f"{name} is given {times} times: only the last value counts"
                    Console(json_only=True).warn(what)
            return options, rest, order

        parser.parse_args = once
        return parser


def say_repeats(app: typer.Typer) -> None:
    """Makes every command of the app one of the kind `Once`."""
    for command in app.registered_commands:
        command.cls = Once
    for group in app.registered_groups:
        if group.typer_instance is not None:
            say_repeats(group.typer_instance)


def with_signature(
    command: Callable[..., None], text: str | None, options: Mapping[str, tuple[Any, Any]]
) -> Callable[..., None]:
    """The command with its help, and options by name that Typer reads: (declaration, default)."""
    command.__doc__, command.__annotations__ = text, {}
    vars(command)["__signature__"] = Signature(
        [
            Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in options.items()
        ]
    )
    return command


def check_page_options(report: Path | None, pictures: Path | None) -> None:
    """UserError for a page of no fit name, and for photos without a page."""
    if report is not None:
        from concat_cli.core.evaluate.page.make import check_page

        check_page(report)
    elif pictures is not None:
        raise UserError("--pictures are shown by --report alone.", "Add --report FILE.html.")


def refuse_given(options: Any, names: Collection[str], where: str, hint: str) -> None:
    """UserError for the first of some options of a dataclass that was given though it means nothing
    where something is so."""
    for one in fields(options):
        if one.name in names and getattr(options, one.name) != one.default:
            option = f"--{one.name.replace('_', '-')}"
            shown = KEY_VALUE if one.name == "overrides" else option
            raise UserError(f"{shown} means nothing where {where}.", hint)


def open_share(device: str, console: Console) -> tuple[torch.device, Share]:
    """The device, and this process's share of the pictures under `torchrun`."""
    from concat_cli.core.device import ALONE, Share, choose_device

    chosen, why = choose_device(device)
    console.say(f"device {chosen} ({why})")
    if "WORLD_SIZE" not in os.environ:
        return chosen, ALONE
    from concat_cli.core.train.distributed import gather_objects, join  # torch's is slow to import

    chosen, processes = join(chosen)
    return chosen, Share(processes.rank, processes.world, gather_objects)


def every_example() -> dict[str, tuple[str, ...]]:
    """The examples by command, those of recipes too; the README shows the same."""
    from concat_cli.core.prepare.recipes import RECIPES  # of which other commands have no need

    found: dict[str, tuple[str, ...]] = {}
    for command, lines in EXAMPLES.items():
        found[command] = lines
        if command == "prepare-data shapes":
            found |= {f"prepare-data {one.name}": one.examples for one in RECIPES.values()}
    return found


def epilog(command: str) -> str:
    """The examples of a command as the last block of its help."""
    examples = EXAMPLES if command in EXAMPLES else every_example()
    lines = [f"[dim]$[/dim] {line}" for line in examples[command]]
    return "\n".join(["[bold]Examples[/bold]", *lines])
