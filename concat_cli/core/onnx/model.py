"""The model of an ONNX file: a segmentor's final layer, with sizes and classes left open."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from concat_cli.core.config import InferConfig
from concat_cli.core.infer.predictor import DIVISOR
from concat_cli.core.model.deformable import DeformableAttention
from concat_cli.core.model.layers import FeedForward, PaddedGroupNorm, TokenLinear
from concat_cli.core.model.segmentor import Segmentor
from concat_cli.core.onnx.needed import needed
from concat_cli.core.onnx.parts import TRANSLATIONS, feed_forward, group_norm, linear, sample_rows
from concat_cli.core.onnx.steps import after, before

OPSET = 20  # the first one with GridSample as the exporter writes it
NAMES = ("text_embeddings", "class_logits", "mask_logits")
EXAMPLE = (3, 4)  # blocks of DIVISOR pixels of the picture that the model is traced with


class Body(nn.Module):
    """A segmentor whose outputs are those of a single picture's final layer."""

    def __init__(self, segmentor: Segmentor) -> None:
        super().__init__()
        self.segmentor = copy.deepcopy(segmentor).cpu().float().requires_grad_(False)
        for module in self.segmentor.modules():
            if isinstance(module, DeformableAttention):
                module.sampler = sample_rows
            if isinstance(module, TokenLinear):
                cast("Any", module).forward = partial(linear, module)
            if isinstance(module, PaddedGroupNorm):
                cast("Any", module).forward = partial(group_norm, module)
            if isinstance(module, FeedForward):
                cast("Any", module).forward = partial(feed_forward, module)

    def forward(self, images: Tensor, padding: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """As `Segmentor.forward`, of a picture -> class logits (Q, K+1), mask logits (Q, h, w)."""
        found = self.segmentor(images, padding, text, last_only=True)
        return found.class_logits[-1, 0], found.mask_logits[-1, 0]


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
        custom_translation_table=TRANSLATIONS,
        verbose=False,
    )
