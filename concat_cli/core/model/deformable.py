"""Multi-scale deformable attention: one meaning, several samplers [Deformable DETR, section 4.1].

A sampler takes values (B, T, heads, d) of all levels one after the other, the levels' sizes
[(h, w), ...], places (B, Q, heads, levels, points, 2) as x, y in cells of a level (0 is its left
edge, w its right one), and weights (B, Q, heads, levels, points); it returns (B, Q, heads * d): the
weighted sum of the values read bilinearly at the places, zero outside of a level.
`sample_reference` says what is meant; `sample_bags` is the same, faster on a CPU. Another kernel is
one more function of this signature.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.model.layers import TokenLinear

Sizes = Sequence[tuple[int, int]]
QUERIES = 1024  # read together


def sample_reference(values: Tensor, sizes: Sizes, places: Tensor, weights: Tensor) -> Tensor:
    """The sampler in its plain form, with `grid_sample`; runs on every device."""
    batch, _, heads, width = values.shape
    queries = places.shape[1]
    sampled: list[Tensor] = []
    levels = torch.split(values, [h * w for h, w in sizes], dim=1)
    for index, (level, (height, columns)) in enumerate(zip(levels, sizes, strict=True)):
        image = level.permute(0, 2, 3, 1).reshape(batch * heads, width, height, columns)
        extent = torch.tensor((columns, height), device=places.device)
        grid = places[:, :, :, index].transpose(1, 2).flatten(0, 1) / extent  # (B * heads, Q, P, 2)
        sampled.append(
            F.grid_sample(image, 2 * grid - 1, padding_mode="zeros", align_corners=False)
        )
    stacked = torch.stack(sampled, dim=-2).flatten(-2)  # (B * heads, d, Q, levels * P)
    shares = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    mixed = (stacked * shares).sum(-1)  # (B * heads, d, Q)
    return mixed.view(batch, heads * width, queries).transpose(1, 2)


def _bordered(values: Tensor, sizes: Sizes) -> Tensor:
    """(B, T, heads, d) -> rows (B * T' * heads, d): each level with a border of zeros."""
    levels = torch.split(values.flatten(2), [h * w for h, w in sizes], dim=1)
    bordered = [
        F.pad(torch.unflatten(level, 1, size), (0, 0, 1, 2, 1, 2)).flatten(1, 2)
        for level, size in zip(levels, sizes, strict=True)
    ]
    return torch.cat(bordered, 1).view(-1, values.shape[-1])


def sample_bags(values: Tensor, sizes: Sizes, places: Tensor, weights: Tensor) -> Tensor:
    """The sampler as one `embedding_bag`: each query and head sums 4 * levels * points rows.

    A border of zeros around each level (one cell before, two after) stands for all that is outside.
    Queries are read a thousand at a time: what is between then stays in the processor's cache.
    """
    table, reader = _bordered(values, sizes), _BagReader(sizes, places)
    if torch.compiler.is_compiling():  # as in an export, where their number is open
        return reader.read(table, places, weights)
    parts = zip(torch.split(places, QUERIES, 1), torch.split(weights, QUERIES, 1), strict=True)
    return torch.cat([reader.read(table, *part) for part in parts], 1)


class _BagReader:
    """What reading needs to know of the levels: constants (heads * levels * points) and rows.

    All arithmetic runs over long contiguous rows: broadcasting over short ones is what costs.
    """

    def __init__(self, sizes: Sizes, places: Tensor) -> None:
        batch, _, heads, levels, points, _ = places.shape
        device = places.device

        def per_point(numbers: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            """A constant of each level -> one of each place that a query reads."""
            constant = torch.tensor(numbers, dtype=dtype, device=device)
            return constant[:, None].expand(heads, levels, points).flatten()

        areas = [(h + 3) * (w + 3) for h, w in sizes]
        starts = per_point([sum(areas[:i]) for i in range(levels)], torch.int32)
        head = torch.arange(heads, device=device).repeat_interleave(levels * points)
        image = torch.arange(batch, device=device)[:, None, None] * (sum(areas) * heads)
        self.first = (image + starts * heads + head).int()  # the row of a level's corner
        self.pitch = per_point([w + 3 for _, w in sizes])
        self.down = per_point([(w + 3) * heads for _, w in sizes], torch.int32)
        self.zero = torch.zeros((), device=device)
        self.extents = [per_point([size[side] + 1 for size in sizes]) for side in (1, 0)]  # x, y

    def read(self, table: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        """Rows (B * T' * heads, d), places and weights of a sampler -> (B, Q, heads * d)."""
        batch, queries, heads, levels, points, _ = places.shape
        # +0.5: the border's +1, less 0.5 as cell centres lie at halves; then 0 to extent + 1
        x, y = (
            torch.clamp(place + 0.5, self.zero, extent)
            for place, extent in zip(places.flatten(2, 4).unbind(-1), self.extents, strict=True)
        )  # (B, Q, heads * levels * points)
        column, row = x.detach().floor(), y.detach().floor()
        cells = torch.addcmul(column, row, self.pitch).int()  # exact: fewer than 2**24
        rows = cells * heads + self.first
        beside = rows + self.down
        weights = weights.flatten(2)
        below = (y - row) * weights
        above, right = weights - below, x - column
        above_right, below_right = above * right, below * right
        shares = (above - above_right, above_right, below - below_right, below_right)
        bags = (batch * queries * heads, levels * points)
        mixed = F.embedding_bag(
            torch.cat([at.reshape(bags) for at in (rows, rows + heads, beside, beside + heads)], 1),
            table,
            mode="sum",
            per_sample_weights=torch.cat([share.reshape(bags) for share in shares], 1),
        )
        return mixed.view(batch, queries, -1)


def sample(values: Tensor, sizes: Sizes, places: Tensor, weights: Tensor) -> Tensor:
    """The faster sampler for the device the values are on."""
    sampler = sample_bags if values.device.type == "cpu" else sample_reference
    return sampler(values, sizes, places, weights)


def reference_points(sizes: Sizes, valid: Tensor) -> Tensor:
    """Centres of all cells of all levels, seen from each level: (B, T, 1, levels, 1, 2).

    x, y in cells. valid (B, levels, 2): how many columns and rows of a level are not padding. A
    centre keeps its relative place within the valid area.
    """
    relative: list[Tensor] = []
    for level, (height, width) in enumerate(sizes):
        y = torch.arange(height, device=valid.device, dtype=torch.float32) + 0.5
        x = torch.arange(width, device=valid.device, dtype=torch.float32) + 0.5
        x = x / valid[:, level, 0, None]  # (B, w)
        y = y / valid[:, level, 1, None]  # (B, h)
        grid = (x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width))
        relative.append(torch.stack(grid, -1).flatten(1, 2))  # (B, h*w, 2)
    return (torch.cat(relative, 1)[:, :, None] * valid[:, None])[:, :, None, :, None]


def softmax_of_few(logits: Tensor) -> Tensor:
    """Softmax over the last dimension in plain steps: five times faster there on a CPU."""
    shares = (logits - logits.detach().amax(-1, keepdim=True)).exp()
    return shares / shares.sum(-1, keepdim=True)


class DeformableAttention(nn.Module):
    """Each query reads a few points around its reference point on every level."""

    def __init__(self, width: int, heads: int, levels: int = 3, points: int = 4) -> None:
        super().__init__()
        assert width % heads == 0, "width must be a multiple of heads"
        self.shape = (heads, levels, points)
        self.sampler = sample
        self.offsets = TokenLinear(width, heads * levels * points * 2)
        self.weights = TokenLinear(width, heads * levels * points)
        self.value = TokenLinear(width, width)
        self.out = TokenLinear(width, width)
        self._initialise()

    def _initialise(self) -> None:
        """Heads look into different directions, points at growing distances, weights are equal."""
        heads, levels, points = self.shape
        angle = torch.arange(heads) * (2 * math.pi / heads)
        direction = torch.stack((angle.cos(), angle.sin()), -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # (heads, 2)
        distance = torch.arange(1, points + 1)[:, None]
        offsets = (direction[:, None, None] * distance).expand(heads, levels, points, 2)
        with torch.no_grad():
            self.offsets.bias.copy_(offsets.flatten())
        for weight in (self.offsets.weight, self.weights.weight, self.weights.bias):
            nn.init.zeros_(weight)
        for layer in (self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        queries: Tensor,
        values: Tensor,
        references: Tensor,
        sizes: Sizes,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Queries (B, Q, D), values (B, T, D), references (B or 1, Q, ...) -> (B, Q, D).

        references: x, y in cells, of a shape that fits (heads, levels, points, 2). padding (B, T):
        tokens that count as zero. Places and sampling are fp32 even in autocast.
        """
        heads, levels, points = self.shape
        values = self.value(values)
        if padding is not None:
            values = values.masked_fill(padding[..., None], 0.0)
        offsets = self.offsets(queries).float().unflatten(-1, (heads, levels, points, 2))
        weights = self.weights(queries).float().unflatten(-1, (heads, levels * points))
        weights = torch.unflatten(softmax_of_few(weights), -1, (levels, points))
        values = torch.unflatten(values.float(), -1, (heads, -1))
        mixed = self.sampler(values, sizes, references + offsets, weights)
        return self.out(mixed.to(queries.dtype))
