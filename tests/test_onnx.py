"""`concat export model.onnx` and `concat texts`: ONNX Runtime finds what torch finds, of any size
and with any names; the page on it runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

pytest.importorskip("onnx", reason="a package of the extra [onnx]")
pytest.importorskip("onnxscript", reason="a package of the extra [onnx]")
pytest.importorskip("onnxruntime", reason="a package of the extra [onnx]")
import onnx
import onnxruntime

from concat_cli.app import main
from concat_cli.core.build import build_segmentor
from concat_cli.core.config import InferConfig, ModelConfig
from concat_cli.core.errors import UserError
from concat_cli.core.infer.predictor import Predictor
from concat_cli.core.model.deformable import DeformableAttention, sample_reference
from concat_cli.core.onnx.file import segmentor_of
from concat_cli.core.onnx.model import onnx_model
from concat_cli.core.onnx.parts import sample_rows
from concat_cli.core.runs import BUILT_IN

PAGE = Path(__file__).parents[1] / "docs" / "export.md"
SIZES = ((128, 128), (150, 97), (300, 420))
NAMES = "striped star; circle, ring; green water : stuff"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.onnx and model.json of the built-in weights, and names.npz."""
    folder = tmp_path_factory.mktemp("onnx")
    assert main(["export", str(folder / "model.onnx")]) == 0
    assert main(["texts", str(folder / "names.npz"), "--classes", NAMES]) == 0
    return folder


@pytest.fixture(scope="module")
def session(exported: Path) -> Any:
    return onnxruntime.InferenceSession(exported / "model.onnx")


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


def scenes(world: Path, size: tuple[int, int]) -> list[NDArray[np.uint8]]:
    """Drawn scenes, resized to (height, width)."""
    paths = sorted((world / "val").glob("*.png"))[:4]
    pictures = (Image.open(path).convert("RGB") for path in paths)
    return [np.array(one.resize(size[::-1], Image.Resampling.BICUBIC)) for one in pictures]


@pytest.mark.parametrize("names", ["own", "new"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_page_finds_what_the_predictor_finds(
    exported: Path, mini_world: Path, size: tuple[int, int], names: str
) -> None:
    """Pixels of equal class, and of segments that lie alike, in 99.9% of all."""
    found: dict[str, Any] = {"folder": exported}
    exec(compile(snippets()[0], "page", "exec"), found)
    classes = None
    if names == "new":
        exec(compile(snippets()[1], "page", "exec"), found)
        classes = [text.strip() for text in NAMES.split(";")]
    predictor = Predictor.load(BUILT_IN, classes, "cpu")
    assert list(predictor.vocabulary.names) == list(found["names"])
    same = total = segments = 0
    for picture in scenes(mini_world, size):
        expected = predictor(picture)
        segment_map, labels = found["panoptic"](picture)
        segments += len(expected.segments)
        assert segment_map.shape == picture.shape[:2] == expected.panoptic_map.shape
        assert [one.class_index for one in expected.segments] == list(labels)
        same += int((segment_map == expected.panoptic_map).sum())
        total += segment_map.size
    assert segments >= 4 and same >= 0.999 * total, (segments, same / total)


def test_the_file_is_valid_and_open(exported: Path, session: Any) -> None:
    model = onnx.load(exported / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    inputs = {one.name: one.shape for one in session.get_inputs()}
    assert inputs["image"] == ["height", "width", 3]
    assert list(inputs) == ["image", "text_embeddings"] and inputs["text_embeddings"][1] == 128
    assert isinstance(inputs["text_embeddings"][0], str)  # a name: of any length
    about = json.loads((exported / "model.json").read_text("utf-8"))
    assert about["opset"] == model.opset_import[0].version == 20
    with np.load(exported / "names.npz") as file:
        assert file["names"].tolist() == ["striped star", "circle", "green water"]
        assert file["is_thing"].tolist() == [True, True, False]
        assert file["is_seen"].shape == (3,)
        own = dict(zip(about["names"], about["text_embeddings"], strict=True))
        assert np.allclose(file["text_embeddings"][0], own["striped star"], atol=1e-6)


def test_a_deformable_decoder_keeps_its_sizes_open() -> None:
    """Of learned queries and a projector of two layers, with every part at its smallest."""
    torch.manual_seed(0)
    cfg = ModelConfig(
        pixel_decoder="deformable", width=32, mask_width=32, heads=2, encoder_layers=1,
        encoder_ffn=32, decoder_layers=1, decoder_ffn=32, queries=5, projector_layers=2,
        token_queries=False, mask_pooling=False,
    )  # fmt: skip
    segmentor = build_segmentor(cfg, 16).eval()
    for module in segmentor.modules():
        if isinstance(module, DeformableAttention):
            torch.nn.init.normal_(module.offsets.weight)
            torch.nn.init.normal_(module.weights.weight)
    text = torch.nn.functional.normalize(torch.randn(6, 16), dim=-1)
    infer = InferConfig(size=64, max_size=96)
    session = onnxruntime.InferenceSession(onnx_model(segmentor, text, infer).SerializeToString())
    rng = np.random.default_rng(0)
    for (height, width), classes in (((64, 64), 6), ((64, 93), 3), ((80, 64), 2)):
        picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        feed = {"image": picture, "text_embeddings": text[:classes].numpy()}
        images = torch.zeros(1, 3, -(-height // 32) * 32, -(-width // 32) * 32, dtype=torch.uint8)
        images[0, :, :height, :width] = torch.tensor(picture).permute(2, 0, 1)
        padding = torch.ones(1, *images.shape[2:], dtype=torch.bool)
        padding[:, :height, :width] = False
        with torch.inference_mode():
            expected = segmentor(images, padding, text[:classes], last_only=True)
        class_logits, mask_logits = session.run(["class_logits", "mask_logits"], feed)
        assert np.allclose(class_logits, expected.class_logits[-1, 0], atol=1e-3)
        assert np.allclose(mask_logits, expected.mask_logits[-1, 0], atol=1e-3)


def test_the_open_sampler_is_the_reference() -> None:
    """Two pictures, as many queries as cells, places in and far out of the levels."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 3), (4, 6), (8, 12)]
    values = torch.randn(2, 126, 2, 4, generator=generator)
    places = torch.rand(2, 126, 2, 3, 2, 2, generator=generator) * 16 - 2
    weights = torch.rand(2, 126, 2, 3, 2, generator=generator)
    expected = sample_reference(values, sizes, places, weights)
    assert torch.allclose(sample_rows(values, sizes, places, weights), expected, atol=1e-5)


def test_what_cannot_be_one_file(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is there already stays; other kinds of predictors, and wrong calls, are told of."""
    before = (exported / "model.onnx").stat().st_mtime_ns
    for words, said in (
        (["export", str(exported / "model.onnx")], "is there already"),
        (["export", str(exported / "b.onnx"), "--pictures", str(exported)], "no class head"),
        (["texts", str(exported / "a.npz")], "No names"),
        (["texts", str(exported / "a.txt"), "--classes", "star"], ".npz"),
    ):
        assert main(words) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert (exported / "model.onnx").stat().st_mtime_ns == before

    class Other(Predictor):
        """Of a method that does more."""

    built = Predictor.load(BUILT_IN, device="cpu")
    other = Other(built.model, built.text, built.vocabulary, built.cfg, meta={"stage": "zegformer"})
    with pytest.raises(UserError, match="crop of each segment"):
        segmentor_of(other)
