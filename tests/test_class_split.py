"""Class splits: the published one of COCO panoptic, and what a user's file can get wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from concat_cli.core.data.class_split import class_split_names, load_class_split
from concat_cli.core.errors import UserError

NAMES = [f"class {i}" for i in range(119)]


def test_the_published_split() -> None:
    assert {"all_seen", "coco_panoptic_119_14"} <= set(class_split_names())
    unseen = ["cow", "giraffe", "suitcase", "frisbee", "skateboard", "carrot", "scissors"]
    unseen += ["cardboard", "playingfield", "river", "road"]
    unseen += ["tree-merged", "sky-other-merged", "grass-merged"]
    assert load_class_split("coco_panoptic_119_14", [*NAMES, *unseen]) == tuple(unseen)
    with pytest.raises(UserError, match="119 seen and 14 unseen"):
        load_class_split("coco_panoptic_119_14", [*NAMES[1:], *unseen])
    with pytest.raises(UserError, match="grass-merged"):
        load_class_split("coco_panoptic_119_14", [*NAMES, *unseen[:-1]])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("unseen: [dog]", "does not have: dog"),
        ("unseen: cow", "unseen: Input should be a valid list"),
        ("[cow]", "not as it should be"),
        ("unseen: [cow", "Cannot read"),
        ("unseen: [cow, cow]", "twice"),
        ("unseen: [cow]\nsource: me", "source: Unexpected"),
        ("unseen: [cow, cat]", "no seen class"),
    ],
)
def test_bad_split_files(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        load_class_split(path, ["cow", "cat"])


def test_split_names_and_missing_classes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'coco_panoptic_119_14'") as caught:
        load_class_split("coco_panoptic_119", ["cow"])
    assert "all_seen" in caught.value.hint
    path = tmp_path / "own.yaml"
    path.write_text("unseen: [dog, cow]\nallow_missing: true\n")
    assert load_class_split(path, ["cat", "cow"]) == ("cow",)
    with pytest.raises(UserError) as caught:
        path.write_text("unseen: [cows]\n")
        load_class_split(path, ["cat", "cow"])
    assert "'cow'" in caught.value.hint
