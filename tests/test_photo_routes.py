"""Photos through every route, as its users type it: random weights, but valid files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from data_helpers import PHOTOS
from fcclip_helpers import clip_of, tensors
from panoptic_files import check_panoptic_files
from PIL import Image
from safetensors.torch import save_file
from tower_helpers import tower_clip

from concat_cli.app import main
from concat_cli.core.clip.source import RANDOM

pytest.importorskip("transformers", reason="transformers is a development package")
import mask2former_helpers as m2f  # which need transformers
import published_helpers as published
from sam3_helpers import write_sam3

SCENE = Path(__file__).parents[1] / "docs" / "pictures" / "scene.png"
CLASSES = "dog; cat, kitten; grass : stuff; Gänse & <b>, {a}: stuff"
SMALL = ("infer.size=64", "infer.max_size=128", "infer.overlap=0")


class Route(NamedTuple):
    """A segmentor, and how its masks are named: `borrowed.naming`, and a CLIP of tower_helpers."""

    segmentor: str
    naming: str = ""
    clip: str = ""


ROUTES = (
    Route("mask2former", "pool", "vit"),
    Route("mask2former", "crops", "convnext"),
    Route("mask2former on a ResNet", "pool", "siglip"),
    Route("eomt", "pool", "convnext"),
    Route("oneformer", "crops", "siglip"),
    Route("maskformer", "crops", "vit"),
    Route("fc-clip"),
    Route("sam3"),
)


@pytest.fixture(scope="module", autouse=True)
def toy_swin() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        published.know_the_toy(patch)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


def words_of(route: Route, made: Path) -> list[str]:
    """`--weights` and keys of a route, whose files are made once."""
    keys: list[str] = [*SMALL]
    weights = made / route.segmentor
    if route.segmentor == "sam3":
        if not weights.exists():
            weights.mkdir()
            write_sam3(weights)
        keys.append("infer.min_score=0")
    elif route.segmentor == "fc-clip":
        weights = weights.with_suffix(".safetensors")
        clip_of(made / "clip of fc-clip")
        save_file(tensors(), weights)
        keys += [f"clip.model=local-dir:{made / 'clip of fc-clip'}", "clip.pretrained="]
    else:
        if not weights.exists():
            on_resnet = "ResNet" in route.segmentor
            published.saved(
                m2f.their_model(m2f.resnet_config((2, 2, 2, 2)))
                if on_resnet
                else published.random_model(route.segmentor),
                weights,
            )
        clip = tower_clip(made, route.clip).identity.model
        keys += [f"clip.model={clip}", f"clip.pretrained={RANDOM}"]
        keys += [f"borrowed.naming={route.naming}", "borrowed.min_object=0"]
    return ["--weights", str(weights), *keys]


@pytest.fixture(scope="module")
def pictures(made: Path) -> list[Path]:
    """The drawn picture, a strip of it, and where they are here the two photos of COCO, smaller."""
    found = {"strip.png": Image.open(SCENE).crop((0, 40, 128, 70))}
    for path in sorted((PHOTOS / "images").glob("*.jpg")):
        found[path.name] = Image.open(path).reduce(3)
    for name, picture in found.items():
        picture.save(made / name)
    return [SCENE, *(made / name for name in found)]


@pytest.mark.parametrize("route", ROUTES, ids=" ".join)
def test_photos_become_valid_files(
    route: Route, pictures: list[Path], made: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    weights, given, *keys = words_of(route, made)
    sets = [word for key in keys for word in ("--set", key)]
    words = ["predict", *map(str, pictures), weights, given, *sets, "--classes", CLASSES]
    capsys.readouterr()
    assert main([*words, "--out", str(out), "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "names 4 classes (things 2, stuff 2" in said.out
    assert "[transformers]" not in said.out + said.err and "%|" not in said.err
    found = check_panoptic_files(out, pictures)
    assert found.names == ("dog", "cat", "grass", "Gänse & <b>")
    if route.clip:  # random masks of the others are all void, or all empty
        assert found.segments >= len(pictures)
    for path in pictures:
        overlay = Image.open(out / f"{path.stem}.overlay.png")
        assert overlay.width >= Image.open(path).width and overlay.mode == "RGB"


def test_a_route_is_evaluated_and_its_files_scored_again(
    made: Path, mini_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*words_of(Route("maskformer", "pool", "vit"), made), f"data.root={mini_world}"]
    save, tasks = ["--save", str(tmp_path / "saved")], "panoptic,semantic,instance"
    assert main(["evaluate", *words, "--tasks", tasks, *save, "--json", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == 12 and report["protocol"]["stage"] == "borrowed"
    assert report["protocol"]["overlap"]["count"] == 0
    truth = json.loads((mini_world / "dataset.json").read_text())["parts"]["val"]["json"]
    files = ["--predictions", str(tmp_path / "saved" / "panoptic.json")]
    files += ["--truth", str(mini_world / truth)]
    assert main(["evaluate", *files, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["panoptic"]["all"]["pq"] == pytest.approx(report["panoptic"]["all"]["pq"])
