"""The model of an ONNX file: a segmentor's final layer, with sizes and classes left open."""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from concat_cli.core.config import InferConfig
from concat_cli.core.errors import UserError
from concat_cli.core.infer.predictor import DIVISOR
from concat_cli.core.model.deformable import DeformableAttention, Sizes
from concat_cli.core.model.segmentor import Segmentor
from concat_cli.core.onnx.steps import after, before

OPSET = 20  # the first one with GridSample as the exporter writes it
NAMES = ("text_embeddings", "class_logits", "mask_logits")
EXAMPLE = (3, 4)  # blocks of DIVISOR pixels of the picture that the model is traced with


def needed(package: str) -> Any:
    """A package of the `onnx` extra; UserError where it is not installed."""
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        raise UserError(
            f"To write ONNX, {error.name} is needed, and it is not installed.",
            "pip install onnx onnxscript, or concat-seg with its extra [onnx].",
        ) from error


class Body(nn.Module):
    """A segmentor whose outputs are those of a single picture's final layer."""

    def __init__(self, segmentor: Segmentor) -> None:
        super().__init__()
        self.segmentor = copy.deepcopy(segmentor).cpu().float()
        for module in self.segmentor.modules():
            if isinstance(module, DeformableAttention):
                module.sampler = sample_open

    def forward(self, images: Tensor, padding: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """As `Segmentor.forward`, of a picture -> class logits (Q, K+1), mask logits (Q, h, w)."""
        found = self.segmentor(images, padding, text, last_only=True)
        return found.class_logits[-1, 0], found.mask_logits[-1, 0]


def sample_open(values: Tensor, sizes: Sizes, places: Tensor, weights: Tensor) -> Tensor:
    """`sample_reference` without a size that would become a constant in the traced graph, and
    without the samples of all levels in one tensor, which costs ONNX Runtime a copy."""
    batch, _, heads, width = values.shape
    levels = torch.split(values, [h * w for h, w in sizes], dim=1)
    total: Tensor | None = None
    for index, (level, (height, columns)) in enumerate(zip(levels, sizes, strict=True)):
        image = level.permute(0, 2, 3, 1).reshape(batch * heads, width, height, columns)
        x, y = places[:, :, :, index].transpose(1, 2).flatten(0, 1).unbind(-1)
        grid = torch.stack((x * (2 / columns) - 1, y * (2 / height) - 1), -1)
        sampled = F.grid_sample(image, grid, padding_mode="zeros", align_corners=False)
        shares = weights[:, :, :, index].transpose(1, 2).flatten(0, 1)  # (B * heads, Q, P)
        part = (sampled * shares[:, None]).sum(-1)  # (B * heads, d, Q)
        total = part if total is None else total + part
    assert total is not None, "no levels"
    return total.view(batch, heads * width, -1).transpose(1, 2)


def onnx_model(segmentor: Segmentor, text: Tensor, cfg: InferConfig) -> Any:
    """The ONNX model (`onnx.ModelProto`) of a segmentor, preprocessing included.

    text (K, E): embeddings to trace it with; neither K nor any of them is kept.
    """
    ir = needed("onnx_ir")
    needed("onnxscript")
    model: Any = _traced(Body(segmentor).eval(), text).model
    graph = model.graph
    images, padding, embeddings = graph.inputs
    class_logits, mask_logits = graph.outputs
    tape = ir.tape.Tape(graph)

    def op(kind: str, *inputs: Any, **attributes: Any) -> Any:
        values = [
            tape.op("Constant", [], {"value": ir.tensor(one)})
            if isinstance(one, (np.ndarray, np.generic))
            else one
            for one in inputs
        ]
        return tape.op(kind, values, attributes)

    image = ir.val("image", ir.DataType.UINT8, ["height", "width", 3])
    made = before(op, image, cfg)
    for old, new in zip((images, padding), made, strict=False):
        ir.convenience.replace_all_uses_with(old, new)
    embeddings.name, class_logits.name, mask_logits.name = NAMES
    weights = after(op, image, made[2], mask_logits)
    for value, name, side in zip(weights, ("rows", "columns"), ("height", "width"), strict=True):
        value.name, value.type = name, ir.TensorType(ir.DataType.FLOAT)
        value.shape = ir.Shape([side, f"mask_{side}"])
    graph.inputs[:] = [image, embeddings]
    graph.outputs[:] = [class_logits, mask_logits, *weights]
    graph.sort()
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]  # what is between may have no type yet, which is not allowed
    return proto


def _traced(body: Body, text: Tensor) -> Any:
    """The exporter's program, with symbolic sizes."""
    height, width = (DIVISOR * blocks for blocks in EXAMPLE)
    images, padding = torch.rand(1, 3, height, width), torch.zeros(1, height, width) > 0
    h, w = DIVISOR * Dim("h", min=1), DIVISOR * Dim("w", min=1)
    sizes = ({2: h, 3: w}, {1: h, 2: w}, {0: Dim("classes", min=2)})
    program = torch.export.export(body, (images, padding, text), dynamic_shapes=sizes)
    return torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        custom_translation_table={torch.ops.aten.sort.stable: _sort_stable},
        verbose=False,
    )


def _sort_stable(self: Any, *, stable: bool, dim: int, descending: bool) -> Any:
    """aten::sort.stable, which the exporter lacks: TopK gives the first of equal values first."""
    op = needed("onnxscript").opset20
    count = op.Shape(self, start=dim, end=dim + 1)
    return op.TopK(self, count, axis=dim, largest=int(descending), sorted=1)
