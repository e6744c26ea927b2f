"""Weights that name pixels: classes in chunks, offsets, no segments, semantic maps on disk."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.config import InferConfig
from concat_cli.core.data.image_io import read_image
from concat_cli.core.errors import UserError
from concat_cli.core.infer.files import predict_paths
from concat_cli.core.vocabulary import ClassEntry, Vocabulary
from concat_cli.methods.clip_zss.predictor import CHUNK, DensePredictor, classify_pixels

WIDTH = 6


class Colours(nn.Module):
    """Features that depend on the pixels below, at stride 4."""

    scale = torch.tensor(20.0)

    def forward(self, images: Tensor, padding: Tensor | None) -> Tensor:
        small = F.avg_pool2d(images.float() / 255, 4)
        return torch.cat([small, small.roll(1, 1) ** 2], 1)  # (B, 6, h, w)


def predictor(classes: int, seen_offset: float = 0.0) -> DensePredictor:
    generator = torch.Generator().manual_seed(0)
    text = F.normalize(torch.randn(classes, WIDTH, generator=generator), dim=1)
    entries = tuple(ClassEntry(f"class {i}", 3 * i, seen=i % 2 == 0) for i in range(classes))
    cfg = InferConfig(size=64, max_size=128, seen_offset=seen_offset)
    return DensePredictor(Colours(), text, Vocabulary(entries), cfg)


def photo(seed: int = 0, size: tuple[int, int] = (50, 70)) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    rows, columns = np.arange(size[0]) * 5 // size[0], np.arange(size[1]) * 7 // size[1]
    return coarse[rows][:, columns]


def naive(features: Tensor, text: Tensor, scale: float, off: Tensor, size, valid):
    """All classes at once, by two resizings of the logits."""
    logits = scale * torch.einsum("ke,ehw->khw", text, features) - off[:, None, None]
    full = F.interpolate(logits[None], scale_factor=4, mode="bilinear", align_corners=False)
    full = F.interpolate(full[..., : valid[0], : valid[1]], size, mode="bilinear")[0]
    best = full.softmax(0).max(0)
    return best.indices, best.values


@pytest.mark.parametrize("classes", [1, 5, CHUNK, CHUNK + 1, 100])
@pytest.mark.parametrize("chunk", [1, 7, CHUNK])
def test_chunks_of_classes_change_nothing(classes: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    features = F.normalize(torch.randn(WIDTH, 8, 12, generator=generator), dim=0)
    text = F.normalize(torch.randn(classes, WIDTH, generator=generator), dim=1)
    off = torch.rand(classes, generator=generator)
    found, sure = classify_pixels(features, text, 9.0, off, (37, 51), (30, 48), chunk, True)
    labels, values = naive(features, text, 9.0, off, (37, 51), (30, 48))
    assert (found != labels).float().mean() < 2e-3  # ties of rounding at most
    assert sure is not None
    torch.testing.assert_close(sure, values, atol=1e-4, rtol=1e-4)
    assert classify_pixels(features, text, 9.0, off, (37, 51), (30, 48), chunk)[1] is None


def test_the_offset_moves_pixels_to_unseen_classes() -> None:
    plain, moved = predictor(8), predictor(8, seen_offset=5.0)
    seen = np.array(plain.vocabulary.is_seen)
    share = [seen[p(photo()).semantic_map].mean() for p in (plain, moved)]
    assert share[1] < share[0]
    (raw,) = plain.raw([photo()])
    assert (plain.semantic(raw, 5.0)[0] == moved(photo()).semantic_map).all()


def test_a_segment_is_all_of_one_class() -> None:
    one = predictor(8)
    found = one(photo())
    assert not found.is_panoptic
    names = [found.vocabulary.names.index(name) for name in found.names]
    assert sorted(names) == sorted(set(found.semantic_map.ravel().tolist()))
    for segment in found.segments:
        inside = found.panoptic_map == segment.id
        assert (found.semantic_map[inside] == segment.class_index).all()
        assert segment.area == inside.sum() and 1 / 8 < segment.score <= 1


def test_pixels_are_classified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(
        "concat_cli.methods.clip_zss.predictor.classify_pixels",
        lambda *given: (calls.append(1), classify_pixels(*given))[1],
    )
    one = predictor(8)
    found, image = one(photo()), photo()
    labels = found.semantic_map
    assert len(calls) == 1 and labels.dtype == np.int32
    (raw,) = one.raw([image])
    assert (one.semantic(raw)[0] == labels).all()
    assert (pickle.loads(pickle.dumps(found)).semantic_map == labels).all()


@pytest.mark.parametrize("ask", ["panoptic", "instances"])
def test_it_says_why_it_has_no_segments(ask: str) -> None:
    one = predictor(3)
    (raw,) = one.raw([photo()])
    with pytest.raises(UserError, match="tell no segments of a class apart") as error:
        getattr(one, ask)(raw)
    assert "--tasks semantic" in error.value.hint


def test_predictions_on_disk_are_maps_of_category_ids(tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(photo()).save(tmp_path / "one.png")
    one = predictor(8)
    predicted = predict_paths(one, [tmp_path / "one.png"], tmp_path / "out")
    assert predicted.index == tmp_path / "out" / "semantic.json" and predicted.index.is_file()
    assert not (tmp_path / "out" / "panoptic").exists()
    written = np.array(Image.open(tmp_path / "out" / "semantic" / "one.png"))
    expected = np.array(one.vocabulary.ids)[one(photo()).semantic_map]
    assert (written == expected).all()
    assert read_image(tmp_path / "out" / "one.overlay.png").shape[2] == 3
    (picture,) = predicted.pictures
    assert {s["category_id"] for s in picture.segments} == set(written.ravel().tolist())
