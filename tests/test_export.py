"""`concat export --format transformers`: the library opens it and so do we, with equal masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import export_helpers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is a development package")
import mask2former_helpers as m2f
import transformers

from concat_cli.app import main
from concat_cli.core.build import build_segmentor, restore_segmentor
from concat_cli.core.checkpoint import load_weights
from concat_cli.core.config import ModelConfig
from concat_cli.core.infer.predictor import Predictor
from concat_cli.core.model.segmentor import Segmentor
from concat_cli.core.model.swin import SWINS
from concat_cli.core.segmentors.export import Seen, fitted_head, linear_head
from concat_cli.core.segmentors.mask2former import Mask2Former
from concat_cli.core.segmentors.source import open_segmentor
from concat_cli.core.weights_from.names import published_names, rename


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_helpers.written(tmp_path_factory.mktemp("w") / "w.safetensors")


@pytest.fixture(scope="module")
def folder(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "mine"
    assert main(["export", str(out), "--weights", str(weights)]) == 0
    return out


def pictures(count: int, size: tuple[int, int] = (64, 96)) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)


def photo_folder(folder: Path, count: int) -> Path:
    folder.mkdir()
    for index, image in enumerate(pictures(count)):
        Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(
            folder / f"{index}.png"
        )
    return folder


def own_outputs(weights: Path, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mask logits, queries, and class logits of the trained names, of the weights themselves."""
    predictor = Predictor.load(
        weights, ["red circle, red ring", "green water : stuff", "yellow star"]
    )
    model = predictor.model
    assert isinstance(model, Segmentor)
    with torch.no_grad():
        found = model(images, None, predictor.text, last_only=True)
    return found.mask_logits[-1], found.vision_queries[-1], found.class_logits[-1]


@pytest.mark.parametrize("size", [(64, 96), (128, 64)])
def test_the_library_opens_it_with_the_same_masks(
    weights: Path, folder: Path, size: tuple[int, int]
) -> None:
    theirs, report = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(
        folder, output_loading_info=True
    )
    report = {key: found for key, found in report.items() if found}
    assert not report
    images = pictures(2, size)
    mean, std = (torch.tensor(v)[:, None, None] for v in
                 ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))  # fmt: skip
    masks, _, classes = own_outputs(weights, images)
    with torch.no_grad():
        found = theirs.eval()((images / 255 - mean) / std)
    error = (found.masks_queries_logits - masks).abs().max() / masks.abs().max()
    assert masks.shape == (2, 20, size[0] // 4, size[1] // 4) and error < 1e-4
    assert torch.equal(found.class_queries_logits.argmax(-1), classes.argmax(-1))
    assert theirs.config.id2label == {0: "red circle, red ring", 1: "green water", 2: "yellow star"}


def test_its_processor_prepares_pictures_as_we_do(folder: Path) -> None:
    processor = transformers.Mask2FormerImageProcessor.from_pretrained(folder)
    image = pictures(1)[0]
    made = processor(images=[image], return_tensors="pt")["pixel_values"]
    mean, std = (torch.tensor(v)[:, None, None] for v in
                 ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))  # fmt: skip
    torch.testing.assert_close(made[0], (image / 255 - mean) / std, atol=1e-5, rtol=0)


def test_we_open_it_as_if_it_were_published(weights: Path, folder: Path) -> None:
    ours = open_segmentor(str(folder))
    assert (
        isinstance(ours, Mask2Former)
        and ours.notes == ()
        and (ours.size, ours.max_size) == (64, 96)
    )
    entries = ours.vocabulary.entries
    assert [(e.name, e.synonyms, e.kind) for e in entries] == [
        ("red circle", ("red ring",), "thing"), ("green water", (), "stuff"),
        ("yellow star", (), "thing"),
    ]  # fmt: skip
    images = pictures(3)
    masks, queries, classes = own_outputs(weights, images)
    with torch.no_grad():
        found = ours(images, None)
    torch.testing.assert_close(found.mask_logits, masks, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.queries, queries, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.class_logits.argmax(-1), classes.argmax(-1))
    # and ranks whole, but for one factor of each query
    ratio = found.class_logits / classes
    assert float((ratio / ratio[..., :1] - 1).abs().max()) < 1e-2
    assert 0.5 < float(ratio.median()) < 2, "about as sure, without having seen a picture"


def test_pictures_measure_how_sure_queries_are(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = photo_folder(tmp_path / "photos", 4)
    words = ["export", str(tmp_path / "m"), "--weights", str(weights), "--pictures", str(photos)]
    assert main(words) == 0
    told = "".join(capsys.readouterr())
    assert "best class as in these weights: 100.0% of 40 queries" in " ".join(told.split())
    ours = open_segmentor(str(tmp_path / "m"))
    images = pictures(4)
    _, _, classes = own_outputs(weights, images)
    with torch.no_grad():
        ratio = classes / ours(images, None).class_logits
    assert float(ratio.mean()) == pytest.approx(1, abs=0.02)


def test_any_names_can_be_its_classes(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("blue square\nred water : stuff\n")
    words = ["export", str(tmp_path / "m"), "--weights", str(weights), "--vocab"]
    assert main([*words, str(tmp_path / "names.txt")]) == 0
    found = open_segmentor(str(tmp_path / "m")).vocabulary
    assert found.names == ("blue square", "red water") and found.is_thing == (True, False)


@pytest.mark.parametrize("keys", [{"mask_pooling": True}, {"projector_layers": 2}], ids=str)
def test_another_class_path_is_fitted_to_pictures(
    keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = export_helpers.written(tmp_path / "w.safetensors", **keys)
    words = ["export", str(tmp_path / "m"), "--weights", str(weights)]
    assert main(words) == 2
    assert "--pictures FOLDER" in " ".join("".join(capsys.readouterr()).split())
    assert not (tmp_path / "m").exists()
    assert main([*words, "--pictures", str(photo_folder(tmp_path / "photos", 6))]) == 0
    assert "fitted to the first half" in " ".join("".join(capsys.readouterr()).split())
    images = pictures(2)
    masks, _, classes = own_outputs(weights, images)
    with torch.no_grad():
        found = open_segmentor(str(tmp_path / "m"))(images, None)
    torch.testing.assert_close(found.mask_logits, masks, atol=1e-5, rtol=1e-5)
    spread = (classes - classes.mean((0, 1))).square().mean()
    assert (found.class_logits - classes).square().mean() < 0.5 * spread


def test_a_fit_finds_a_linear_layer_again() -> None:
    torch.manual_seed(0)
    layer, queries = torch.nn.Linear(8, 5), torch.randn(200, 8) * 3 + 1
    with torch.no_grad():
        seen = Seen(queries, layer(queries))
        head = fitted_head(seen)
    torch.testing.assert_close(head.weight, layer.weight, atol=5e-3, rtol=0)
    assert seen.agreement(head) > 0.98
    worse = Seen(queries, -seen.logits)
    assert worse.agreement(head) < 0.2
    first, second = seen.split()
    assert torch.equal(torch.cat((first.queries, second.queries)), queries)


@pytest.mark.parametrize("raw", [False, True])
def test_the_linear_head_is_the_formula(weights: Path, raw: bool) -> None:
    """Against cosines by a naive loop, with the no-object embedding's length or without."""
    segmentor = restore_segmentor(load_weights(weights)).eval()
    segmentor.classifier.raw_no_object = raw
    text, queries = torch.randn(3, 128), torch.randn(5, 64)
    head, layer = linear_head(segmentor, text, queries), segmentor.projector.last
    with torch.no_grad():
        made = layer(queries)
        length = made.norm(dim=-1).mean()
        _, logits = segmentor.classify(queries, text)
        for row, semantic in enumerate(made):
            expected = logits[row] * semantic.norm() / length
            torch.testing.assert_close(head(queries[row]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("key", "value"),
    [("backbone", "small"), ("pixel_decoder", "fpn"), ("token_queries", True)],
)
def test_what_the_library_has_no_place_for_is_told(
    key: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = export_helpers.written(tmp_path / "w.safetensors", **{key: value})
    assert main(["export", str(tmp_path / "m"), "--weights", str(weights)]) == 2
    told = " ".join("".join(capsys.readouterr()).split())
    assert f"no place for model.{key}={str(value).lower()}." in told


def test_a_folder_with_something_in_it_is_left_alone(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "note").write_text("mine")
    assert main(["export", str(tmp_path), "--weights", str(weights)]) == 2
    assert "is there already" in " ".join("".join(capsys.readouterr()).split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["note"]


@pytest.mark.parametrize("backbone", ["swin_tiny_patch4_window7_224", "resnet34", "resnet50"])
def test_names_go_there_and_back(backbone: str, tmp_path: Path) -> None:
    """Ours -> published -> ours, and the published ones are those the library itself writes."""
    cfg = ModelConfig(**(export_helpers.FITTING | {"backbone": backbone}))
    state = build_segmentor(cfg, 1).state_dict()
    ours = {n: t for n, t in state.items() if not n.startswith(("projector.", "classifier."))}
    theirs = published_names(ours)
    renamed = rename(theirs)
    assert renamed is not None and renamed.naming == "transformers"
    back = renamed.tensors
    assert back.keys() == ours.keys() and all(torch.equal(back[n], ours[n]) for n in ours)
    if backbone == "resnet34":
        shape = transformers.ResNetConfig(
            hidden_sizes=[64, 128, 256, 512], depths=[3, 4, 6, 3], layer_type="basic",
            out_features=m2f.STAGES,
        )  # fmt: skip
    else:
        shape = m2f.swin_config(SWINS[backbone]) if backbone in SWINS else m2f.resnet_config()
    config = transformers.Mask2FormerConfig(
        backbone_config=shape, feature_size=64, mask_feature_size=32, hidden_dim=64,
        encoder_feedforward_dim=48, dim_feedforward=40, encoder_layers=1, decoder_layers=4,
        num_attention_heads=4, num_queries=20, num_labels=3,
    )  # fmt: skip
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    model.save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        written = {n: list(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
    expected = {n for n in written if not n.startswith(("class_predictor.", "criterion."))}
    expected = {n for n in expected if ".layernorm." not in n or "encoder" not in n}
    assert theirs.keys() == expected
    assert all(list(t.shape) == written[n] for n, t in theirs.items())


def test_an_unknown_name_has_no_place() -> None:
    with pytest.raises(KeyError):
        published_names({"backbone.body.stem.weight": torch.ones(1)})


def test_the_config_says_what_is_ours(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["decoder_layers"] == 4 and config["backbone_config"]["layer_type"] == "basic"
