"""`concat texts`: embeddings of names, for a file that `concat export` wrote."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated

import typer

from concat_cli.commands.options import Force, RunName, WeightsFile, with_options
from concat_cli.console import Console, relative
from concat_cli.core.errors import UserError


@dataclass(frozen=True)
class Options:
    """Whose names, and where to."""

    out: Annotated[Path, typer.Argument(help="File to write, .npz.")]
    classes: Annotated[
        str | None, typer.Option(help='Names: "dog; cat, kitten; grass : stuff".')
    ] = None
    vocab: Annotated[Path | None, typer.Option(help="A file of names, a class a line.")] = None
    name: RunName = None
    weights: WeightsFile = None
    force: Force = False


@with_options(Options)
def texts(asked: Options) -> None:
    """Write the text embeddings of names."""
    from concat_cli.core.runs import find_weights

    console = Console()
    if (asked.classes is None) == (asked.vocab is None):
        raise UserError("No names, or names twice.", "Give one of --classes and --vocab.")
    if asked.out.suffix != ".npz":
        raise UserError(f"{asked.out} does not end in .npz.", "Give such a name.")
    found = find_weights(asked.name, asked.weights, vocabulary=asked.vocab)
    console.say(f"weights {relative(found.path)} ({found.reason})")
    import numpy as np
    import torch

    from concat_cli.core.build import config_of
    from concat_cli.core.checkpoint import open_weights
    from concat_cli.core.clip.prompts import check_names
    from concat_cli.core.files import write_bytes
    from concat_cli.core.infer.predictor import Loading, named_by, told, vocabulary_of
    from concat_cli.core.vocabulary_file import parse_classes

    weights = open_weights(found.path)
    known = vocabulary_of(weights)
    names = asked.vocab if asked.classes is None else parse_classes(asked.classes, known)
    classes, cfg = named_by(weights, names), config_of(weights)
    console.say(told(classes))
    check_names(classes, cfg.clip, asked.force)
    loading = Loading(weights, cfg, classes, torch.device("cpu"), progress=console.progress)
    embeddings = loading.text()
    file = BytesIO()
    np.savez(
        file,
        names=np.array(classes.names),
        text_embeddings=embeddings.numpy(),
        is_thing=np.array(classes.is_thing),
        is_seen=np.array(classes.is_seen),
    )
    write_bytes(asked.out, file.getvalue())
    console.done({"file": relative(asked.out), "classes": str(len(classes))})
