"""Borrowed masks named by CLIP, from a published folder to files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mask2former_helpers import swin_config, their_model
from panoptic_files import check_panoptic_files
from PIL import Image
from swin_helpers import TOY
from tower_helpers import naive_shares, naive_token, tower_clip

from concat_cli.core.clip.encoder import load_clip
from concat_cli.core.clip.prompts import TEMPLATES
from concat_cli.core.config import ClipConfig
from concat_cli.core.data.transforms import resize_short
from concat_cli.core.errors import UserError
from concat_cli.core.infer.crops import encode_segments
from concat_cli.core.infer.files import predict_paths
from concat_cli.core.infer.predictor import Predictor, at_test
from concat_cli.core.infer.renaming import AnyNames
from concat_cli.core.model.swin import SWINS
from concat_cli.core.segmentors import Proposals
from concat_cli.core.segmentors.source import open_segmentor
from concat_cli.core.weights_from import files as weights_from
from concat_cli.methods.borrowed.config import BorrowedConfig
from concat_cli.methods.borrowed.naming import agreed
from concat_cli.methods.borrowed.predictor import BorrowedPredictor, BorrowedRaw
from concat_cli.methods.borrowed.weights import pair

NAMES = ["person", "settee, sofa", "sky : stuff", "brick wall : stuff", "tram"]
TEXTS = [["person"], ["settee", "sofa"], ["sky"], ["brick wall"], ["tram"]]
OWN = ("person", "car, auto", "sky-other-merged", "wall-brick", "dog", "cat", "tree-merged")
ENOUGH = 0.872  # half of the masks are objects to this degree
MATCHED = {0: 0, 2: 2, 3: 3}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Said(list):
    """A progress that keeps what it is told."""

    say = list.append

    def __getattr__(self, _: str) -> Any:
        return lambda *_, **__: None


@pytest.fixture(scope="module", autouse=True)
def toy() -> Iterator[None]:
    """A backbone small enough for tests is a published one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(weights_from._SWINS, (TOY.width, TOY.depths[2]), "toy")
        patch.setitem(weights_from._SIDES, TOY.window, 128)
        patch.setitem(SWINS, f"swin_toy_patch4_window{TOY.window}_128", TOY)
        yield


@pytest.fixture(scope="module")
def theirs() -> Any:
    """A Mask2Former of transformers."""
    return their_model(swin_config())


@pytest.fixture(scope="module")
def folder(theirs: Any, tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("published")
    theirs.save_pretrained(path)
    said = json.loads((path / "config.json").read_text())
    said["id2label"] = {str(n): name for n, name in enumerate(OWN)}
    (path / "config.json").write_text(json.dumps(said))
    return path


@pytest.fixture(scope="module")
def clip_name(tmp_path_factory: Any) -> str:
    return tower_clip(tmp_path_factory.mktemp("clip"), "vit").identity.model


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    sizes = [(64, 96), (64, 80), (90, 70), (64, 90), (64, 200)]
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def opened(folder: Path, clip: str, *keys: str, **options: Any) -> BorrowedPredictor:
    """The predictor of a pair; half of the masks are objects enough."""
    weights = pair(open_segmentor(str(folder)), ClipConfig(clip, "random", "vild"))
    few = ("infer.size=64", "infer.max_size=96", "infer.batch=4", f"borrowed.min_object={ENOUGH}")
    found = Predictor.load(weights, NAMES, "cpu", overrides=(*few, *keys), **options)
    assert isinstance(found, BorrowedPredictor)
    return found


def test_with_other_names_each_time_a_pair_predicts_as_when_loaded(
    folder: Path, clip_name: str, photos: list[np.ndarray]
) -> None:
    """The text tower, which a predictor of one vocabulary drops, is still there."""
    weights = pair(open_segmentor(str(folder)), ClipConfig(clip_name, "random", "vild"))
    keys = ("infer.size=64", "infer.max_size=96", f"borrowed.min_object={ENOUGH}")
    names = AnyNames(weights, "cpu", overrides=keys)
    for classes in ("; ".join(NAMES), "tram; sky : stuff", "a new name", ""):
        listed = [part.strip() for part in classes.split(";")] if classes else None
        expected = Predictor.load(weights, listed, "cpu", overrides=keys)(photos[0])
        found = names.predictor(names.parsed(classes))(photos[0])
        assert np.array_equal(found.panoptic_map, expected.panoptic_map)
        assert found.names == expected.names


def row_of(raws: Any, position: int) -> tuple[BorrowedRaw, int]:
    """The output that holds a picture, and its row there."""
    return next((raw, raw.positions.index(position)) for raw in raws if position in raw.positions)


def test_the_pair_says_how_it_is_run(folder: Path, clip_name: str) -> None:
    weights = pair(open_segmentor(str(folder)), ClipConfig(clip_name, "random", "vild"))
    cfg = at_test(weights)
    assert cfg.infer.size == 800 and cfg.infer.max_size == 1333
    assert cfg.infer.min_score == 0 and cfg.infer.batch == 1 and cfg.clip.templates == "vild"
    predictor = opened(folder, clip_name)
    assert predictor.needs_clip_image and predictor.tasks == ("panoptic", "semantic", "instance")
    parts = (predictor.segmentor, predictor.naming.clip.model.visual)
    assert predictor.parameters == sum(p.numel() for part in parts for p in part.parameters())


def naive_log_scores(
    way: str, theirs: Any, predictor: BorrowedPredictor, photo: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Q, K) scores and (Q,) objectness of a photo of the padded size: transformers, then CLIP with
    one mask at a time, then the formulas."""
    image = torch.tensor(photo).permute(2, 0, 1)[None]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        out = theirs((image / 255 - mean) / std)
    clip, size = predictor.naming.clip, (image.shape[2], image.shape[3])
    reader = load_clip(ClipConfig(clip.identity.model, "random"))  # the other's text tower is gone
    texts = [
        [F.normalize(reader.encode_text([t.format(name) for t in TEMPLATES["vild"]]).mean(0), dim=0)
         for name in names]
        for names in TEXTS
    ]  # fmt: skip
    view = clip.normalise(clip.resize(image / 255))
    rows: list[torch.Tensor] = []
    for q, mask in enumerate(out.masks_queries_logits[0]):
        if not (mask > 0).any():
            rows.append(torch.full((5,), torch.nan))
            continue
        if way == "pool":
            token = naive_token(clip, view, naive_shares(mask > 0, size, 4))
        else:
            select = torch.tensor([[0, q]])
            masks = out.masks_queries_logits
            (token,) = encode_segments(clip, image, masks, [size], select, "cropmask")
        cosines = torch.stack([max(text @ token for text in several) for several in texts])
        by_clip = (clip.logit_scale * cosines).softmax(0)
        own = out.class_queries_logits[0, q, :-1].softmax(0)
        score = torch.stack(
            [own[MATCHED[k]] ** 0.6 * p**0.4 if k in MATCHED else p for k, p in enumerate(by_clip)]
        )
        rows.append(score / score.sum())
    return torch.stack(rows), 1 - out.class_queries_logits[0].softmax(-1)[:, -1]


@pytest.mark.parametrize("way", ["pool", "crops"])
def test_scores_are_those_of_the_naive_pipeline(
    way: str, theirs: Any, folder: Path, clip_name: str, photos: Any
) -> None:
    predictor = opened(folder, clip_name, f"borrowed.naming={way}")
    expected, objects = naive_log_scores(way, theirs, predictor, photos[0])
    (raw,) = predictor.raw(photos[:1])
    found = predictor.probabilities(raw, 0.0)[0]
    sent = (objects >= ENOUGH) & ~expected.isnan().any(1)
    assert 2 < int(sent.sum()) < len(sent)
    torch.testing.assert_close(
        found[sent, :-1], (expected * objects[:, None])[sent], rtol=0, atol=1e-5
    )
    assert (found[sent, -1] == 0).all()
    assert (found[~sent, :-1] == 0).all() and (found[~sent, -1] == 1).all()


def test_unequal_photos_in_a_batch_give_what_they_give_alone(
    folder: Path, clip_name: str, photos: Any
) -> None:
    predictor = opened(folder, clip_name)
    together = list(predictor.raw(photos))
    assert sorted(len(raw.positions) for raw in together) == [1, 1, 3]
    for position, photo in enumerate(photos):
        (alone,) = predictor.raw([photo])
        raw, row = row_of(together, position)
        torch.testing.assert_close(
            predictor.probabilities(raw, 0.0)[row], predictor.probabilities(alone, 0.0)[0],
            rtol=0, atol=1e-5,
        )  # fmt: skip


def test_an_offset_is_taken_off_known_names(folder: Path, clip_name: str, photos: Any) -> None:
    predictor = opened(folder, clip_name)
    assert predictor.vocabulary.is_seen == tuple(k in MATCHED for k in range(5))
    (raw,) = predictor.raw(photos[:1])
    plain, less = (predictor.probabilities(raw, offset) for offset in (0.0, 1.0))
    sent = plain[..., -1] == 0
    odds = (plain[..., 0] / plain[..., 1] / (less[..., 0] / less[..., 1]))[sent]
    torch.testing.assert_close(odds, torch.full_like(odds, np.e), rtol=1e-4, atol=0)
    torch.testing.assert_close(less.sum(-1), plain.sum(-1))


def test_nothing_is_an_object(folder: Path, clip_name: str, photos: Any) -> None:
    for way in ("pool", "crops"):
        keys = (f"borrowed.naming={way}", "borrowed.min_object=1.0")
        predictor = opened(folder, clip_name, *keys)
        found = predictor(photos[:2])
        assert all(not one.segments and not one.panoptic_map.any() for one in found)


def test_small_masks_are_counted_and_said_once(
    folder: Path, clip_name: str, photos: Any, monkeypatch: Any
) -> None:
    said = Said()
    predictor = opened(folder, clip_name, progress=said)
    forward = predictor.segmentor.forward

    def dotted(images: Any, padding: Any) -> Any:
        found = forward(images, padding)
        masks = torch.full_like(found.mask_logits, -1.0)
        masks[..., 3, 3] = 1.0
        return replace(found, mask_logits=masks)

    monkeypatch.setattr(predictor.segmentor, "forward", dotted)
    predictor(photos[0])
    first = predictor.between
    predictor(photos[0])
    lines = [line for line in said if "hold no cell" in line]
    assert first > 2 and predictor.between == 2 * first
    assert len(lines) == 1 and lines[0].startswith(f"{first} of {first} masks")


def test_another_side_looks_closer(folder: Path, clip_name: str, photos: Any) -> None:
    one, other = (opened(folder, clip_name, f"borrowed.side={side}") for side in (0, 64))
    (a,), (b,) = (predictor.raw(photos[:1]) for predictor in (one, other))
    assert one.pooling is not None and other.pooling is not None
    assert (one.pooling.grid, other.pooling.grid) == (4, 8)
    assert not torch.allclose(one.probabilities(a, 0.0), other.probabilities(b, 0.0), atol=1e-4)


def test_pictures_are_padded_as_the_segmentor_wants_them(
    folder: Path, clip_name: str, photos: Any
) -> None:
    predictor = opened(folder, clip_name)
    plain = predictor(photos[1])
    predictor.segmentor.padded = (96, 96)
    shapes: list[Any] = []
    propose = predictor.segmentor.propose

    def watched(images: torch.Tensor, padding: torch.Tensor | None) -> Proposals:
        shapes.append(tuple(images.shape[2:]))
        return propose(images, padding)

    predictor.segmentor.propose = watched
    found = predictor(photos)
    assert set(shapes) == {(96, 96)}
    assert found[1].panoptic_map.shape == plain.panoptic_map.shape == (64, 80)
    predictor.segmentor.padded = (64, 64)
    with pytest.raises(UserError, match="64x64 at most") as caught:
        predictor(photos[0])
    assert "infer.max_size=64" in caught.value.hint


def test_photos_become_valid_files(
    folder: Path, clip_name: str, photos: Any, tmp_path: Path
) -> None:
    predictor = opened(folder, clip_name, "borrowed.min_object=0.0", "infer.overlap=0.0")
    paths = [tmp_path / f"{n}.png" for n in range(len(photos))]
    for path, photo in zip(paths, photos, strict=True):
        Image.fromarray(photo).save(path)
    predict_paths(predictor, paths, tmp_path / "out")
    found = check_panoptic_files(tmp_path / "out", paths)
    assert found.names == ("person", "settee", "sky", "brick wall", "tram")
    assert found.segments >= len(photos)


def test_the_tiny_clip_names_them_too(folder: Path, photos: Any) -> None:
    weights = pair(open_segmentor(str(folder)), ClipConfig("tiny", "", "vild"))
    keys = ("infer.size=64", "infer.max_size=96")
    predictor = Predictor.load(weights, ["solid star", "red brick"], "cpu", overrides=keys)
    found = predictor(resize_short(photos[0], 64, 96))
    assert found.semantic_map.shape == (64, 96)
    assert {0, 1} >= set(np.unique(found.semantic_map))


def test_the_exponents_are_read(folder: Path, clip_name: str, photos: Any) -> None:
    """Each key of the section changes the scores as the formulas say."""
    keys = ("borrowed.known=1.0", "borrowed.new=1.0")
    predictor = opened(folder, clip_name, *keys)
    (raw,) = predictor.raw(photos[:1])
    assert predictor.naming.way == BorrowedConfig(known=1.0, new=1.0, min_object=ENOUGH)
    sent = raw.objectness[0] < 1  # type: ignore[attr-defined]
    alone = agreed(torch.zeros(1, 7), torch.zeros(1, 5), predictor.matched, predictor.naming.way)
    torch.testing.assert_close(alone.exp(), torch.full((1, 5), 0.2))
    assert sent.any()
