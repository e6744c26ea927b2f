"""`concat weights`: what is published, and how it comes here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from concat_cli.commands.options import Json, epilog
from concat_cli.console import Console, relative
from concat_cli.core.errors import UserError

if TYPE_CHECKING:
    from concat_cli.core.weights_from.fetch import Listing
    from concat_cli.core.weights_from.published import Pair

app = typer.Typer()


@app.callback(invoke_without_command=True)
def weights(context: typer.Context, as_json: Json = False) -> None:
    """List published segmentors that name anything in photos."""
    if context.invoked_subcommand is not None:
        return
    from concat_cli.core.weights_from.fetch import state_of
    from concat_cli.core.weights_from.published import CLASSES, TRAINED_ON, pairs

    console = Console(json_only=as_json)
    states = {name: state_of(pair.parts) for name, pair in pairs().items()}
    if as_json:
        found = [asdict(pair) | {"state": states[name] or "no"} for name, pair in pairs().items()]
        return console.json({"trained_on": TRAINED_ON, "classes": CLASSES, "pairs": found})
    rows = [
        [name, pair.purpose, _size(pair.bytes), _licences(pair), states[name] or "no"]
        for name, pair in pairs().items()
    ]
    console.table(["name", "what for", "download", "licence: segmentor; CLIP", "here"], rows)
    console.result(
        f"All segmentors were trained with the labels of all {CLASSES} classes of {TRAINED_ON}: on "
        "the unseen splits of COCO their figures are not zero-shot."
    )
    extra = [name for name, pair in pairs().items() if pair.extra]
    if find_spec("transformers") is None:
        console.result(f"With pip install concat-seg[hub] only: {', '.join(extra)}")
    following = 'concat predict photo.jpg --classes "dog; cat" --weights photos'
    console.done({}, [following if states["photos"] == "here" else "concat weights get photos"])


@app.command("get", epilog=epilog("weights get"))
def get(
    name: Annotated[
        str, typer.Argument(help="A name of `concat weights`, or hf-hub:ORG/NAME of a segmentor.")
    ],
    to: Annotated[
        Path | None, typer.Option("--to", help="Also copy it here, for a machine without network.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="Take it from a folder that --to made.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Also what states no licence.")] = False,
) -> None:
    """Fetch published weights; what has come already is kept."""
    from huggingface_hub import constants

    from concat_cli.core.weights_from.fetch import fetch, lay_out, look_up, take_in
    from concat_cli.core.weights_from.published import parts_of

    console = Console()
    if to is not None and source is not None:
        raise UserError("--to and --from exclude each other.", "Give one of them.")
    cache = relative(Path(constants.HF_HUB_CACHE))
    if source is not None:
        for path in take_in(name, source):
            console.result(relative(path))
        return _done(console, name, cache)
    parts, listed = parts_of(name), look_up(name, force)
    coming = {one.part.repository: one for one in listed}
    rows = [[p.repository, *_about(p.licence, coming.get(p.repository))] for p in parts]
    console.table(["repository", "licence", "download"], rows)
    if listed:
        total = sum(one.bytes for one in listed)
        console.say(f"{_size(total)} to fetch into {cache}; stopped, the same command goes on")
    for one in listed:
        fetch(name, one)
    if to is None:
        return _done(console, name, cache)
    for path in lay_out(name, to):
        console.result(relative(path))
    console.done({"folder": relative(to)}, [f"concat weights get {name} --from {relative(to)}"])


def _about(licence: str, coming: Listing | None) -> Sequence[str]:
    if coming is None:
        return [licence, "here already"]
    return [coming.licence, _size(coming.bytes)]


def _done(console: Console, name: str, cache: str) -> None:
    from concat_cli.core.weights_from.published import pair_of

    pair = pair_of(name)
    lines = [f'concat predict photo.jpg --classes "dog; cat" --weights {name}']
    if pair is not None and pair.extra and find_spec("transformers") is None:
        lines.insert(0, "pip install concat-seg[hub]")
    console.done({"weights": cache}, lines)


def _licences(pair: Pair) -> str:
    return f"{pair.segmentor.licence}; {pair.clip.part.licence}"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
