"""A trained segmentor as a folder of `transformers`: a Mask2Former that anybody can open.

Masks and queries are the same. Class logits are not: ours are cosines to text, theirs are linear in
the query. With a projector of one layer W, b and no mask pooling, ours of a class with the
normalised embedding t are

    scale * t.(Wq + b) / |Wq + b|,

so (scale / c) * (tW, t.b) as a linear layer ranks the classes of each query exactly as ours do, for
any c > 0; only how sure it is differs, by |Wq + b| / c. Any other class path is fitted by least
squares to what it says of pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from concat_cli.core.config import InferConfig, ModelConfig
from concat_cli.core.errors import UserError
from concat_cli.core.files import write_bytes, write_json
from concat_cli.core.model.segmentor import Segmentor
from concat_cli.core.model.swin import SWINS
from concat_cli.core.vocabulary import Vocabulary
from concat_cli.core.weights_from.files import RESNETS
from concat_cli.core.weights_from.names import published_names

_PARTS = ("backbone.", "pixel_decoder.", "query_decoder.")
_STAGES = [f"stage{i}" for i in range(1, 5)]
_NO_OBJECT = 0.1  # the library's own default
_RIDGE = 1e-3  # of the least squares, relative to the mean square of the queries


@dataclass(frozen=True)
class Seen:
    """What a segmentor said of pictures: queries (N, D), their class logits (N, K+1)."""

    queries: Tensor
    logits: Tensor

    def split(self) -> tuple[Seen, Seen]:
        """The first half and the second."""
        half = len(self.queries) // 2
        return Seen(self.queries[:half], self.logits[:half]), Seen(
            self.queries[half:], self.logits[half:]
        )

    def agreement(self, head: nn.Linear) -> float:
        """Share of queries whose best class is the same by a linear head."""
        return float((head(self.queries).argmax(-1) == self.logits.argmax(-1)).float().mean())


def check_exportable(cfg: ModelConfig) -> None:
    """UserError where the library's Mask2Former has no place for such a segmentor."""
    name = cfg.backbone.partition(".")[0]
    wrong = {
        f"model.backbone={cfg.backbone}": name not in SWINS and name not in RESNETS,
        f"model.pixel_decoder={cfg.pixel_decoder}": cfg.pixel_decoder != "deformable",
        "model.token_queries=true": cfg.token_queries,
    }
    if any(wrong.values()):
        raise UserError(
            "The Mask2Former of transformers has no place for "
            f"{', '.join(key for key, is_wrong in wrong.items() if is_wrong)}.",
            "Train with model.pixel_decoder=deformable, model.token_queries=false and a "
            f"model.backbone of {', '.join((*RESNETS, *SWINS))}.",
        )


def is_linear(segmentor: Segmentor) -> bool:
    """Whether a linear layer can rank classes as the class path does."""
    return segmentor.mask_pool is None and len(segmentor.projector.layers) == 1


@torch.no_grad()
def linear_head(segmentor: Segmentor, text: Tensor, queries: Tensor | None = None) -> nn.Linear:
    """The linear layer that ranks classes as a linear class path does.

    Args:
        text: (K, E) embeddings of the classes.
        queries: (N, D) to take c from, their mean |Wq + b|. None: what it is on the whole for
            queries whose normalised features are independent, from the decoder's last norm.
    """
    assert is_linear(segmentor)
    layer, classifier = segmentor.projector.last, segmentor.classifier
    no_object = classifier.no_object[None]
    classes = torch.cat((F.normalize(text, dim=-1), no_object))  # (K + 1, E)
    if not classifier.raw_no_object:
        classes = F.normalize(classes, dim=-1)
    if queries is not None:
        length = layer(queries).norm(dim=-1).mean()
    else:
        norm = segmentor.query_decoder.norm
        middle, spread = layer(norm.bias), layer.weight * norm.weight
        length = (middle.square().sum() + spread.square().sum()).sqrt()
    factor = classifier.scale / length.clamp(min=1e-6)
    head = nn.Linear(layer.in_features, len(classes))
    head.weight.copy_(factor * classes @ layer.weight)
    head.bias.copy_(factor * classes @ layer.bias)
    return head


@torch.no_grad()
def fitted_head(seen: Seen) -> nn.Linear:
    """The linear layer that is nearest to class logits in the least squares."""
    queries, logits = seen.queries.cpu().double(), seen.logits.cpu().double()
    middle, level = queries.mean(0), logits.mean(0)
    queries = queries - middle
    ridge = _RIDGE * queries.square().sum() / queries.shape[1]
    gram = queries.T @ queries + ridge * torch.eye(queries.shape[1], dtype=torch.double)
    solved = cast("Tensor", torch.linalg.solve(gram, queries.T @ (logits - level)))
    weight = solved.T  # (K + 1, D)
    head = nn.Linear(weight.shape[1], weight.shape[0])
    head.weight.copy_(weight)
    head.bias.copy_(level - weight @ middle)
    return head


def write_transformers(
    folder: Path,
    segmentor: Segmentor,
    head: nn.Linear,
    vocabulary: Vocabulary,
    cfg: tuple[ModelConfig, InferConfig],
) -> None:
    """Writes config.json, model.safetensors and preprocessor_config.json.

    UserError where the folder is there and not empty, or the system refuses.
    """
    model, infer = cfg
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already.", "Choose another folder, or move it away.")
    tensors = {n: t for n, t in segmentor.state_dict().items() if n.startswith(_PARTS)}
    named = published_names(tensors)
    named |= {f"class_predictor.{n}": t for n, t in head.state_dict().items()}
    weighed = torch.ones(len(vocabulary) + 1)  # of classes in the library's loss
    weighed[-1] = _NO_OBJECT
    named["criterion.empty_weight"] = weighed
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    write_json(folder / "config.json", _config(model, vocabulary), indent=2)
    prepared = _preprocessor(segmentor, infer, vocabulary)
    write_json(folder / "preprocessor_config.json", prepared, indent=2)
    write_bytes(folder / "model.safetensors", save(plain, {"format": "pt"}))


def _config(cfg: ModelConfig, vocabulary: Vocabulary) -> dict[str, Any]:
    labels = [", ".join((e.name, *e.synonyms)) for e in vocabulary.entries]
    return {
        "architectures": ["Mask2FormerForUniversalSegmentation"],
        "model_type": "mask2former",
        "backbone_config": _backbone(cfg.backbone.partition(".")[0]),
        "feature_size": cfg.width,
        "hidden_dim": cfg.width,
        "mask_feature_size": cfg.mask_width,
        "num_attention_heads": cfg.heads,
        "encoder_layers": cfg.encoder_layers,
        "encoder_feedforward_dim": cfg.encoder_ffn,
        "decoder_layers": cfg.decoder_layers + 1,  # there the queries before any layer count, too
        "dim_feedforward": cfg.decoder_ffn,
        "num_queries": cfg.queries,
        "pre_norm": False,
        "common_stride": 4,
        "feature_strides": [4, 8, 16, 32],
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def _backbone(name: str) -> dict[str, Any]:
    if name in SWINS:
        shape = SWINS[name]
        return {
            "model_type": "swin",
            "embed_dim": shape.width,
            "depths": list(shape.depths),
            "num_heads": list(shape.heads),
            "window_size": shape.window,
            "out_features": _STAGES,
        }
    bottleneck, depths = RESNETS[name]
    return {
        "model_type": "resnet",
        "embedding_size": 64,
        "hidden_sizes": [(256 if bottleneck else 64) * 2**i for i in range(4)],
        "depths": list(depths),
        "layer_type": "bottleneck" if bottleneck else "basic",
        "out_features": _STAGES,
    }


def _preprocessor(segmentor: Segmentor, cfg: InferConfig, vocabulary: Vocabulary) -> dict[str, Any]:
    mean, std = segmentor.backbone.mean, segmentor.backbone.std
    return {
        "image_processor_type": "Mask2FormerImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": cfg.size, "longest_edge": cfg.max_size},
        "size_divisor": 32,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [round(float(value), 6) for value in mean.flatten()],
        "image_std": [round(float(value), 6) for value in std.flatten()],
        "ignore_index": 255,
        "num_labels": len(vocabulary),
        "metadata": {"thing_ids": [i for i, thing in enumerate(vocabulary.is_thing) if thing]},
    }
