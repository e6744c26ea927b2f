"""ZegFormer's weights on disk: free vocabularies, and the prompts of the image branch."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clip_helpers import random_clip
from torch import Tensor

from concat_cli.core.checkpoint import save_weights
from concat_cli.core.clip.encoder import Clip
from concat_cli.core.clip.prompts import TEMPLATES
from concat_cli.core.config import ClipConfig, Config, InferConfig, ModelConfig
from concat_cli.core.config_file import to_dict
from concat_cli.core.errors import UserError
from concat_cli.core.infer.predictor import Predictor, RawOutput
from concat_cli.core.vocabulary import ClassEntry, Vocabulary
from concat_cli.methods.zegformer import AT_TEST
from concat_cli.methods.zegformer import TRAINED as TRAINED_KEYS
from concat_cli.methods.zegformer.config import MASKED_PROMPTS, ZegFormerConfig
from concat_cli.methods.zegformer.maskformer import build_zegformer
from concat_cli.methods.zegformer.predictor import ZegFormerPredictor

TRAINED, HIDDEN, NEW = "solid star", "dotted star", "striped zebra"  # HIDDEN: of the data set
CLASSES = Vocabulary((ClassEntry("red brick", 1), ClassEntry(TRAINED, 2), ClassEntry(HIDDEN, 3)))
MODEL = ModelConfig(width=32, mask_width=32, heads=4, decoder_layers=1, decoder_ffn=32, queries=6)
Prompts = tuple[str, ...]
SAME, MASKED = TEMPLATES["imagenet_select"], MASKED_PROMPTS


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return random_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    path = tmp_path / "names.txt"
    path.write_text("".join(f"{name}\n" for name in (HIDDEN, TRAINED, NEW)))
    return path


def written(path: Path, clip: Clip, way: ZegFormerConfig) -> Path:
    """A weights file with random weights; every query is sent to CLIP."""
    own = ClipConfig(clip.identity.model, clip.identity.pretrained, templates="imagenet_select")
    cfg = replace(Config(), clip=own, model=MODEL, infer=InferConfig(size=64, max_size=128))
    cfg = cfg.with_own(replace(way, skip_below=0.0))
    torch.manual_seed(0)
    state = build_zegformer(cfg, clip.embed_dim).state_dict()
    meta = {"format": 1, "stage": "zegformer", "config": to_dict(cfg),
            "vocabulary": CLASSES.to_json(), "trained": ["red brick", TRAINED],
            "clip": asdict(clip.identity)}  # fmt: skip
    save_weights(path, {f"segmentor.{name}": value for name, value in state.items()}, meta)
    return path


def raw_of(predictor: Predictor) -> RawOutput:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (raw,) = predictor.raw([image])
    assert isinstance(raw, RawOutput) and raw.image_logits is not None
    return raw


def embedded(clip: Clip, prompts: Prompts) -> Tensor:
    """(3, E): each name in each prompt, one after another."""
    rows = []
    for name in (HIDDEN, TRAINED, NEW):
        texts = [clip.encode_text([prompt.format(name)])[0] for prompt in prompts]
        rows.append(torch.stack([text / text.norm() for text in texts]).mean(0))
    return F.normalize(torch.stack(rows), dim=1)


def test_names_of_a_file_are_seen_where_they_were_trained(
    clip: Clip, vocabulary: Path, tmp_path: Path
) -> None:
    """And the fusion leaves seen ones to the segment branch, others to CLIP."""
    weights = written(tmp_path / "w.safetensors", clip, ZegFormerConfig(exponent=0.7))
    predictor = Predictor.load(weights, vocabulary, "cpu")
    assert isinstance(predictor, ZegFormerPredictor)
    assert predictor.vocabulary.names == (HIDDEN, TRAINED, NEW)
    assert predictor.vocabulary.is_seen == (False, True, False)
    raw = raw_of(predictor)
    assert raw.image_logits is not None
    p = raw.class_logits.softmax(-1)
    image = torch.cat((raw.image_logits, raw.class_logits[..., -1:]), -1).softmax(-1)
    want = p**0.3 * image**0.7
    want[..., 1] = p[..., 1] ** 0.7 * image[..., 1] ** 0.3  # of one seen class: the mean
    want[..., -1] = p[..., -1]
    torch.testing.assert_close(predictor.scores(raw), want)
    every = Predictor.load(weights, Vocabulary(CLASSES.entries[:2]), "cpu")
    assert every.vocabulary.is_seen == (True, True)


def test_prompts_of_the_image_branch(clip: Clip, vocabulary: Path, tmp_path: Path) -> None:
    """Those of the weights, or those asked for; the segment branch keeps its own."""
    same_way, masked_way = (ZegFormerConfig(image_prompts=p) for p in ("same", "masked"))
    weights, found = tmp_path / "w.safetensors", dict[str, RawOutput]()
    for way, prompts in ((same_way, SAME), (masked_way, MASKED)):
        predictor = Predictor.load(written(weights, clip, way), vocabulary, "cpu")
        assert isinstance(predictor, ZegFormerPredictor) and predictor.image_text is not None
        torch.testing.assert_close(predictor.image_text, embedded(clip, prompts))
        torch.testing.assert_close(predictor.text, embedded(clip, SAME))
        found[way.image_prompts] = raw_of(predictor)
    asked = ["zegformer.image_prompts=same"]  # of weights that keep the other
    found["asked"] = raw_of(Predictor.load(weights, vocabulary, "cpu", overrides=asked))
    logits = {name: raw.image_logits for name, raw in found.items()}
    same, masked, again = (logits[name] for name in ("same", "masked", "asked"))
    assert same is not None and masked is not None and again is not None
    assert torch.equal(same, again) and (same - masked).abs().max() > 0.01
    assert torch.equal(found["same"].class_logits, found["masked"].class_logits)


@pytest.mark.parametrize(
    ("targets", "tasks"),
    [("category", ("semantic",)), ("segment", ("panoptic", "semantic", "instance"))],
)
def test_what_was_trained_is_not_a_choice_at_test(
    clip: Clip, tmp_path: Path, targets: Literal["category", "segment"], tasks: tuple[str, ...]
) -> None:
    weights = written(tmp_path / "w.safetensors", clip, ZegFormerConfig(targets=targets))
    for asked in (ZegFormerConfig(branch="segment"), ZegFormerConfig(targets="segment")):
        predictor = Predictor.load(weights, None, "cpu", overrides=Config().with_own(asked))
        assert predictor.tasks == tasks
        assert predictor.needs_clip_image == (asked.branch == "fusion")
    other = "category" if targets == "segment" else "segment"
    with pytest.raises(UserError, match=r"zegformer\.targets cannot be changed"):
        Predictor.load(weights, None, "cpu", overrides=[f"zegformer.targets={other}"])


def test_every_key_is_trained_or_a_choice_at_test() -> None:
    keys = [field.name for field in fields(ZegFormerConfig)]
    assert sorted(keys) == sorted((*TRAINED_KEYS, *AT_TEST))
