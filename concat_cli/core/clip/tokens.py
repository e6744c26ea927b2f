"""CLS tokens of images and of masked segments: the targets of conditional token alignment."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from concat_cli.core.clip.encoder import Clip, ClipIdentity
from concat_cli.core.files import write_error
from concat_cli.core.progress import SILENT, Progress

_PIXELS = 1 << 20  # masked pixels in memory at a time, at least one image
_CROPS = 256  # crops encoded at a time
_DIGEST = 16  # bytes of a key
_SUM = 8  # bytes of a digest of key and row, which stands behind the key
MOST = 4 << 30  # bytes of cached tokens: two million of ViT-B/16


def image_tokens(clip: Clip, images: Tensor, padding: Tensor | None = None) -> Tensor:
    """(B, 3, H, W) uint8 and (B, H, W) bool padding -> (B, E) CLS tokens of whole images.

    Padding (right and below) is cut off first, so that a padded image gives what it gives alone.
    """
    sizes = _valid_sizes(images, padding)
    if all(size == images.shape[-2:] for size in sizes):
        return clip.encode_image(images.float() / 255)
    views = [
        clip.resize(image[None, :, :h, :w].float() / 255)
        for image, (h, w) in zip(images, sizes, strict=True)
    ]
    return clip.encode_image(torch.cat(views))


def segment_tokens(clip: Clip, images: Tensor, masks: Tensor, select: Tensor) -> Tensor:
    """CLS tokens of masked, box-cropped segments, (M, E).

    images (B, 3, H, W) uint8. masks: (B, N, H, W) bool, or a segment map (B, H, W) of ints in which
    segment n has the value n+1. select (M, 2) int64: (image, segment).
    """
    if not len(select):
        return torch.zeros(0, clip.embed_dim, device=clip.device)
    normalised = clip.normalise(images.float() / 255)
    step = max(1, _PIXELS // (images.shape[-2] * images.shape[-1]))
    crops = torch.cat(
        [
            masked_crops(normalised[part[:, 0]], gather_masks(masks, part), clip.image_size)
            for part in torch.split(select, step)
        ]
    )  # (M, 3, size, size)
    return torch.cat([clip.encode_normalised(part) for part in torch.split(crops, _CROPS)])


def gather_masks(masks: Tensor, select: Tensor) -> Tensor:
    """(M, H, W) bool masks of the selected (image, segment) pairs; see `segment_tokens`."""
    image, segment = select.unbind(1)
    if masks.ndim == 3:
        return masks[image] == (segment + 1)[:, None, None]
    return masks[image, segment].bool()


def masked_crops(images: Tensor, masks: Tensor, size: int) -> Tensor:
    """(M, 3, H, W) normalised images and (M, H, W) bool masks -> (M, 3, size, size).

    What lies outside the mask becomes 0, the mean colour; the crop is the square around the mask's
    box, so that shapes keep their proportions. An empty mask gives an empty crop.
    """
    masked = F.pad(images * masks[:, None], (1, 1, 1, 1))  # zeros around the image as well
    from torchvision.ops import roi_align  # with which come torch's compilers: 2 s

    boxes = square_boxes(masks) + 1
    index = torch.arange(len(masks), device=masks.device, dtype=boxes.dtype)[:, None]
    # adaptive sampling averages the pixels under each output pixel, which antialiases
    return roi_align(masked, torch.cat([index, boxes], 1), size, sampling_ratio=-1, aligned=True)


def square_boxes(masks: Tensor) -> Tensor:
    """(M, H, W) bool -> (M, 4) float x0 y0 x1 y1: squares around the masks' boxes, in pixel edges.

    A square may reach beyond the image; the square of an empty mask is one pixel.
    """
    x0, x1 = extent(masks.any(1))
    y0, y1 = extent(masks.any(2))
    half = torch.maximum(x1 - x0, y1 - y0).clamp(min=1) / 2
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return torch.stack([x - half, y - half, x + half, y + half], 1)


def extent(hit: Tensor) -> tuple[Tensor, Tensor]:
    """(M, S) bool -> first hit and one past the last, (M,) float each."""
    last = hit.shape[1] - hit.flip(1).float().argmax(1)
    return hit.float().argmax(1).float(), torch.where(hit.any(1), last, 0).float()


def _valid_sizes(images: Tensor, padding: Tensor | None) -> list[tuple[int, int]]:
    """Height and width of each image without its padding."""
    if padding is None:
        return [(images.shape[-2], images.shape[-1])] * len(images)
    heights: list[int] = (~padding).any(2).sum(1).cpu().numpy().tolist()
    widths: list[int] = (~padding).any(1).sum(1).cpu().numpy().tolist()
    return list(zip(heights, widths, strict=True))


class TokenCache:
    """CLS tokens on disk, addressed by the content of the view (pixels, mask), by CLIP's weights
    and by the precision that it encodes in.

    A view that augmentation changes is another view, so a cached token is never the wrong one; each
    is computed once, unless its row is found changed. Rows are only ever appended, each writer to
    files of its own: several processes may share a folder, and a killed one loses at most the row
    that it was writing.

    Args:
        most: bytes of tokens on disk beyond which this process stores no more; of what is stored
            the keys alone are in memory. Views that are cropped at random seldom come again, and
            would fill any disk.
    """

    def __init__(
        self,
        folder: Path,
        identity: ClipIdentity,
        embed_dim: int,
        dtype: torch.dtype | None = None,
        most: int = MOST,
        progress: Progress = SILENT,
    ) -> None:
        precision = "" if dtype is None else f"-{str(dtype).removeprefix('torch.')}"
        self.folder = Path(folder) / "tokens" / f"{identity.sha256[:40]}{precision}"
        self.embed_dim = embed_dim
        self.hits = self.misses = 0
        self._identity, self._progress = identity, progress
        self._most = most // (4 * embed_dim)  # rows
        self._full = self._damaged = False  # what was said
        self._own = self.folder / f"{uuid.uuid4().hex}.tokens"
        self._place: dict[bytes, tuple[Path, int, bytes]] = {}  # key -> file, row, digest
        listed = [(path.stat().st_mtime_ns, path) for path in self.folder.glob("*.keys")]
        for _, path in sorted(listed):  # of a row that was made again the new one counts
            data, values = path.read_bytes(), path.with_suffix(".tokens")
            size = values.stat().st_size if values.is_file() else 0
            step = _DIGEST + _SUM
            for row in range(min(len(data) // step, size // (4 * embed_dim))):  # none torn
                entry = data[row * step : (row + 1) * step]
                self._place[entry[:_DIGEST]] = (values, row, entry[_DIGEST:])

    def __len__(self) -> int:
        return len(self._place)

    def image_tokens(self, clip: Clip, images: Tensor, padding: Tensor | None = None) -> Tensor:
        """As the function `image_tokens`; only views not cached yet are encoded."""

        def encode(missing: list[int]) -> Tensor:
            pads = None if padding is None else padding[missing]
            return image_tokens(clip, images[missing], pads)

        return self._tokens(clip, view_keys(images, padding), encode)

    def segment_tokens(
        self,
        clip: Clip,
        images: Tensor,
        masks: Tensor,
        select: Tensor,
        padding: Tensor | None = None,
    ) -> Tensor:
        """As the function `segment_tokens`; only segments not cached yet are encoded."""
        keys = segment_keys(images, masks, select, padding)
        return self._tokens(
            clip, keys, lambda missing: segment_tokens(clip, images, masks, select[missing])
        )

    def _tokens(
        self, clip: Clip, keys: list[bytes], encode: Callable[[list[int]], Tensor]
    ) -> Tensor:
        assert clip.identity == self._identity, "the cache belongs to another CLIP"
        rows = np.full((len(keys), self.embed_dim), np.nan, np.float32)
        for i, key in enumerate(keys):
            if key not in self._place:
                continue
            values, row, digest = self._place[key]
            found = np.fromfile(values, np.float32, self.embed_dim, offset=4 * self.embed_dim * row)
            if _sum(key, found) == digest:
                rows[i] = found
            elif not self._damaged:
                self._damaged = True
                self._progress.say(
                    f"CLS tokens in {values} are not as they were written: those are made again"
                )
        absent = ~np.isfinite(rows).all(1)  # not there, or damaged
        missing: list[int] = np.flatnonzero(absent).tolist()
        self.misses += len(missing)
        self.hits += len(keys) - len(missing)
        if missing:
            rows[missing] = encode(missing).detach().float().cpu().numpy()
            self._store([keys[i] for i in missing], rows[missing])
        found = torch.from_numpy(rows)  # pyright: ignore[reportUnknownMemberType]
        return found.to(clip.device)

    def _store(self, keys: list[bytes], rows: np.ndarray) -> None:
        room = self._most - len(self)
        if room < len(keys) and not self._full:
            self._full = True
            found = self.hits / max(1, self.hits + self.misses)
            self._progress.say(
                f"the cache of CLS tokens is full: {self._most:,} views in {self.folder}, where "
                f"{found:.0%} of those asked for were found; further ones are encoded each time. "
                "Views cropped at random seldom come again: source=online spares the disk."
            )
        keys, rows = keys[: max(0, room)], rows[: max(0, room)]
        if not keys:
            return
        entries = [(key, _sum(key, row)) for key, row in zip(keys, rows, strict=True)]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._own.open("ab") as file:  # before the keys
                start = file.tell() // (4 * self.embed_dim)
                file.write(rows.tobytes())
            with self._own.with_suffix(".keys").open("ab") as file:
                file.write(b"".join(key + digest for key, digest in entries))
        except OSError as error:
            raise write_error(self._own, error) from error
        self._place |= {key: (self._own, start + n, d) for n, (key, d) in enumerate(entries)}


def view_keys(images: Tensor, padding: Tensor | None = None) -> list[bytes]:
    """A digest of each image's pixels, its padding left out."""
    pixels = images.cpu().numpy()
    sizes = _valid_sizes(images, padding)
    return [_digest(x[:, :h, :w]) for x, (h, w) in zip(pixels, sizes, strict=True)]


def segment_keys(
    images: Tensor, masks: Tensor, select: Tensor, padding: Tensor | None = None
) -> list[bytes]:
    """A digest of each selected segment: its image's pixels and its mask's."""
    views, sizes = view_keys(images, padding), _valid_sizes(images, padding)
    chosen = gather_masks(masks, select.to(images.device)).cpu().numpy()
    images_of: list[int] = select[:, 0].cpu().numpy().tolist()
    return [
        _digest(np.packbits(mask[: sizes[i][0], : sizes[i][1]]), views[i])
        for i, mask in zip(images_of, chosen, strict=True)
    ]


def _sum(key: bytes, row: np.ndarray) -> bytes:
    return hashlib.blake2b(key + row.tobytes(), digest_size=_SUM).digest()


def _digest(values: np.ndarray, prefix: bytes = b"") -> bytes:
    head = prefix + repr(values.shape).encode()
    return hashlib.blake2b(head + values.tobytes(), digest_size=_DIGEST).digest()
