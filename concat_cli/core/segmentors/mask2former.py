"""A published Mask2Former as our own model, with the class head that training leaves out."""

from __future__ import annotations

from torch import Tensor, nn

from concat_cli.core.build import build_segmentor
from concat_cli.core.config import ModelConfig
from concat_cli.core.errors import UserError
from concat_cli.core.model.segmentor import Segmentor
from concat_cli.core.segmentors import Proposals, PublishedSegmentor
from concat_cli.core.segmentors.files import Files
from concat_cli.core.weights_from.files import RESNETS, StartReport, fill_segmentor, mask2former_in
from concat_cli.core.weights_from.fit import on_paper
from concat_cli.core.weights_from.names import CLASS_HEAD

_HEADS = ("class_predictor.", "sem_seg_head.predictor.class_embed.")
_UNUSED = (".layernorm.weight", ".layernorm.bias", "num_batches_tracked")  # of a backbone's end


class Mask2Former(PublishedSegmentor):
    """Cheng et al., CVPR 2022, in the names of transformers or of detectron2.

    Where pictures are padded, the pixel decoder is told: its points and positions are those of the
    picture alone. `transformers` (5.24) and the authors' code tell theirs nothing, so there a
    picture's masks depend on what it is batched with; without padding they are the same as here.
    """

    def __init__(self, segmentor: Segmentor, class_head: nn.Linear) -> None:
        super().__init__()
        self.segmentor, self.class_head = segmentor, class_head
        self.width, self.count = segmentor.query_decoder.width, segmentor.query_decoder.queries

    def propose(self, images: Tensor, padding: Tensor | None) -> Proposals:
        """See `PublishedSegmentor`."""
        _, pixel = self.segmentor.features(images, padding)
        decoded = self.segmentor.query_decoder(pixel, None, last_only=True)
        queries = decoded.queries[-1]
        return Proposals(decoded.mask_logits[-1].float(), self.class_head(queries).float(), queries)


def open_mask2former(files: Files) -> Mask2Former | None:
    """The model of files; None where their tensors are not one's.

    UserError where tensors are missing, left over or of a shape that does not fit.
    """
    whole = mask2former_in(files.source, files.tensors)
    if whole is None:
        return None
    renamed, keys = whole
    if not keys["backbone"]:
        raise UserError(
            f"{files.source} is a Mask2Former with a backbone that is not built here.",
            f"Built are {', '.join(RESNETS)} and the Swins T, S, B and L with windows of 7 or 12.",
        )
    try:
        cfg = ModelConfig(**keys, token_queries=False, mask_pooling=False)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{files.source} is a Mask2Former of odd sizes: {error}.") from error
    with on_paper(files.tensors):
        fill_segmentor(build_segmentor(cfg, 1), files.source, renamed)
    segmentor = build_segmentor(cfg, 1)
    _check_extra(files.source, fill_segmentor(segmentor, files.source, renamed))
    mean, std = files.colours
    for buffer, values in ((segmentor.backbone.mean, mean), (segmentor.backbone.std, std)):
        buffer.copy_(buffer.new_tensor(values)[:, None, None])
    class_head = _class_head(files, cfg.width, renamed.ignored.get(CLASS_HEAD, []))
    found = Mask2Former(segmentor, class_head).eval().requires_grad_(False)
    files.describe(found, class_head.out_features - 1)
    return found


def _check_extra(source: str, report: StartReport) -> None:
    extra = [n for kind, names in report.ignored.items() if kind != CLASS_HEAD for n in names]
    extra = [name for name in extra if not name.endswith(_UNUSED)]
    if extra:
        raise UserError(
            f"{source} holds {len(extra)} tensors that a Mask2Former of its sizes has no place "
            f"for, like {extra[0]}.",
            "Give weights of a Mask2Former alone, as transformers or detectron2 save it.",
        )


def _class_head(files: Files, width: int, names: list[str]) -> nn.Linear:
    parts = {part: f"{head}{part}" for head in _HEADS for part in ("weight", "bias")
             if f"{head}{part}" in names}  # fmt: skip
    found = {part: files.tensors[name] for part, name in parts.items()}
    shapes = [found[part].shape for part in ("weight", "bias") if part in found]
    if len(shapes) < 2:
        raise UserError(
            f"{files.source} has no class head of one linear layer, so it tells no object from "
            "none.",
            "Give the weights of a whole Mask2Former, with its class head.",
        )
    count = shapes[1][0] if len(shapes[1]) == 1 else 0
    if count < 2 or shapes[0] != (count, width):
        raise UserError(
            f"{files.source} does not fit: its class head is {tuple(shapes[0])} and "
            f"{tuple(shapes[1])}, its queries have width {width}.",
            "Copy the weights again.",
        )
    head = nn.Linear(width, count)
    head.load_state_dict(found)
    return head
