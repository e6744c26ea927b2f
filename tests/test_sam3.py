"""SAM 3 behind our interface gives what transformers gives for a picture and a phrase."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from concat_cli.core.config import InferConfig
from concat_cli.core.errors import UserError
from concat_cli.core.infer.predictor import Predictor, RawOutput
from concat_cli.core.segmentors.sam3 import Sam3, open_sam3
from concat_cli.core.vocabulary import parse_names
from concat_cli.methods.borrowed.phrases import PhrasePredictor

transformers = pytest.importorskip("transformers")


def write_sam3(folder: Path) -> None:
    """A tiny SAM 3 with random weights, as transformers writes it, with CLIP's tokenizer."""
    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.Sam3Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam3_vit_model",
                **small,
                "num_hidden_layers": 2,
                "image_size": 112,
                "window_size": 4,
                "global_attn_indexes": [1],
                "pretrain_image_size": 56,
            },
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        },
        text_config={
            **small,
            "num_hidden_layers": 1,
            "vocab_size": 49408,
            "projection_dim": 16,
            "max_position_embeddings": 32,
        },
        geometry_encoder_config={**small, "num_layers": 1},
        detr_encoder_config={**small, "num_layers": 1},
        detr_decoder_config={**small, "num_layers": 2, "num_queries": 6},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2},
    )
    torch.manual_seed(0)
    transformers.Sam3Model(config).save_pretrained(folder)
    table = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(table.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(open_clip.tokenizer.bytes_to_unicode().values())
    words = letters + [f"{letter}</w>" for letter in letters]
    words += ["".join(merge.split()) for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt")
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sam3") / "tiny"
    folder.mkdir()
    write_sam3(folder)
    return folder


@pytest.fixture(scope="module")
def sam3(folder: Path) -> Sam3:
    return open_sam3(folder)


@pytest.mark.parametrize("size", [(60, 90), (112, 70)])
def test_it_gives_what_transformers_gives(sam3: Sam3, folder: Path, size: tuple[int, int]) -> None:
    phrases = ["cat", "a red bus"]
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    picture = torch.tensor(pixels).permute(2, 0, 1)
    theirs = transformers.Sam3Model.from_pretrained(folder).eval()
    reader = transformers.Sam3ImageProcessor(size={"height": 112, "width": 112})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        answers = list(sam3.ask(picture, sam3.read(phrases)))
        values = reader(Image.fromarray(pixels), return_tensors="pt").pixel_values
        for phrase, answer in zip(phrases, answers, strict=True):
            text = tokenizer(phrase, return_tensors="pt", padding="max_length", max_length=32)
            out = theirs(pixel_values=values, **text)
            scores = out.pred_logits.sigmoid() * out.presence_logits.sigmoid()
            torch.testing.assert_close(answer.scores, scores[0], atol=1e-4, rtol=0)
            torch.testing.assert_close(answer.mask_logits, out.pred_masks[0], atol=1e-4, rtol=0)
            torch.testing.assert_close(answer.covered, out.semantic_seg[0, 0], atol=1e-4, rtol=0)
    assert not torch.equal(answers[0].scores, answers[1].scores)


def test_its_folder_is_weights(folder: Path) -> None:
    predictor = Predictor.load(folder, ["cat", "sky : stuff"], "cpu")
    assert isinstance(predictor, PhrasePredictor) and not predictor.needs_clip_image
    assert predictor(np.zeros((40, 60, 3), np.uint8)).panoptic_map.shape == (40, 60)
    with pytest.raises(UserError, match="no classes of its own"):
        Predictor.load(folder, device="cpu")


def test_what_is_missing_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be opened as SAM 3"):
        open_sam3(tmp_path)


def test_all_phrases_make_one_map(sam3: Sam3) -> None:
    """Things are instances above the score, stuff what its phrase covers; naive merging agrees."""
    vocabulary = parse_names(["cat, kitten", "red bus", "sky : stuff"])
    cfg = InferConfig(min_score=0.2, overlap=0.0)
    predictor = PhrasePredictor(sam3, torch.zeros(3, 0), vocabulary, cfg)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    raw = next(iter(predictor.raw([pixels])))
    assert isinstance(raw, RawOutput)
    expected: list[tuple[int, float]] = []
    with torch.inference_mode():
        picture = torch.tensor(pixels).permute(2, 0, 1)
        answers = list(sam3.ask(picture, sam3.read(["cat", "kitten", "red bus", "sky"])))
    for index, answer in zip((0, 0, 1), answers[:3], strict=True):
        expected += [(index, score) for score in answer.scores.tolist() if score > 0.2]
    expected.append((2, answers[3].present))
    found = raw.class_logits[0].softmax(-1)
    assert [(row[:-1].argmax().item(), row[:-1].max().item()) for row in found] == [
        (index, pytest.approx(score, abs=1e-5)) for index, score in expected
    ]
    prediction = predictor(pixels)
    assert prediction.panoptic_map.shape == (60, 90)
    assert prediction.semantic_map.shape == (60, 90)
    assert set(prediction.names) <= {"cat", "red bus", "sky"}
