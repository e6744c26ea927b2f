"""SAM 3 behind our interface gives what transformers gives for a picture and a phrase."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from concat_cli.core.config import InferConfig
from concat_cli.core.errors import UserError
from concat_cli.core.infer.predictor import Predictor, RawOutput
from concat_cli.core.segmentors.sam3 import Sam3, open_sam3
from concat_cli.core.vocabulary_file import parse_names
from concat_cli.methods.borrowed.phrases import PhrasePredictor

pytest.importorskip("transformers", reason="transformers is a development package")
import transformers
from sam3_helpers import write_sam3  # which needs transformers


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
