"""An ONNX file and what one needs to know beside it, in a JSON file of the same name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from concat_cli.core.errors import UserError
from concat_cli.core.files import write_bytes, write_json
from concat_cli.core.infer.predictor import Predictor
from concat_cli.core.model.segmentor import Segmentor
from concat_cli.core.onnx.model import OPSET, onnx_model
from concat_cli.core.onnx.needed import needed


@dataclass(frozen=True)
class Written:
    """The two files; the first one's opset, and how large it is, in megabytes."""

    model: Path
    about: Path
    opset: int
    size: float


def check_free(path: Path) -> None:
    """UserError where one of the files is there already, or a package is not, before any work."""
    for one in (path, path.with_suffix(".json")):
        if one.exists():
            raise UserError(f"{one} is there already.", "Choose another name, or move it away.")
    for package in ("onnx", "onnxscript"):
        needed(package)


def segmentor_of(predictor: Predictor) -> Segmentor:
    """The segmentor that is all there is to a predictor; UserError where there is more to it."""
    if type(predictor) is Predictor and isinstance(predictor.model, Segmentor):
        return predictor.model
    stage = predictor.meta.get("stage", "unknown")
    why = {
        "zegformer": "CLIP's image encoder looks at a crop of each segment, which no graph holds",
        "clip_zss": "it names pixels and finds no segments",
    }.get(str(stage), "its masks are those of a published segmentor, which is not ours to write")
    raise UserError(
        f"{predictor.source} (stage '{stage}') cannot be one ONNX file: {why}.",
        "Give weights that `concat train-con`, train-cat or finetune made with masks of their own.",
    )


def write_onnx(path: Path, predictor: Predictor) -> Written:
    """Writes the file and, beside it, the JSON with the predictor's names, embeddings and
    thresholds; UserError as of `segmentor_of`, and where the system refuses."""
    model = onnx_model(segmentor_of(predictor), predictor.text.cpu(), predictor.cfg)
    content: bytes = model.SerializeToString()
    about = path.with_suffix(".json")
    write_json(about, _about(predictor))
    write_bytes(path, content)
    return Written(path, about, OPSET, len(content) / 1e6)


def _about(predictor: Predictor) -> dict[str, Any]:
    cfg, classes = predictor.cfg, predictor.vocabulary
    clip = predictor.meta["clip"]
    return {
        "opset": OPSET,
        "clip": {key: clip[key] for key in ("model", "pretrained", "sha256")},
        "size": cfg.size,
        "max_size": cfg.max_size,
        "min_score": cfg.min_score,
        "min_mask": cfg.min_mask,
        "overlap": cfg.overlap,
        "joint_stuff": cfg.joint_stuff,
        "seen_offset": cfg.seen_offset,
        "names": classes.names,
        "is_thing": classes.is_thing,
        "is_seen": classes.is_seen,
        "text_embeddings": predictor.text.cpu().tolist(),
    }
