"""`concat prepare-data`: the built-in world here, data sets on disk in `prepare.py`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from concat_cli.commands import prepare
from concat_cli.commands.options import DryRun
from concat_cli.commands.prepare import Pixels
from concat_cli.console import Console, relative
from concat_cli.core.config import ShapesConfig
from concat_cli.examples import epilog

app = typer.Typer(rich_markup_mode="rich", no_args_is_help=True)
_DEFAULT = ShapesConfig()


@app.command("shapes", epilog=epilog("prepare-data shapes"))
def shapes(
    out: Annotated[Path, typer.Argument(help="Folder of the data set.")],
    unseen: Annotated[str, typer.Option(help='Unseen classes: "striped star; green water".')] = "",
    unseen_seed: Annotated[int, typer.Option(help="Another split of the default's kind.")] = -1,
    unseen_pixels: Annotated[
        Pixels,
        typer.Option(help="void: training scenes hold unseen classes, without a label."),
    ] = Pixels.drop,
    train: Annotated[int, typer.Option(help="Training scenes (seen classes).")] = _DEFAULT.train,
    dev: Annotated[int, typer.Option(help="Scenes for selection (seen classes).")] = _DEFAULT.dev,
    val: Annotated[int, typer.Option(help="Scenes for the score (all classes).")] = _DEFAULT.val,
    size: Annotated[int, typer.Option(help="Side of a scene in pixels.")] = _DEFAULT.size,
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = _DEFAULT.seed,
    dry_run: DryRun = False,
) -> None:
    """Draw the built-in world of shapes and textures."""
    console = Console()
    given = {"train": train, "dev": dev, "val": val, "size": size, "seed": seed}
    given |= {"unseen": unseen, "unseen_seed": unseen_seed, "unseen_pixels": unseen_pixels.value}
    from concat_cli.core.config_file import load_config

    cfg = load_config(None, [f"shapes.{key}={value}" for key, value in given.items()]).shapes
    if dry_run:
        from concat_cli.core.data.shapes_split import unseen_split

        facts = {"folder": relative(out)} | given
        console.table(["what", "value"], [(k, str(v)) for k, v in facts.items()])
        console.say(f"unseen: {', '.join(unseen_split(unseen, unseen_seed)[1])}")
        return console.dry_run()
    from concat_cli.core.data.prepare_shapes import prepare_shapes

    prepare_shapes(out, cfg, console.progress)
    keys = [f"data.root={relative(out)}"]
    keys += [f"shapes.{k}={v}" for k, v in given.items() if v != getattr(_DEFAULT, k)]
    console.done({"data": relative(out)}, [f"concat train-con {shlex.join(keys)}"])


prepare.add_to(app)
