"""FC-CLIP's decoder: every tensor of it by name and shape, and its formulas by naive loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fcclip_helpers import PUBLISHED, SMALL, clip_of, shapes, tensors
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from concat_cli.core.clip.encoder import Clip, load_clip
from concat_cli.core.config import ClipConfig, InferConfig
from concat_cli.core.errors import UserError
from concat_cli.core.infer.predictor import RawOutput
from concat_cli.core.progress import SILENT
from concat_cli.core.segmentors.fcclip import FcClip, our_names, stages
from concat_cli.core.segmentors.source import open_segmentor
from concat_cli.core.vocabulary_file import parse_names
from concat_cli.methods.borrowed.config import BorrowedConfig
from concat_cli.methods.borrowed.naming import one_by_one
from concat_cli.methods.borrowed.predictor import BorrowedPredictor, Naming


def opened(found: dict[str, Tensor], path: Path) -> FcClip:
    """The decoders of these tensors, from a file."""
    save_file(found, path)
    model = open_segmentor(str(path))
    assert isinstance(model, FcClip)
    return model


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return clip_of(tmp_path_factory.mktemp("clip") / "convnext")


def test_every_published_tensor_has_its_place() -> None:
    """Of the published sizes: 250 queries, 9 layers, on ConvNeXt-L."""
    expected = shapes(**PUBLISHED)
    assert len(expected) == 302
    with torch.device("meta"):
        model = FcClip()
    found = {name: torch.empty(shape, device="meta") for name, shape in expected.items()}
    ours = our_names("it", found)
    assert {n: t.shape for n, t in ours.items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }


def naive_classes(model: FcClip, images: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Class logits of both opinions, one mask at a time: the decoder's, and pooled CLIP's."""
    assert model.clip is not None
    visual, found = model.clip.model.visual, model(images, None)
    pixels = model.clip.normalise(images.float() / 255)
    maps, dense = stages(visual.trunk, pixels)
    features = model.pixel_decoder(maps, None).mask_features
    classes = torch.cat((text, model.void / model.void.norm()))
    scale = min(model.log_scale.exp().item(), 100.0)
    decoder: list[Tensor] = []
    pooled: list[Tensor] = []
    for masks, queries, map4, map32 in zip(
        found.mask_logits, found.queries, features, dense, strict=True
    ):
        for mask, query in zip(masks, queries, strict=True):
            inside = mask > 0
            mean = map4[:, inside].mean(1) if inside.any() else torch.zeros(len(map4))
            vector = model.pooled_proj(model.pooled_norm(mean)) + query
            vector = F.relu(model.class_embed[1](F.relu(model.class_embed[0](vector))))
            vector = model.class_embed[2](vector)
            decoder.append(scale * (classes @ (vector / vector.norm())))
            coarse = F.interpolate(mask[None, None], map32.shape[1:], mode="bilinear")[0, 0] > 0
            mean = map32[:, coarse].mean(1) if coarse.any() else torch.zeros(len(map32))
            pooled.append(F.normalize(visual.head(visual.trunk.head(mean[None, :, None, None])))[0])
    return torch.stack(decoder), torch.stack(pooled)


def test_the_published_size() -> None:
    """79 MiB of fp32, as the hub says."""
    values = sum(torch.Size(shape).numel() for shape in shapes(**PUBLISHED).values())
    assert round(4 * values / 2**20) == 79


def test_class_path_against_a_naive_one(clip: Clip, tmp_path: Path) -> None:
    model = opened(tensors(), tmp_path / "decoder.safetensors")
    model.attach(clip)
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    text = F.normalize(torch.randn(3, 64), dim=-1)
    with torch.no_grad():
        found = model(images, None)
        assert found.embeddings is not None
        logits = model.classify(found.embeddings[:, :, 0], text)
        naive, pooled = naive_classes(model, images, text)
    assert logits.shape == (2, 5, 4)
    torch.testing.assert_close(logits.flatten(0, 1), naive, atol=1e-4, rtol=0)
    of_clip = F.normalize(found.embeddings[:, :, 1], dim=-1)
    torch.testing.assert_close(of_clip.flatten(0, 1), pooled, atol=1e-5, rtol=0)
    assert len(model.vocabulary) == 133


def test_its_trunk_gives_what_open_clip_encodes(clip: Clip) -> None:
    """Pooled over the whole map, the last map through the heads is CLIP's image embedding."""
    pixels = clip.normalise(torch.rand(2, 3, 64, 64))
    visual = clip.model.visual
    dense = stages(visual.trunk, pixels)[1]
    whole = dense.mean((2, 3), keepdim=True)
    found = F.normalize(visual.head(visual.trunk.head(whole)), dim=-1)
    torch.testing.assert_close(found, clip.encode_normalised(pixels), atol=1e-5, rtol=0)


def test_what_lies_in_the_padding_does_not_matter(clip: Clip, tmp_path: Path) -> None:
    model = opened(tensors(), tmp_path / "decoder.safetensors")
    model.attach(clip)
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    padding = torch.zeros(1, 64, 96, dtype=torch.bool)
    padding[..., 64:] = True
    other = images.where(~padding[:, None], 255 - images)
    with torch.no_grad():
        first, second = model(images, padding), model(other, padding)
    assert torch.equal(first.mask_logits, second.mask_logits)
    assert first.embeddings is not None and second.embeddings is not None
    assert torch.equal(first.embeddings, second.embeddings)
    assert first.mask_logits.shape == (1, 5, 16, 24)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("void_embedding.weight"), "void is missing"),
        (lambda t: t.pop("sem_seg_head.predictor.mask_embed.layers.1.bias"), "mask_embedding.2"),
        (
            lambda t: t.update({"sem_seg_head.predictor.extra": torch.zeros(1)}),
            "extra has no place",
        ),
        (
            lambda t: t.update({"sem_seg_head.predictor.query_embed.weight": torch.zeros(4, 256)}),
            "query_position is (4, 256) there and (5, 256) here",
        ),
    ],
)
def test_what_does_not_fit_is_named(change: Any, told: str, tmp_path: Path) -> None:
    found = tensors()
    change(found)
    with pytest.raises(UserError) as error:
        opened(found, tmp_path / "decoder.safetensors")
    assert told in error.value.what


def test_a_clip_that_does_not_fit_is_told(tmp_path: Path, clip: Clip) -> None:
    other = tensors(SMALL | {"channels": (48, 96, 192, 384)})
    model = opened(other, tmp_path / "decoder.safetensors")
    with pytest.raises(UserError, match="does not fit"):
        model.attach(clip)
    with pytest.raises(UserError, match="no ConvNeXt"):
        model.attach(load_clip(ClipConfig()))


def test_predictor_against_the_formulas(clip: Clip, tmp_path: Path) -> None:
    """The ensemble and void as FC-CLIP's paper has them, a mask at a time."""
    model = opened(tensors(), tmp_path / "decoder.safetensors")
    model.attach(clip)
    vocabulary = parse_names(["cat, kitten", "grass : stuff", "unicorn"])
    apart, owner = one_by_one(vocabulary)
    text = F.normalize(torch.randn(len(apart), 64), dim=-1)
    naming = Naming(BorrowedConfig(), clip, owner, SILENT)
    cfg = InferConfig(64, 96, min_score=0.0)
    predictor = BorrowedPredictor(model, text, vocabulary, cfg, naming=naming)
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    raw = next(iter(predictor.raw([image])))
    assert isinstance(raw, RawOutput)
    found = predictor.probabilities(raw, 0.0)[0]
    with torch.no_grad():
        pixels = torch.tensor(image).permute(2, 0, 1)[None]
        decoder, pooled = naive_classes(model, pixels, text)
    for row, own, token in zip(found, decoder, pooled, strict=True):
        by_text = [max(own[0], own[1]), own[2], own[3]]
        void = torch.stack([*by_text, own[4]]).softmax(0)[-1]
        inside = torch.stack(by_text).softmax(0)
        cosines = clip.logit_scale * text @ token
        outside = torch.stack([max(cosines[0], cosines[1]), cosines[2], cosines[3]]).softmax(0)
        share = torch.tensor([0.4, 0.4, 0.8])  # COCO knows cats and grass, and no unicorn
        score = inside ** (1 - share) * outside**share
        expected = torch.cat((score / score.sum() * (1 - void), void[None]))
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)
    assert predictor(image).panoptic_map.shape == (64, 96)
