"""Which kind of segmentor a name, a folder or a file is, and the kind's own reader."""

from __future__ import annotations

from concat_cli.core.errors import UserError
from concat_cli.core.segmentors import PublishedSegmentor
from concat_cli.core.segmentors.fcclip import FcClip, is_fcclip, open_fcclip
from concat_cli.core.segmentors.files import Files, find_files
from concat_cli.core.segmentors.library import EoMT, MaskFormer, OneFormer, open_library
from concat_cli.core.segmentors.mask2former import open_mask2former
from concat_cli.core.segmentors.sam3 import Sam3, open_sam3
from concat_cli.core.weights_from.names import rename

LIBRARY = {"eomt": EoMT, "oneformer": OneFormer, "maskformer": MaskFormer}  # by model_type
_MARKS = {  # how a tensor's name begins in such a model alone
    "eomt": "upscale_block.",
    "oneformer": "model.task_encoder.",
    "maskformer": "mask_embedder.",
}
_KNOWN = (
    "Known are Mask2Former in the names of transformers and of detectron2, FC-CLIP's decoder, and "
    "EoMT, OneFormer, MaskFormer and SAM 3 as transformers saves them."
)


def open_segmentor(source: str) -> PublishedSegmentor | Sam3:
    """The segmentor of `hf-hub:ORG/NAME`, a folder or a file; by its config.json, else by names.

    Nothing is downloaded. UserError where it is not here, damaged, or of no known kind.
    """
    files = find_files(source)
    kind = files.kind or next(
        (k for k, mark in _MARKS.items() if any(n.startswith(mark) for n in files.tensors)), ""
    )
    name = source.rstrip("/").rpartition("/")[2].lower()
    if kind.startswith("eomt") and "dinov3" in f"{kind} {name}":
        raise UserError(
            f"{source} is an EoMT on DINOv3: what is published are differences to weights that are "
            "given out behind a gate, no weights to run.",
            "Take one on DINOv2, such as hf-hub:tue-mps/coco_panoptic_eomt_large_640.",
        )
    if kind.startswith("sam3"):
        return open_sam3(files.path.parent)
    if kind in LIBRARY:
        if not files.kind:
            raise UserError(
                f"{source} is {LIBRARY[kind].__name__} by its tensors, but no config.json lies "
                "beside it, which tells its sizes.",
                f"Give a folder with both, as transformers saves them ({files.path.name}).",
            )
        return open_library(LIBRARY[kind], files)
    if is_fcclip(files.tensors):
        return open_fcclip(files)
    found = open_mask2former(files) if kind in ("", "mask2former") else None
    return found if found is not None else _refuse(files)


def open_frozen(source: str) -> PublishedSegmentor:
    """As `open_segmentor`, of what stands on its own, whose queries others can be trained on;
    UserError for SAM 3, whose queries depend on a phrase, and FC-CLIP, which stands on a CLIP."""
    found = open_segmentor(source)
    if isinstance(found, PublishedSegmentor) and not isinstance(found, FcClip):
        return found
    why = "its queries are answers to a phrase" if isinstance(found, Sam3) else "it needs its CLIP"
    raise UserError(
        f"Nothing is trained on the queries of {source}: {why}.",
        "Take one that stands on its own, such as segmentor=photos; this one names pictures by "
        "itself (`concat predict --weights ...`).",
    )


def _refuse(files: Files) -> PublishedSegmentor:
    """UserError that says what the files are instead, as far as they tell."""
    made = files.config.get("architectures")
    if isinstance(made, list) and made:
        what = f"It is a {made[0]}"  # pyright: ignore[reportUnknownVariableType]
    elif files.kind:
        what = f"It is of the kind {files.kind}"
    elif (renamed := rename(files.tensors)) is not None and renamed.tensors:
        what = "It holds a backbone"
    else:
        what = f"It holds {len(files.tensors)} tensors, like {min(files.tensors)}"
    raise UserError(
        f"{files.source} holds no panoptic segmentor that is known. {what}.",
        f"{_KNOWN} A backbone, or a model that names pixels alone, has no masks to lend.",
    )
