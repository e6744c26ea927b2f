"""A published Mask2Former as our own model, with the class head that training leaves out."""

from __future__ import annotations

import hashlib
import json

from torch import Tensor, nn

from concat_cli.core.build import build_segmentor
from concat_cli.core.config import ModelConfig
from concat_cli.core.model.segmentor import Segmentor
from concat_cli.core.segmentors import Proposals, PublishedSegmentor
from concat_cli.core.vocabulary import ClassEntry, Vocabulary
from concat_cli.core.weights_from import fill_segmentor, fitting_keys, read_tensors
from concat_cli.core.weights_from.hub import weights_file
from concat_cli.core.weights_from.names import CLASS_HEAD, rename


class Mask2Former(PublishedSegmentor):
    """Cheng et al., CVPR 2022, in the names of transformers or of detectron2."""

    def __init__(self, segmentor: Segmentor, class_head: nn.Linear) -> None:
        super().__init__()
        self.segmentor, self.class_head = segmentor, class_head
        self.width, self.count = segmentor.query_decoder.width, segmentor.query_decoder.queries

    def forward(self, images: Tensor, padding: Tensor | None) -> Proposals:
        """See `PublishedSegmentor`."""
        _, pixel = self.segmentor.features(images, padding)
        decoded = self.segmentor.query_decoder(pixel, None, last_only=True)
        queries = decoded.queries[-1]
        return Proposals(decoded.mask_logits[-1].float(), self.class_head(queries).float(), queries)


def open_mask2former(source: str) -> Mask2Former | None:
    """The model of a file, a folder or the hub's cache; None where its tensors are not one's."""
    path = weights_file(source)
    tensors = read_tensors(path)
    renamed = rename(tensors)
    if renamed is None or "query_decoder.level_embedding" not in renamed.tensors:
        return None
    cfg = ModelConfig(**fitting_keys(renamed.tensors), token_queries=False, mask_pooling=False)
    segmentor = build_segmentor(cfg, 1)
    fill_segmentor(segmentor, source, renamed)
    names = {name.rpartition(".")[2]: name for name in renamed.ignored[CLASS_HEAD]}
    weight, bias = tensors[names["weight"]], tensors[names["bias"]]
    class_head = nn.Linear(weight.shape[1], weight.shape[0])
    class_head.load_state_dict({"weight": weight, "bias": bias})
    found = Mask2Former(segmentor, class_head).eval().requires_grad_(False)
    found.source = source
    found.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    beside = path.parent / "config.json"
    labels = json.loads(beside.read_text("utf-8")).get("id2label", {}) if beside.is_file() else {}
    found.vocabulary = Vocabulary(
        tuple(
            ClassEntry(labels.get(str(i), f"class {i}"), i, seen=True)
            for i in range(len(weight) - 1)
        )
    )
    return found
