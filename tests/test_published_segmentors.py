"""Published segmentors: each kind gives what its own library gives, whatever it is batched with."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers is a development package")
import huggingface_hub
import mask2former_helpers as m2f
import published_helpers as published
import transformers

from concat_cli.core import segmentors
from concat_cli.core.build import build_segmentor
from concat_cli.core.config import ModelConfig
from concat_cli.core.errors import UserError
from concat_cli.core.model.swin import SWINS
from concat_cli.core.segmentors import PublishedSegmentor
from concat_cli.core.segmentors.files import Files
from concat_cli.core.segmentors.library import EoMT, task_tokens
from concat_cli.core.segmentors.source import open_segmentor
from concat_cli.core.weights_from import hub
from concat_cli.core.weights_from.files import mask2former_in

KINDS = ("mask2former", "eomt", "oneformer", "maskformer")
SIZES = [(64, 96), (128, 128)]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)  # no published ones: they have to be read
PREPROCESSOR = {"image_mean": MEAN, "image_std": STD, "size": {"shortest_edge": 96,
                "longest_edge": 160}}  # fmt: skip


class Opened:
    """A model of the library's, the folder it was saved in, and what we opened of it."""

    def __init__(self, kind: str, folder: Path, theirs: nn.Module | None = None) -> None:
        self.kind, self.theirs = kind, theirs or published.random_model(kind)
        self.folder = published.saved(self.theirs, folder / kind, PREPROCESSOR)
        self.ours = open_segmentor(str(self.folder))


@pytest.fixture(scope="module", autouse=True)
def toy_swin():
    with pytest.MonkeyPatch.context() as patch:
        published.know_the_toy(patch)
        yield


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Opened]:
    folder = tmp_path_factory.mktemp("published")
    return {kind: Opened(kind, folder) for kind in KINDS}


def pictures(count: int, size: tuple[int, int], seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)


def normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def close(ours: Tensor, theirs: Tensor, what: str, most: float = 1e-4) -> None:
    assert ours.shape == theirs.shape, what
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < most, f"{what}: {error:.1e}"


def check_against_theirs(one: Opened, size: tuple[int, int]) -> None:
    images = pictures(2, size)
    pixels = normalised(images)
    if one.kind == "eomt":  # its processor pads black pixels, then normalises
        black = torch.zeros(2, 3, 128, 128, dtype=torch.uint8)
        black[..., : size[0], : size[1]] = images
        pixels = normalised(black)
    masks, classes = published.their_outputs(one.kind, one.theirs, pixels)
    with torch.no_grad():
        found = one.ours(images, None)
    masks = masks[..., : size[0] // 4, : size[1] // 4]
    close(found.mask_logits, masks, f"{one.kind}, masks")
    close(found.class_logits, classes, f"{one.kind}, classes")
    with torch.no_grad():  # queries are what the class head reads
        close(one.ours.class_head(found.queries), classes, f"{one.kind}, queries")  # type: ignore[operator]
    assert found.queries.shape[1:] == (one.ours.count, one.ours.width)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_raw_outputs_are_the_library_s_own(
    opened: dict[str, Opened], kind: str, size: tuple[int, int]
) -> None:
    check_against_theirs(opened[kind], size)


def test_a_published_shape_gives_the_library_s_own(tmp_path: Path) -> None:
    theirs = m2f.their_model(m2f.swin_config(SWINS[published.SWIN_TINY]))
    check_against_theirs(Opened("mask2former", tmp_path, theirs), (64, 96))


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_in_a_batch_gives_what_it_gives_alone(
    opened: dict[str, Opened], kind: str
) -> None:
    """Unequal pictures, two of them with a side that is no multiple of 32."""
    ours, sizes = opened[kind].ours, [(64, 96), (128, 128), (50, 90), (100, 75)]
    images = torch.zeros(4, 3, 128, 128, dtype=torch.uint8)
    padding = torch.ones(4, 128, 128, dtype=torch.bool)
    for row, (height, width) in enumerate(sizes):
        images[row, :, :height, :width] = pictures(1, (height, width), row)[0]
        padding[row, :height, :width] = False
    with torch.no_grad():
        together = ours(images, padding)
        assert together.mask_logits.shape == (4, ours.count, 32, 32)
        for row, (height, width) in enumerate(sizes):
            h, w = -(-height // 32) * 32, -(-width // 32) * 32
            some = padding[row : row + 1, :h, :w]
            alone = ours(images[row : row + 1, :, :h, :w], some if some.any() else None)
            masks = together.mask_logits[row : row + 1, :, : h // 4, : w // 4]
            close(masks, alone.mask_logits, f"{kind}, masks of {row}", 1e-5)
            close(together.class_logits[row : row + 1], alone.class_logits, f"{kind} {row}", 1e-5)
            close(together.queries[row : row + 1], alone.queries, f"{kind} {row}", 1e-5)
            if ours.padded is not None:
                continue
            # and once masks are resized, up to the picture's last pixel
            large, small = (
                nn.functional.interpolate(x, scale_factor=4, mode="bilinear")[..., :height, :width]
                for x in (together.mask_logits[row : row + 1], alone.mask_logits)
            )
            close(large, small, f"{kind}, resized masks of {row}", 1e-5)


def test_what_each_kind_says_of_itself(opened: dict[str, Opened]) -> None:
    for kind in KINDS:
        ours = opened[kind].ours
        assert ours.source == str(opened[kind].folder) and len(ours.sha256) == 64
        assert len(ours.vocabulary) == published.CLASSES and ours.vocabulary.names[0] == "class 1"
        assert len(ours.notes) == 1 and "names none of its 7 classes" in ours.notes[0]
        assert not any(p.requires_grad for p in ours.parameters())
        assert not ours.train().training and not any(m.training for m in ours.modules())
        expected = (128, 128, (128, 128)) if kind == "eomt" else (96, 160, None)
        assert (ours.size, ours.max_size, ours.padded) == expected


def test_a_picture_larger_than_a_fixed_input_is_told(opened: dict[str, Opened]) -> None:
    with pytest.raises(UserError, match="128x128 at most, these are 128x160") as caught:
        opened["eomt"].ours(pictures(1, (128, 160)), None)
    assert "infer.size=128 infer.max_size=128" in caught.value.hint


@pytest.mark.parametrize("patch", [8, 16])
def test_masks_of_another_stride_are_resized_to_4(tmp_path: Path, patch: int) -> None:
    config = published.config_of("eomt")
    config.patch_size, config.num_upscale_blocks = patch, 1  # strides 4 and 8
    torch.manual_seed(0)
    theirs = transformers.EomtForUniversalSegmentation(config).eval()
    ours = open_segmentor(str(published.saved(theirs, tmp_path / "m", PREPROCESSOR)))
    images = pictures(1, (128, 128))
    masks, _ = published.their_outputs("eomt", theirs, normalised(images))
    if patch == 16:
        masks = nn.functional.interpolate(masks, scale_factor=2, mode="bilinear")
    close(ours(images, None).mask_logits, masks, "masks")


def test_the_task_of_oneformer_is_what_its_processor_makes(tmp_path: Path) -> None:
    """Through the library's own tokenizer and processor, its vocabulary written from CLIP's."""
    tokenizer = open_clip.SimpleTokenizer()
    merges = [" ".join(pair) for pair, _ in sorted(tokenizer.bpe_ranks.items(), key=lambda r: r[1])]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    vocab = {t.replace("<start_of_text>", "<|startoftext|>")
             .replace("<end_of_text>", "<|endoftext|>"): i
             for t, i in tokenizer.encoder.items()}  # fmt: skip
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    theirs = transformers.CLIPTokenizer.from_pretrained(str(tmp_path))
    made = theirs(
        ["the task is panoptic"], padding="max_length", max_length=77, return_tensors="pt"
    )
    expected = made["input_ids"] * made["attention_mask"]
    assert torch.equal(task_tokens(77), expected)
    assert expected[0, : len(published.TASK)].tolist() == published.TASK


@pytest.mark.parametrize("kind", KINDS)
def test_torch_files_and_wrapped_names_open_too(
    opened: dict[str, Opened], kind: str, tmp_path: Path
) -> None:
    """`.bin` in half precision, as a compiled model in a parallel one in a training's module."""
    one, folder = opened[kind], tmp_path / "bin"
    shutil.copytree(one.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(one.folder / "model.safetensors")
    wrapped = {f"model.module._orig_mod.{n}": t.clone() for n, t in tensors.items()}
    torch.save({"state_dict": wrapped | {"criterion.weight": torch.ones(3)}, "epoch": 3},
               folder / "pytorch_model.bin")  # fmt: skip
    found, wanted = open_segmentor(str(folder)).state_dict(), one.ours.state_dict()
    assert found.keys() == wanted.keys()
    other = {name for name in wanted if not torch.equal(found[name], wanted[name])}
    assert {name.split(".")[1] for name in other} <= {"projector", "classifier"}, "ours, random"
    if kind == "mask2former":
        half = {n: t.half() for n, t in tensors.items()}
        save_file(half, folder / "model.safetensors")
        parameters = open_segmentor(str(folder)).parameters()
        assert all(p.dtype == torch.float32 for p in parameters)


def test_detectron2_s_mask2former_has_the_same_outputs(
    opened: dict[str, Opened], tmp_path: Path
) -> None:
    """Without config and preprocessor: the colours are ImageNet's, and that is said."""
    one, path = opened["mask2former"], tmp_path / "model_final.pth"
    torch.save({"model": m2f.detectron2_names(one.theirs.state_dict())}, path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')  # somebody else's
    ours = open_segmentor(str(path))
    assert (ours.size, ours.max_size) == (800, 1333) and "ImageNet" in ours.notes[-1]
    images = pictures(1, (64, 96))
    mean, std = (torch.tensor(v)[:, None, None] for v in
                 ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))  # fmt: skip
    pixels = (images.float() / 255 - mean) / std
    masks, classes = published.their_outputs("mask2former", one.theirs, pixels)
    with torch.no_grad():
        found = ours(images, None)
    close(found.mask_logits, masks, "masks")
    close(found.class_logits, classes, "classes")


def test_resnets_of_our_own_are_known_by_their_shape(tmp_path: Path) -> None:
    theirs = m2f.their_model(m2f.resnet_config((2, 2, 2, 2)))
    folder = published.saved(theirs, tmp_path / "r26", PREPROCESSOR)
    ours = open_segmentor(str(folder))
    images = pictures(1, (64, 96))
    masks, classes = published.their_outputs("mask2former", theirs, normalised(images))
    with torch.no_grad():
        found = ours(images, None)
    close(found.mask_logits, masks, "masks")
    close(found.class_logits, classes, "classes")


def _changed(one: Opened, folder: Path, change: Any) -> Path:
    shutil.copytree(one.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


_LAST = {  # kind -> a tensor of its last layers
    "mask2former": "model.transformer_module.decoder.layers.3.fc1.weight",
    "eomt": "layers.3.mlp.fc1.weight",
    "oneformer": "model.transformer_module.decoder.layers.1.ffn.linear1.weight",
    "maskformer": "model.transformer_module.decoder.layers.1.fc1.weight",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_extra_or_misshapen_tensor_is_named(
    opened: dict[str, Opened], kind: str, tmp_path: Path
) -> None:
    one, name = opened[kind], _LAST[kind]
    told = {  # by the names of the model here, or of the library's modules
        "mask2former": "query_decoder.layers.3.feed_forward.first.weight",
        "maskformer": "model.transformer_module.decoder.layers.1.mlp.fc1.weight",
    }.get(kind, name)
    changes = {
        "missing": lambda t: t.pop(name),
        "misshapen": lambda t: t.__setitem__(name, torch.zeros(5, 7)),
        "extra": lambda t: t.__setitem__("model.surplus.weight", torch.zeros(3)),
    }
    for what, change in changes.items():
        folder = _changed(one, tmp_path / what, change)
        with pytest.raises(UserError) as caught:
            open_segmentor(str(folder))
        message = caught.value.what
        assert str(folder) in message and caught.value.hint
        assert ("model.surplus.weight" if what == "extra" else told) in message, message


def test_a_head_that_is_missing_or_misshapen_is_told(
    opened: dict[str, Opened], tmp_path: Path
) -> None:
    one = opened["mask2former"]
    folder = _changed(one, tmp_path / "none", lambda t: t.pop("class_predictor.weight"))
    with pytest.raises(UserError, match="no class head of one linear layer"):
        open_segmentor(str(folder))
    wrong = torch.zeros(8, m2f.WIDTH + 1)
    folder = _changed(one, tmp_path / "wide", lambda t: t.update({"class_predictor.weight": wrong}))
    with pytest.raises(UserError, match=r"class head is \(8, 65\)"):
        open_segmentor(str(folder))


def test_an_unknown_backbone_is_told(tmp_path: Path) -> None:
    shape = published.tiny_swin()
    shape.depths = [1, 2, 3, 1]
    theirs = m2f.their_model(shape)
    with pytest.raises(UserError, match="a backbone that is not built here") as caught:
        open_segmentor(str(published.saved(theirs, tmp_path / "m")))
    assert "resnet50" in caught.value.hint


def test_what_is_no_panoptic_segmentor_is_told(tmp_path: Path) -> None:
    swin = transformers.SwinModel(published.tiny_swin())
    with pytest.raises(UserError, match="It is a SwinModel") as caught:
        open_segmentor(str(published.saved(swin, tmp_path / "swin")))
    assert "has no masks to lend" in caught.value.hint
    save_file({"layers.0.blocks.0.norm1.weight": torch.ones(3)}, tmp_path / "s.safetensors")
    with pytest.raises(UserError, match="It holds a backbone"):
        open_segmentor(str(tmp_path / "s.safetensors"))
    save_file({"a.weight": torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"It holds 1 tensors, like a\.weight"):
        open_segmentor(str(tmp_path / "a.safetensors"))


def test_a_file_alone_of_a_kind_that_needs_its_config_is_told(
    opened: dict[str, Opened], tmp_path: Path
) -> None:
    for kind, name in (("eomt", "EoMT"), ("oneformer", "OneFormer"), ("maskformer", "MaskFormer")):
        folder = tmp_path / kind
        folder.mkdir()
        shutil.copy(opened[kind].folder / "model.safetensors", folder)
        with pytest.raises(UserError, match=f"is {name} by its tensors, but no config.json"):
            open_segmentor(str(folder))


def test_a_damaged_config_is_told(opened: dict[str, Opened], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(opened["eomt"].folder, folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="holds no JSON object"):
        open_segmentor(str(folder))
    (folder / "config.json").write_text('{"model_type": "eomt", "hidden_size": "wide"}')
    with pytest.raises(UserError, match="cannot build the EoMT"):
        open_segmentor(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        open_segmentor(str(folder))
    shutil.copy(opened["eomt"].folder / "config.json", folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": 0.5}')
    with pytest.raises(UserError, match="no sound mean and deviation"):
        open_segmentor(str(folder))


@pytest.mark.parametrize(
    ("name", "key", "value", "told"),
    [
        ("preprocessor_config.json", "rescale_factor", [1], "no sound mean"),
        ("preprocessor_config.json", "rescale_factor", 0, "no sound mean"),
        ("preprocessor_config.json", "image_std", [0.5, 0.0, 0.5], "no sound mean"),
        ("preprocessor_config.json", "image_mean", [0.5, float("nan"), 0.5], "no sound mean"),
        ("preprocessor_config.json", "metadata", {"thing_ids": ["a"]}, "thing_ids"),
        ("config.json", "image_size", [128, 128], "image_size|cannot build"),
        ("config.json", "image_size", 10**9, "image_size|million|cannot build"),
        ("config.json", "hidden_size", 1 << 20, "million parameters"),
        ("config.json", "num_hidden_layers", 10**6, "far fewer than its configuration needs"),
    ],
    ids=range(9),
)
def test_odd_values_beside_the_weights_are_told(
    opened: dict[str, Opened], tmp_path: Path, name: str, key: str, value: Any, told: str
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(opened["eomt"].folder, folder)
    path = folder / name
    held = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(held | {key: value}))
    with pytest.raises(UserError, match=told) as caught:
        open_segmentor(str(folder))
    assert str(folder) in caught.value.what


@pytest.mark.parametrize("size", [-1, 0.5, "large", [], {"shortest_edge": 10**9}], ids=range(5))
def test_sides_that_cannot_be_are_told(tmp_path: Path, size: Any) -> None:
    files = Files("m", tmp_path / "model.safetensors", {}, {"size": size})
    if size == []:  # as without one
        assert files.sizes == (800, 1333)
        return
    with pytest.raises(UserError, match=r"model\.safetensors gives .* for a side of pictures"):
        _ = files.sizes


def test_values_that_are_no_numbers_are_told(opened: dict[str, Opened], tmp_path: Path) -> None:
    for kind in ("eomt", "mask2former"):
        name = _LAST[kind]
        folder = _changed(opened[kind], tmp_path / kind, lambda t, n=name: t[n][0].fill_(torch.nan))
        with pytest.raises(UserError, match="holds values that are no numbers"):
            open_segmentor(str(folder))


def test_opening_reads_no_digest(
    opened: dict[str, Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of gigabytes is read once; who trains on top asks for the digest."""
    monkeypatch.setattr(segmentors, "sha256_of", lambda path: f"of {path.name}")
    found = open_segmentor(str(opened["mask2former"].folder))
    assert "sha256" not in vars(found) and found.sha256 == "of model.safetensors"


def test_deltas_to_gated_weights_are_refused(opened: dict[str, Opened], tmp_path: Path) -> None:
    folder = tmp_path / "coco_panoptic_eomt_large_640_dinov3"
    shutil.copytree(opened["eomt"].folder, folder)
    with pytest.raises(UserError, match="differences to weights that are given out behind a gate"):
        open_segmentor(str(folder))


def test_without_the_library_the_line_to_type_is_told(
    opened: dict[str, Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError) as caught:
        open_segmentor(str(opened["eomt"].folder))
    assert "pip install concat-seg[hub]" in caught.value.hint
    assert isinstance(open_segmentor(str(opened["mask2former"].folder)), PublishedSegmentor)


def test_colours_that_are_not_rescaled_or_not_normalised(
    opened: dict[str, Opened], tmp_path: Path
) -> None:
    """Mean and deviation of bytes, and none at all."""
    folder, images = tmp_path / "m", pictures(1, (64, 64))
    shutil.copytree(opened["maskformer"].folder, folder)
    of_bytes = {"do_rescale": False, "image_mean": [255 * v for v in MEAN],
                "image_std": [255 * v for v in STD]}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(of_bytes))
    with torch.no_grad():
        expected = opened["maskformer"].ours(images, None).mask_logits
        close(open_segmentor(str(folder))(images, None).mask_logits, expected, "bytes")
    (folder / "preprocessor_config.json").write_text('{"do_normalize": false}')
    masks, _ = published.their_outputs("maskformer", opened["maskformer"].theirs, images / 255)
    with torch.no_grad():
        close(open_segmentor(str(folder))(images, None).mask_logits, masks, "plain")


def test_an_eomt_saved_while_its_masks_were_annealed_draws_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = transformers.EomtForUniversalSegmentation(published.config_of("eomt"))
    theirs.attn_mask_probs.fill_(0.6)
    ours = open_segmentor(str(published.saved(theirs, tmp_path / "m", PREPROCESSOR)))
    assert isinstance(ours, PublishedSegmentor) and "annealed" in ours.notes[-1]
    images = pictures(1, (128, 128))
    with torch.no_grad():
        first, second = (ours(images, None).mask_logits for _ in range(2))
        assert torch.equal(first, second)
        theirs.attn_mask_probs.fill_(1.0)
        masks, _ = published.their_outputs("eomt", theirs.eval(), normalised(images))
    close(first, masks, "as with all masks")


def test_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: Any, **__: Any) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr(hub, "reachable", lambda: True)
    with pytest.raises(UserError, match="is not in the cache") as caught:
        open_segmentor("hf-hub:somebody/nothing-of-the-kind")
    assert "concat weights get hf-hub:somebody/nothing-of-the-kind" in caught.value.hint


PUBLISHED = ("swin_tiny_patch4_window7_224", "swin_large_patch4_window12_384", "resnet50")


@pytest.mark.parametrize("backbone", PUBLISHED)
def test_published_shapes_of_mask2former_fit(backbone: str) -> None:
    """The real sizes, 133 classes, names and shapes alone: each tensor has its place."""
    shape = m2f.swin_config(SWINS[backbone]) if backbone in SWINS else m2f.resnet_config()
    with torch.device("meta"):
        config = transformers.Mask2FormerConfig(backbone_config=shape, num_labels=133)
        theirs = transformers.Mask2FormerForUniversalSegmentation(config).state_dict()
        whole = mask2former_in("it", theirs)
        assert whole is not None
        renamed, keys = whole
        assert keys["backbone"] == backbone and keys["queries"] == 100
        ours = build_segmentor(ModelConfig(**keys, token_queries=False, mask_pooling=False), 1)
    state = ours.state_dict()
    left = {n for n in state if n not in renamed.tensors}
    assert all(n.startswith(("projector.", "classifier.")) for n in left), left
    assert all(state[n].shape == t.shape for n, t in renamed.tensors.items())


def test_a_published_shape_of_eomt(tmp_path: Path) -> None:
    """EoMT-S at 640: what comes out, without values."""
    config = transformers.EomtConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=640,
        num_blocks=3, num_queries=200, num_labels=133,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.EomtForUniversalSegmentation(config).eval()
        model.attn_mask_probs = torch.zeros(3, device="cpu")  # as when training has ended
        (tmp_path / "model.safetensors").write_bytes(b"")
        files = Files("it", tmp_path / "model.safetensors", config.to_dict(), {})
        ours = EoMT(model, files)
        found = ours(torch.zeros(2, 3, 640, 448, dtype=torch.uint8), None)
    assert ours.notes[-1].endswith("sides are 640-640.")
    assert ours.padded == (640, 640) and ours.vocabulary.names[:2] == ("person", "bicycle")
    assert found.mask_logits.shape == (2, 200, 160, 112)
    assert found.class_logits.shape == (2, 200, 134) and found.queries.shape == (2, 200, 384)
