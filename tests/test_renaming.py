"""One model, other names each time: the same as weights loaded for those names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from concat_cli.core.checkpoint import open_weights
from concat_cli.core.clip.prompts import RecentTexts
from concat_cli.core.errors import UserError
from concat_cli.core.infer.predictor import Predictor
from concat_cli.core.infer.renaming import PREDICTORS, AnyNames
from concat_cli.core.runs import BUILT_IN

LISTS = ("striped star; dotted crescent, dotted ring; green water", "brick : stuff; blue heart", "")
SCENE = Path(__file__).parents[1] / "docs" / "pictures" / "scene.png"


@pytest.fixture(scope="module")
def names() -> AnyNames:
    return AnyNames(open_weights(BUILT_IN), "cpu")


@pytest.mark.parametrize("classes", LISTS)
def test_it_predicts_as_weights_loaded_for_the_names(names: AnyNames, classes: str) -> None:
    found = names.predictor(names.parsed(classes))(SCENE)
    listed = [part.strip() for part in classes.split(";")] if classes else None
    expected = Predictor.load(None, listed, "cpu")(SCENE)
    assert np.array_equal(found.panoptic_map, expected.panoptic_map) and found.segments
    assert found.segments == expected.segments and found.vocabulary == expected.vocabulary


def test_the_least_score_is_of_one_question_alone(names: AnyNames) -> None:
    vocabulary = names.parsed("striped star; water : stuff")
    usual = names.predictor(vocabulary)(SCENE).segments
    strict = names.predictor(vocabulary, 0.8)(SCENE).segments
    assert strict and len(strict) < len(usual) and min(one.score for one in strict) >= 0.8
    assert names.predictor(vocabulary)(SCENE).segments == usual


def test_nothing_is_loaded_again_or_written_to_disk(tmp_path: Path) -> None:
    names = AnyNames(open_weights(BUILT_IN), "cpu", cache_dir=tmp_path)
    own = names.predictor(names.own)
    there = sorted(tmp_path.rglob("*.safetensors"))
    other = names.predictor(names.parsed("blue cross"))
    assert other.model is own.model and other is not own
    assert len(there) == 1 and sorted(tmp_path.rglob("*.safetensors")) == there


def test_few_predictors_stay(names: AnyNames) -> None:
    colours = ("blue", "brown", "green", "grey", "red", "yellow")
    lists = [f"{colour} {kind}" for colour in colours for kind in ("star", "ring")]
    first = names.predictor(names.parsed(lists[0]))
    assert names.predictor(names.parsed(lists[0])) is first
    for text in lists[1 : PREDICTORS + 1]:
        names.predictor(names.parsed(text))
    assert names.predictor(names.parsed(lists[0])) is not first


def test_words_that_the_built_in_clip_never_saw_are_told(names: AnyNames) -> None:
    with pytest.raises(UserError, match="never seen: 'zebra'"):
        names.predictor(names.parsed("zebra"))
    with pytest.raises(UserError, match="The list of names, item 2"):
        names.parsed("star; water : liquid")


def test_recent_texts_encode_what_is_missing_and_forget_the_oldest() -> None:
    asked: list[str] = []

    def encode(rows: list[list[str]]) -> Tensor:
        asked.extend(text for row in rows for text in row)
        return torch.tensor([[float(ord(row[0])), 1.0] for row in rows])

    recent = RecentTexts(most=3)
    for texts, missing in (("ab", "ab"), ("bca", "c"), ("cd", "d"), ("ba", "b"), ("xyzwx", "xyzw")):
        asked.clear()
        found = recent(encode, [[text] for text in texts])
        assert "".join(asked) == missing
        assert found.tolist() == [[float(ord(text)), 1.0] for text in texts]
