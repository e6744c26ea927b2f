"""`concat export`: weights in a form that other programs open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from concat_cli.commands.options import (
    Device,
    DeviceOption,
    Force,
    RunName,
    WeightsFile,
    with_options,
)
from concat_cli.console import Console, relative
from concat_cli.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from concat_cli.core.infer.predictor import Predictor
    from concat_cli.core.model.query_decoder import Decoded
    from concat_cli.core.model.segmentor import Segmentor
    from concat_cli.core.segmentors.export import Seen


class Format(str, Enum):
    """What to write."""

    transformers = "transformers"
    onnx = "onnx"


@dataclass(frozen=True)
class Options:
    """What to export, and as what."""

    out: Annotated[Path, typer.Argument(help="model.onnx, or a folder for transformers.")]
    form: Annotated[
        Format | None,
        typer.Option("--format", help="Default: onnx for a name that ends so, else transformers."),
    ] = None
    vocab: Annotated[
        Path | None,
        typer.Option(help="Classes, one a line: of the head (default: trained), or beside ONNX."),
    ] = None
    pictures: Annotated[
        list[str] | None,
        typer.Option(help="Pictures to fit and test a class head on: file, folder, glob."),
    ] = None
    name: RunName = None
    weights: WeightsFile = None
    device: DeviceOption = Device.auto
    force: Force = False

    @property
    def is_onnx(self) -> bool:
        """Whether ONNX was asked for, by the format or by the name."""
        return self.form is Format.onnx or (self.form is None and self.out.suffix == ".onnx")


@with_options(Options)
def export(asked: Options) -> None:
    """Write weights for other programs."""
    from concat_cli.core.infer.pictures import expand_inputs
    from concat_cli.core.runs import find_weights

    console = Console()
    if asked.is_onnx:
        return _onnx(asked, console)
    paths = expand_inputs(asked.pictures, console.progress) if asked.pictures else []
    found = find_weights(asked.name, asked.weights, vocabulary=asked.vocab)
    console.say(f"weights {relative(found.path)} ({found.reason})")
    from concat_cli.core.build import config_of, restore_segmentor
    from concat_cli.core.checkpoint import open_weights
    from concat_cli.core.infer.predictor import Predictor, named_by
    from concat_cli.core.model.segmentor import Segmentor
    from concat_cli.core.segmentors import export as core

    weights = open_weights(found.path)
    cfg = config_of(weights)
    if cfg.model.segmentor:
        raise UserError(
            f"{found.path} stands on a published segmentor, {cfg.model.segmentor}: no masks of it "
            "are ours to write.",
            "Take that segmentor's own files, or give weights trained without segmentor=.",
        )
    core.check_exportable(cfg.model)
    classes = named_by(weights, asked.vocab)
    classes = classes.seen_only() if asked.vocab is None else classes
    predictor = Predictor.load(
        weights, classes, asked.device.value, force=asked.force, progress=console.progress
    )
    if not isinstance(predictor.model, Segmentor):
        raise UserError(
            f"{found.path} is of stage '{weights.stage}', whose model is no Mask2Former.",
            "Give weights that `concat train-con`, train-cat or finetune made.",
        )
    seen = _seen(predictor, predictor.model, paths) if paths else None
    # anew from the file: the predictor's own is laid out for its device, with batch norms folded
    segmentor, text = restore_segmentor(weights).eval(), predictor.text.cpu()
    if core.is_linear(segmentor):
        head = core.linear_head(segmentor, text, None if seen is None else seen.queries)
        console.say(
            "class head: each query's classes rank as in these weights; how sure it is of the best "
            "can differ, as cosines are not linear"
        )
    elif seen is None:
        raise UserError(
            "The class path of these weights is no linear layer on the query (model.mask_pooling, "
            "or several projector layers), so the class head has to be fitted to pictures.",
            "Add --pictures FOLDER, of some dozen; or train with model.mask_pooling=false and "
            "model.projector_layers=1.",
        )
    else:
        head = core.fitted_head(seen.split()[0])
        console.warn("class head: fitted to the first half of the pictures; masks are exact")
    if seen is not None:
        rest = seen.split()[1]
        share = rest.agreement(head)
        console.say(
            f"best class as in these weights: {share:.1%} of {len(rest.queries)} queries, of the "
            f"second half of {len(paths)} pictures"
        )
    core.write_transformers(asked.out, segmentor, head, classes, (cfg.model, cfg.infer))
    console.done({"folder": relative(asked.out), "classes": str(len(classes))})


def _onnx(asked: Options, console: Console) -> None:
    """One ONNX file, and a JSON with names, their embeddings and thresholds beside it."""
    from concat_cli.core.onnx.file import check_free, segmentor_of, write_onnx
    from concat_cli.core.runs import find_weights

    if asked.pictures:
        raise UserError("ONNX has no class head to fit: its names are an input.", "No --pictures.")
    check_free(asked.out)
    found = find_weights(asked.name, asked.weights, vocabulary=asked.vocab)
    console.say(f"weights {relative(found.path)} ({found.reason})")
    from concat_cli.core.infer.predictor import Predictor

    predictor = Predictor.load(
        found.path, asked.vocab, "cpu", force=asked.force, progress=console.progress
    )
    segmentor_of(predictor)
    console.say("tracing the model takes about a minute")
    written = write_onnx(asked.out, predictor)
    console.done(
        {
            "model": f"{relative(written.model)} (opset {written.opset}, {written.size:.1f} MB)",
            "names": f"{relative(written.about)} ({len(predictor.vocabulary)} classes)",
        },
        ['concat texts names.npz --classes "dog; sky : stuff"'],
    )


def _seen(predictor: Predictor, segmentor: Segmentor, paths: Sequence[Path]) -> Seen:
    """The decoder's queries and the class logits of every picture, in the order of the paths."""
    import torch

    from concat_cli.core.infer.pictures import to_array
    from concat_cli.core.infer.predictor import RawOutput
    from concat_cli.core.segmentors.export import Seen

    kept: list[Tensor] = []
    logits: list[Tensor] = []

    def keep(_: nn.Module, __: object, decoded: Decoded) -> None:
        kept.append(decoded.queries[-1].flatten(0, 1).float().cpu())

    hook = segmentor.query_decoder.register_forward_hook(keep)
    for path in paths:
        for raw in predictor.raw([to_array(path, predictor.cfg.white)]):
            assert isinstance(raw, RawOutput)
            logits.append(raw.class_logits.flatten(0, 1).cpu())
    hook.remove()
    return Seen(torch.cat(kept), torch.cat(logits))
