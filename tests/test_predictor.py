"""Pictures of any size in, predictions out; loading from a weights file."""

from __future__ import annotations

import gc
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from types import FunctionType, ModuleType

import numpy as np
import pytest
import torch
from mini import Heard
from PIL import Image

from concat_cli.core.build import build_segmentor
from concat_cli.core.checkpoint import load_weights, save_weights
from concat_cli.core.clip import tiny
from concat_cli.core.clip.encoder import load_clip
from concat_cli.core.config import ClipConfig, Config, InferConfig, ModelConfig
from concat_cli.core.config_file import to_dict
from concat_cli.core.data.image_io import read_id_png, write_png
from concat_cli.core.device import Share
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.files import evaluate_files
from concat_cli.core.infer.files import image_ids, output_names, predict_paths
from concat_cli.core.infer.pictures import to_array
from concat_cli.core.infer.predictor import Loading, Predictor, at_test, named_by
from concat_cli.core.infer.render import overlay
from concat_cli.core.vocabulary import ClassEntry, Vocabulary

VOCABULARY = Vocabulary(
    (
        ClassEntry("solid star", 1),
        ClassEntry("dotted star", 4, seen=False),
        ClassEntry("red brick", 9, kind="stuff"),
    )
)
MODEL = ModelConfig(width=32, mask_width=32, heads=4, encoder_ffn=32, decoder_layers=1,
                    decoder_ffn=32, queries=6)  # fmt: skip
CFG = InferConfig(size=64, max_size=128, min_score=0.05, overlap=0.1, batch=3)


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    text = torch.nn.functional.normalize(torch.randn(3, 16), dim=-1)
    return Predictor(build_segmentor(MODEL, 16).eval(), text, VOCABULARY, CFG)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (5000, 40), (3, 700), (97, 131)])
def test_any_size(predictor, size):
    found = predictor(picture(*size))
    assert found.panoptic_map.shape == size and found.panoptic_map.dtype == np.int32
    assert found.semantic_map.shape == size
    assert found.semantic_map.min() >= 0 and found.semantic_map.max() < 3
    assert found.milliseconds.keys() == {"load", "model", "post"}
    assert len(found.names) == len(found.segments)
    overlay(picture(*size), found)


def test_a_batch_equals_single_pictures(predictor):
    pictures = [picture(h, w, i) for i, (h, w) in enumerate(
        [(64, 64), (80, 70), (64, 64), (40, 90), (64, 64), (64, 64)]
    )]  # fmt: skip
    together = predictor.predict_batch(pictures)
    assert any(found.segments for found in together)
    for found, one in zip(together, pictures, strict=True):
        alone = predictor(one)
        assert (found.panoptic_map != alone.panoptic_map).mean() < 0.01
        assert found.names == alone.names
        assert (found.semantic_map != alone.semantic_map).mean() < 0.01


def test_one_picture_or_a_list_of_them(predictor, tmp_path):
    array = picture(70, 50)
    write_png(tmp_path / "p.png", array)
    forms = (array, tmp_path / "p.png", str(tmp_path / "p.png"), Image.fromarray(array))
    alone = predictor(array)
    assert all((found.panoptic_map == alone.panoptic_map).all() for found in predictor(forms))
    assert predictor([]) == [] and len(predictor([array])) == 1
    with pytest.raises(UserError, match="nowhere"):
        predictor(tmp_path / "nowhere.jpg")


@pytest.mark.parametrize("height", [1, 3, 20])
def test_arrays_and_tensors_of_many_forms_are_one_picture(height):
    rgb = picture(height, 30)
    first = np.moveaxis(rgb, -1, 0)
    opaque = np.dstack((rgb, np.full(rgb.shape[:2], 255, np.uint8)))
    forms = [rgb, rgb / 255, (rgb / 255).astype(np.float16), opaque, torch.tensor(first) / 255]
    forms += [first, torch.tensor(first), Image.fromarray(rgb), Image.fromarray(opaque)]
    forms += [torch.tensor(rgb)] if height == 20 else []  # else its rows may be channels
    for form in forms:
        found = to_array(form)
        assert found.dtype == np.uint8 and (found == rgb).all(), form
    grey = rgb[..., 0]
    for form in (grey, grey[..., None], grey[None], torch.tensor(grey), Image.fromarray(grey)):
        assert (to_array(form) == grey[..., None]).all() and to_array(form).shape == rgb.shape
    clear = np.dstack((rgb, np.zeros(rgb.shape[:2], np.uint8)))
    assert (to_array(clear) == 255).all() and (to_array(Image.fromarray(clear)) == 255).all()


@pytest.mark.parametrize(
    ("odd", "what"),
    [
        (np.zeros((8, 8, 3), np.int64), r"array \(8, 8, 3\) of int64"),
        (np.full((8, 8, 3), 255.0), "values from 255 to 255"),
        (np.full((8, 8), np.nan), "values from nan"),
        (np.zeros((8, 8, 2), np.uint8), r"\(8, 8, 2\)"),
        (np.zeros((0, 8, 3), np.uint8), r"\(0, 8, 3\)"),
        (np.zeros(8, np.uint8), r"\(8,\)"),
        (np.zeros((8, 8), bool), "of bool"),
        (torch.zeros(2, 3, 8, 8), r"tensor \(2, 3, 8, 8\) of torch.float32"),
        (7, "a int"),
    ],
)
def test_what_is_no_picture_is_refused(predictor, odd, what):
    with pytest.raises(UserError, match=what) as caught:
        predictor(odd)
    assert "as a list" in caught.value.hint


def reachable(root):
    """Everything that a value keeps alive, less modules, classes and functions."""
    seen, todo = {}, [root]
    while todo:
        one = todo.pop()
        if id(one) not in seen and not isinstance(one, (type, ModuleType, FunctionType)):
            seen[id(one)] = one
            todo += gc.get_referents(one)
    return seen.values()


@pytest.mark.parametrize("semantic", [True, False])
def test_a_prediction_holds_plain_values(predictor, semantic):
    found = predictor(picture(60, 80), semantic=semantic)
    assert not any(isinstance(one, torch.Tensor) for one in reachable(found))
    again = pickle.loads(pickle.dumps(found))
    assert again.names == found.names and again.segments == found.segments
    assert (again.panoptic_map == found.panoptic_map).all()
    if semantic:
        assert (again.semantic_map == found.semantic_map).all()
    else:
        with pytest.raises(UserError, match="semantic=False"):
            _ = again.semantic_map


def test_an_empty_result_is_valid(predictor, tmp_path):
    none = Predictor(
        predictor.model, predictor.text, VOCABULARY, InferConfig(size=64, min_score=1.0)
    )
    found = none(picture(30, 40))
    assert found.segments == () and not found.panoptic_map.any()
    write_png(tmp_path / "a.png", picture(30, 40))
    predicted = predict_paths(none, [tmp_path / "a.png"], tmp_path / "out")
    content = json.loads(predicted.index.read_text())
    assert content["annotations"][0]["segments_info"] == []
    assert not list((tmp_path / "out").glob(".*"))


def test_files_of_an_earlier_run_are_told(predictor, tmp_path):
    """They stay, but nobody takes them for what was predicted now; nor for what a kill left."""
    for number in (1, 2):
        write_png(tmp_path / f"{number}.png", picture(60, 80, number))
    said, out = Heard(), tmp_path / "out"
    predict_paths(predictor, [tmp_path / "1.png"], out, progress=said)
    predict_paths(predictor, [tmp_path / "1.png"], out, progress=said)
    assert not said.lines
    predict_paths(predictor, [tmp_path / "2.png"], out, progress=said)
    assert len(said.lines) == 1 and "2 files of an earlier run" in said.lines[0]
    assert "panoptic.json does not list them" in said.lines[0]


def test_files_are_valid_for_scoring(predictor, tmp_path):
    paths = [tmp_path / f"{number}.png" for number in (2, 1)]
    for number, path in zip((2, 1), paths, strict=True):
        write_png(path, picture(60, 80, number))
    predicted = predict_paths(predictor, paths, tmp_path / "out")
    for path, one in zip(paths, predicted.pictures, strict=True):
        found = predictor(path)
        assert found.segments and one.path == path
        assert (read_id_png(one.png) == found.panoptic_map).all()
        assert Image.open(one.overlay).size == (80, 60)
    index = predicted.index
    content = json.loads(index.read_text())
    assert [image["id"] for image in content["images"]] == [1, 2]
    assert [c["id"] for c in content["categories"]] == [1, 4, 9]
    for segment in content["annotations"][0]["segments_info"]:
        assert segment.keys() >= {"id", "category_id", "area", "bbox", "iscrowd", "score"}
    groups = evaluate_files(index, index, unseen=["dotted star"]).panoptic
    assert groups["all"] is not None and groups["all"].pq == 1


def test_processes_share_the_pictures(predictor, tmp_path):
    """Two of them, here threads, write what one does."""
    paths = [tmp_path / f"{number}.png" for number in (5, 3, 4)]
    for number, path in enumerate(paths):
        write_png(path, picture(60, 80, number))
    parts, all_there = [None, None], Barrier(2)

    def run(rank):
        def gather(value):
            parts[rank] = value
            all_there.wait(timeout=60)
            found = list(parts)
            all_there.wait(timeout=60)
            return found

        return predict_paths(predictor, paths, tmp_path / "two", share=Share(rank, 2, gather))

    alone = predict_paths(predictor, paths, tmp_path / "one")
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(run, (0, 1)))
    found = list(both[0].pictures)  # the first process has what all did
    assert [p.path for p in found] == paths and found[0].id == 5
    assert [p.segments for p in found] == [p.segments for p in alone.pictures]
    assert both[1].index == both[0].index and not len(both[1].pictures)
    files = [sorted(p for p in (tmp_path / name).rglob("*.*")) for name in ("one", "two")]
    assert [p.name for p in files[0]] == [p.name for p in files[1]] and len(files[0]) == 7
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def test_equal_stems_get_different_names():
    inputs = [
        "a/cat.jpg",
        "b/cat.jpg",
        "a/cat.png",
        "dog.jpg",
        "DOG.png",
        "x/bird.jpg",
        "x/bird.jpg",
    ]
    names = output_names([Path(name) for name in inputs])
    assert len({name.casefold() for name in names}) == len(inputs)
    assert names[3:5] == ["dog_jpg", "DOG_png"]
    assert output_names([Path("a/cat.jpg"), Path("b/dog.jpg")]) == ["cat", "dog"]
    tricky = ["x/cat.jpg", "y/cat.jpg", "x_cat_jpg.png"]
    assert len(set(output_names([Path(name) for name in tricky]))) == 3


def test_image_ids_come_from_coco_names():
    assert image_ids(["000000142238", "000000439180"]) == [142238, 439180]
    assert image_ids(["000000142238", "cat"]) == [1, 2]
    assert image_ids(["1", "01"]) == [1, 2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    if not tiny.FILES["tiny"].is_file():
        pytest.skip("the built-in CLIP is not here")
    clip = load_clip(Config().clip, image_tower=False)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    cfg = Config(model=MODEL, infer=CFG)
    torch.manual_seed(0)
    state = build_segmentor(MODEL, clip.embed_dim).state_dict()
    meta = {
        "format": 1, "stage": "con", "config": to_dict(cfg), "vocabulary": VOCABULARY.to_json(),
        "trained": ["solid star", "red brick"],
        "clip": {"model": "tiny", "pretrained": "", "sha256": clip.identity.sha256},
    }  # fmt: skip
    save_weights(path, {f"segmentor.{k}": v for k, v in state.items()}, meta)
    return path


def test_load_from_weights_and_a_vocabulary_file(weights, tmp_path):
    file = tmp_path / "classes.txt"
    file.write_text("red brick\nstriped heart, solid star\ngreen water : stuff\n")
    found = Predictor.load(weights, file, "cpu", cache_dir=tmp_path)
    assert found.vocabulary.names == ("red brick", "striped heart", "green water")
    assert found.vocabulary.is_thing == (False, True, False)
    assert found.vocabulary.is_seen == (True, True, False)  # by name or synonym
    assert found.cfg == CFG and found.meta["stage"] == "con" and found.dtype is None
    assert found(picture(50, 60)).panoptic_map.shape == (50, 60)


def test_load_defaults_to_the_vocabulary_of_the_weights(weights, tmp_path):
    found = Predictor.load(weights, device="cpu", cache_dir=tmp_path)
    assert found.vocabulary.names == VOCABULARY.names
    assert found.vocabulary.is_seen == (True, False, True)


def test_texts_in_the_cache_need_no_clip(weights, tmp_path, monkeypatch):
    first = Predictor.load(weights, device="cpu", cache_dir=tmp_path)

    def refuse(*_args, **_keys):
        raise AssertionError("CLIP is loaded")

    monkeypatch.setattr("concat_cli.core.infer.predictor.load_clip", refuse)
    again = Predictor.load(weights, device="cpu", cache_dir=tmp_path)
    assert torch.equal(again.text, first.text) and again(picture(50, 60)).names is not None
    with pytest.raises(UserError, match="zebra"):  # words are checked all the same
        Predictor.load(weights, ["zebra"], "cpu", cache_dir=tmp_path)
    with pytest.raises(AssertionError, match="CLIP is loaded"):
        Predictor.load(weights, ["striped heart"], "cpu", cache_dir=tmp_path)


def test_clip_is_loaded_once_and_again_for_its_image_tower(weights):
    known = load_weights(weights)
    loading = Loading(known, at_test(known), named_by(known), torch.device("cpu"))
    small = loading.clip(image_tower=False)
    assert loading.clip(image_tower=False) is small and not small.has_image_tower
    whole = loading.clip(image_tower=True)
    assert whole.has_image_tower and loading.clip(image_tower=False) is whole


def test_names_as_a_list(weights, tmp_path):
    names = ["red brick", "striped heart, solid star", "green water : stuff"]
    found = Predictor.load(weights, names, "cpu", cache_dir=tmp_path).vocabulary
    assert found.names == ("red brick", "striped heart", "green water")
    assert found.is_thing == (False, True, False) and found.is_seen == (True, True, False)
    for wrong, what in (([], "no class"), (["cat", "Cat"], "twice"), (["cat : beast"], "beast")):
        with pytest.raises(UserError, match=what):
            Predictor.load(weights, wrong, "cpu", cache_dir=tmp_path)


def test_what_may_be_asked_for_at_test(weights, tmp_path):
    keys = ["infer.size=96", "infer.batch=2"]
    found = Predictor.load(weights, device="cpu", overrides=keys, cache_dir=tmp_path)
    assert found.cfg == replace(CFG, size=96, batch=2)
    whole = Config(infer=replace(CFG, size=32), clip=ClipConfig(model="other"))
    found = Predictor.load(weights, device="cpu", overrides=whole, cache_dir=tmp_path)
    assert found.cfg.size == 32  # and nothing else of it counts
    with pytest.raises(UserError, match=r"model\.width cannot be changed") as caught:
        Predictor.load(weights, device="cpu", overrides=["model.width=64"], cache_dir=tmp_path)
    assert "infer.min_score" in caught.value.hint


def test_words_that_the_built_in_clip_never_saw(weights, tmp_path):
    file = tmp_path / "classes.txt"
    file.write_text("zebra\n")
    with pytest.raises(UserError, match="zebra"):
        Predictor.load(weights, file, "cpu", cache_dir=tmp_path)
    assert Predictor.load(weights, file, "cpu", cache_dir=tmp_path, force=True)


def test_weights_of_another_clip(weights, tmp_path):
    known = load_weights(weights)
    other = known.meta | {"clip": known.meta["clip"] | {"sha256": "0" * 64}}
    save_weights(tmp_path / "o.safetensors", known.tensors, other)
    with pytest.raises(UserError, match="CLIP"):
        Predictor.load(tmp_path / "o.safetensors", device="cpu", cache_dir=tmp_path)
