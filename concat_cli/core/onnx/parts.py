"""What some parts of a segmentor become in an ONNX file: the same numbers, faster in ONNX Runtime.

Nothing of a picture's size becomes a constant of the traced graph.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.model.deformable import Sizes
from concat_cli.core.model.layers import FeedForward, PaddedGroupNorm
from concat_cli.core.onnx.needed import needed

_FLOAT = 1  # of TensorProto.DataType


@torch.library.custom_op("concat::weighted_rows", mutates_args=())
def weighted_rows(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Sums of rows of a table (T, d): rows (N, C, heads, n) int32, weights (N, C, heads, 1, n) ->
    (N, C, heads, 1, d). In a file the first dimension is a loop, so that what is read stays in the
    processor's cache."""
    return weights @ table[rows]


@weighted_rows.register_fake
def _(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    return weights.new_empty(*weights.shape[:-1], table.shape[1])


def sample_rows(values: Tensor, sizes: Sizes, places: Tensor, weights: Tensor) -> Tensor:
    """`deformable.sample_bags`: each query and head sums 4 * levels * points rows.

    A border of zeros around each level (one cell before, two after) stands for all outside of it.
    The queries must be as many as the levels' cells, which the coarsest level's number divides.
    """
    batch, queries, heads, _, points, _ = places.shape
    levels = torch.split(values, [h * w for h, w in sizes], 1)
    maps = [torch.unflatten(x, 1, size) for x, size in zip(levels, sizes, strict=True)]
    bordered = [F.pad(x.permute(0, 3, 1, 2, 4), (0, 0, 1, 2, 1, 2)) for x in maps]
    table = torch.cat([x.flatten(2, 3) for x in bordered], 2)  # (B, heads, T', d)

    def per_point(numbers: list[Any]) -> Tensor:
        """A number of each level -> one of each place that a query reads."""
        rows = [torch.full((points,), number, dtype=torch.float32) for number in numbers]
        return torch.cat(rows).repeat(heads)

    areas = [(h + 3) * (w + 3) for h, w in sizes]
    x, y = (places + 0.5).flatten(2, 4).unbind(-1)  # +0.5: the border's +1, less half a cell
    zero = torch.zeros(())
    x = x.clamp(zero, per_point([w + 1 for _, w in sizes]))
    y = y.clamp(zero, per_point([h + 1 for h, _ in sizes]))
    column, row = x.floor(), y.floor()
    pitch = per_point([w + 3 for _, w in sizes])
    first = per_point([sum(areas[:index]) for index in range(len(sizes))])
    head = torch.arange(heads).repeat_interleave(len(sizes) * points) * table.shape[2]
    image = torch.arange(batch)[:, None, None] * (table.shape[2] * heads)
    at = (row * pitch + column).int() + first.int() + (head + image).int()
    beside = at + pitch.int()
    weights = weights.flatten(2)
    below, right = (y - row) * weights, x - column
    above = weights - below
    above_right, below_right = above * right, below * right
    shares = (above - above_right, above_right, below - below_right, below_right)
    many = sizes[0][0] * sizes[0][1]  # as many turns as the coarsest level has cells

    def joined(parts: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([part.view(many, -1, heads, len(sizes) * points) for part in parts], -1)

    rows = joined((at, at + 1, beside, beside + 1))
    mixed = weighted_rows(table.flatten(0, 2), rows, joined(shares)[..., None, :])
    return mixed.view(batch, queries, -1)


def linear(layer: nn.Linear, tokens: Tensor) -> Tensor:
    """A linear layer of rows: one node (Gemm), with its bias."""
    found = F.linear(tokens.flatten(0, -2), layer.weight, layer.bias)
    return found.view(*tokens.shape[:-1], found.shape[-1])


def feed_forward(layer: FeedForward, tokens: Tensor) -> Tensor:
    """Rows all through: the activation becomes part of the first product."""
    rows = tokens.flatten(0, -2)
    rows = F.relu(F.linear(rows, layer.first.weight, layer.first.bias))
    return F.linear(rows, layer.second.weight, layer.second.bias).view(tokens.shape)


def group_norm(layer: PaddedGroupNorm, features: Tensor, padding: Tensor | None) -> Tensor:
    """Sums over the valid area as products with it, and one node that shifts and scales."""
    assert padding is not None, "a file's pictures are padded"
    valid = (~padding).float().flatten(1)[..., None]  # (B, h * w, 1)
    count = valid.sum() * (features.shape[1] // layer.num_groups)

    def mean(maps: Tensor) -> Tensor:
        """(1, C, h, w) -> (C,): of each channel's group."""
        groups = (maps.flatten(2) @ valid).view(layer.num_groups, -1).sum(1) / count
        return groups.repeat_interleave(features.shape[1] // layer.num_groups)

    centred = features - mean(features)[:, None, None]
    variance = mean(centred * centred)
    none = torch.zeros_like(variance)
    return F.batch_norm(centred, none, variance, layer.weight, layer.bias, False, 0.0, layer.eps)


def _weighted_rows(table: Any, rows: Any, weights: Any) -> Any:
    """A Scan over the first dimension of the rows and of their weights."""
    ir, op = needed("onnx_ir"), needed("onnxscript").opset20
    one_rows, one_weights = (
        ir.val(f"{table.name}_{name}", one.dtype, one.shape[1:])
        for name, one in (("rows", rows), ("weights", weights))
    )
    read = ir.node("Gather", [table, one_rows], {"axis": 0})
    mixed = ir.node("MatMul", [one_weights, read.outputs[0]])
    mixed.outputs[0].shape = ir.Shape([*one_weights.shape[:-1], table.shape[1]])
    mixed.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    body = ir.Graph([one_rows, one_weights], mixed.outputs, nodes=[read, mixed], name="bags")
    return op.Scan(rows, weights, body=body, num_scan_inputs=2)


def _sort_stable(self: Any, *, stable: bool, dim: int, descending: bool) -> Any:
    """aten::sort.stable, which the exporter lacks: TopK gives the first of equal values first."""
    op = needed("onnxscript").opset20
    count = op.Shape(self, start=dim, end=dim + 1)
    return op.TopK(self, count, axis=dim, largest=int(descending), sorted=1)


def _attention(query: Any, key: Any, value: Any, attn_mask: Any = None, *_: Any, **__: Any) -> Any:
    """aten::scaled_dot_product_attention; what may not be seen is told once for all heads, and no
    query is without a pixel, which the exporter would look for."""
    op = needed("onnxscript").opset20
    scale = float(query.shape[-1]) ** -0.5
    scores = op.MatMul(op.Mul(query, scale), op.Transpose(key, perm=[0, 1, 3, 2]))
    if attn_mask is not None:
        scores = op.Add(scores, op.Mul(op.Cast(op.Not(attn_mask), to=_FLOAT), -1e30))
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _masked_fill(self: Any, mask: Any, value: Any) -> Any:
    """aten::masked_fill; zeros by a product, as Where is slow where the mask is repeated."""
    op = needed("onnxscript").opset20
    if value == 0:
        return op.Mul(self, op.Cast(op.Not(mask), to=_FLOAT))
    return op.Where(mask, float(value), self)


TRANSLATIONS: dict[Any, Any] = {
    torch.ops.concat.weighted_rows.default: _weighted_rows,
    torch.ops.aten.sort.stable: _sort_stable,
    torch.ops.aten.scaled_dot_product_attention.default: _attention,
    torch.ops.aten.masked_fill.Scalar: _masked_fill,
}
