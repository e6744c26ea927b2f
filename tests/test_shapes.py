"""The built-in world: the same everywhere, honest about its splits, and true COCO panoptic."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from mini import mini_config
from PIL import Image

from concat_cli.core.config import ShapesConfig
from concat_cli.core.data.dataset import PanopticDataset, read_dataset_info
from concat_cli.core.errors import UserError
from concat_cli.core.prepare import shapes as module
from concat_cli.core.prepare.shapes import differing_keys, prepare_shapes
from concat_cli.core.prepare.shapes_scene import (
    CLASSES,
    DEFAULT_UNSEEN,
    PARTS,
    SEED_BOUND,
    STUFF,
    THINGS,
    Scene,
    draw_scene,
    scene_seed,
    seen_indices,
    unseen_split,
)
from concat_cli.core.runs import Run
from concat_cli.methods.concat.con import train_con

CONFIG = ShapesConfig(train=12, dev=4, val=6, seed=5)
VOID = ShapesConfig(train=12, dev=4, val=6, seed=5, size=64, unseen_pixels="void")
UNSEEN = {CLASSES.index_of_name[name] for name in DEFAULT_UNSEEN}


class Heard:
    """A progress that remembers what was said and counts what was tracked."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.tracked = 0

    def say(self, message: str) -> None:
        self.lines.append(message)

    def track(self, items: Iterable, what: str, total: int | None = None):
        for item in items:
            self.tracked += 1
            yield item

    def status(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "shapes"
    prepare_shapes(out, CONFIG)
    return out


def digest(scene: Scene) -> str:
    ids = scene.segment_map.astype("<i4").tobytes()
    return hashlib.sha256(scene.image.tobytes() + ids).hexdigest()


@pytest.mark.parametrize(
    ("seed", "size", "expected"),
    [
        (0, 128, "f92f7e127f666373b7385a634b9de60d33ffcefeb295f44d2e5faa566e3fd6a4"),
        (1, 128, "00a28a078c189fa4f13d080e94b29a2703b9ba5d24a0013bbc47a4dd43a898fd"),
        (2**64 - 1, 128, "3cd4f324399b9fd84a4c7dc94ba04b3f9967c792e8dc01eda3952d0018b5a036"),
        (7, 256, "4cf1b2cdeb76d8dc7055fa9cfa6938099f18506381a899193b4c555d24931658"),
        (9, (96, 160), "13aa051792f9ebde4139cd9d3da93760d2cf36c58bf84bc24cfb8da0287eaf1b"),
        (11, (320, 512), "3a9a3210df400d9ae06ccd85f7126bbfb46637e036cea1b092d8aacaed589f7d"),
        (12, 32, "6b73887050582b91d19d4dd67b43f5e3c50f04f11d2ba56875161ee70ced5acb"),
    ],
)
def test_pixels_are_the_same_everywhere(
    seed: int, size: int | tuple[int, int], expected: str
) -> None:
    assert digest(draw_scene(seed, size)) == expected


def test_many_pixels_are_the_same_everywhere() -> None:
    total = hashlib.sha256()
    for seed in range(300):
        scene = draw_scene(seed)
        total.update(scene.image.tobytes() + scene.segment_map.astype("<i4").tobytes())
    assert total.hexdigest() == "d001edf8d4e98f47245efe7a84639f026daf781087171055e016aeca36299102"


def test_drawing_needs_no_numpy_generator_and_no_libm() -> None:
    folder = Path(module.__file__).parent
    source = "".join(path.read_text() for path in sorted(folder.glob("shapes*.py")))
    for name in ("random", "sin", "cos", "exp", "hypot", "interp", "power", "dot", "einsum"):
        assert f"np.{name}" not in source
    assert "import math" not in source


@pytest.mark.parametrize("size", [128, (128, 200), 64])
def test_scenes_are_covered_and_composed_as_said(size: int | tuple[int, int]) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    unit = min(height, width) / 128
    for seed in range(60):
        scene = draw_scene(seed, size)
        assert scene.image.shape == (height, width, 3) and scene.image.dtype == np.uint8
        assert scene.segment_map.shape == (height, width) and scene.segment_map.dtype == np.int32
        assert scene.labels.dtype == np.int64
        areas = np.bincount(scene.segment_map.ravel(), minlength=len(scene.labels) + 1)
        assert areas[0] == 0 and len(areas) == len(scene.labels) + 1
        stuff = scene.labels >= len(THINGS)
        assert 1 <= stuff.sum() <= 3 and 2 <= (~stuff).sum() <= 5
        assert len(set(scene.labels[stuff].tolist())) == stuff.sum()
        assert areas[1:].min() >= 40 * unit * unit
        assert areas[1:][stuff].min() >= 0.05 * height * width


def test_scenes_hold_allowed_classes_only() -> None:
    allowed = {3, 17, 41}
    labels = [draw_scene(seed, 64, allowed).labels for seed in range(30)]
    assert set(np.concatenate(labels).tolist()) == allowed
    assert set(draw_scene(1, 64, [44]).labels.tolist()) == {44}


def test_train_and_dev_draw_no_unseen_class() -> None:
    allowed = seen_indices(DEFAULT_UNSEEN)
    unseen = {CLASSES.index_of_name[name] for name in DEFAULT_UNSEEN}
    met = Counter()
    for part, index in product(("train", "dev"), range(150)):
        met.update(draw_scene(scene_seed(part, 0, index), 48, allowed).labels.tolist())
    assert not unseen & set(met)
    assert set(met) == set(allowed)


def test_every_class_is_met_evenly() -> None:
    met = Counter()
    for index in range(300):
        met.update(draw_scene(scene_seed("val", 0, index), 48).labels.tolist())
    assert set(met) == set(range(48))
    assert min(met.values()) >= 8


def test_classes() -> None:
    assert len(CLASSES) == 48 and CLASSES.ids == tuple(range(1, 49))
    assert CLASSES.is_thing == (True,) * 40 + (False,) * 8
    assert len(set(CLASSES.names)) == 48 and CLASSES.names[40:] == STUFF


def check_split(unseen: tuple[str, ...]) -> None:
    assert len(unseen) == 10 and len(set(unseen)) == 10
    things = [name.split() for name in unseen if name in THINGS]
    stuff = [name.split() for name in unseen if name in STUFF]
    assert len(things) == 8 and len(stuff) == 2
    assert len({shape for _, shape in things}) == 8
    assert max(Counter(pattern for pattern, _ in things).values()) <= 2
    seen = [name.split() for name in CLASSES.names if name not in unseen]
    for first, second in things + stuff:
        assert any(words[0] == first for words in seen)
        assert any(words[1] == second for words in seen)


def test_every_split_keeps_each_word_seen() -> None:
    assert unseen_split() == ("default", DEFAULT_UNSEEN)
    check_split(DEFAULT_UNSEEN)
    splits = [unseen_split("", seed) for seed in range(50)]
    for seed, (name, unseen) in enumerate(splits):
        assert name == f"seed-{seed}" and unseen == unseen_split("", seed)[1]
        check_split(unseen)
    assert len({unseen for _, unseen in splits} | {DEFAULT_UNSEEN}) == 51


def test_splits_by_seed_stay_as_they_are() -> None:
    names = ";".join(name for seed in (1, 2, 101, 102) for name in unseen_split("", seed)[1])
    assert hashlib.sha256(names.encode()).hexdigest()[:16] == "f1f6acfd7940bf25"


def test_unseen_by_names() -> None:
    assert unseen_split(" Green  Water;striped star;; ") == (
        "custom",
        ("striped star", "green water"),
    )


@pytest.mark.parametrize(
    ("names", "what", "hint"),
    [
        ("striped starr", "striped starr", "striped star"),
        ("purple cow", "purple cow", "It has"),
        ("red brick", '"red"', "red brick"),
        ("grey brick; grey wood", '"grey"', "grey brick, grey wood"),
        ("; ".join(n for n in THINGS if "star" in n), '"star"', "striped star"),
        ("; ".join(n for n in THINGS if "dotted" in n), '"dotted"', "dotted ring"),
        (" ; ;", "No class name", "striped star"),
    ],
)
def test_bad_unseen_names(names: str, what: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        unseen_split(names)
    assert what in error.value.what and hint in error.value.hint


def test_scene_seeds_are_disjoint() -> None:
    seeds = (0, 1, 2, 12345, SEED_BOUND - 1)
    places = (0, 1, 2, 499, 3999, 2**31, 2**32 - 1)
    drawn = [scene_seed(*key) for key in product(PARTS, seeds, places)]
    assert len(set(drawn)) == len(drawn) == len(PARTS) * len(seeds) * len(places)
    assert min(drawn) >= 0 and max(drawn) < 2**64
    # One bit field each: (part, seed, index) can be read back, so no two can ever be equal.
    for part, seed, index in product(PARTS, seeds, places):
        code = scene_seed(part, seed, index)
        assert (PARTS[(code >> 60) - 1], code >> 32 & (SEED_BOUND - 1), code & 0xFFFFFFFF) == (
            part,
            seed,
            index,
        )
    with pytest.raises(AssertionError):
        scene_seed("val", SEED_BOUND, 0)


def test_pictures_of_all_parts_differ() -> None:
    """Also where the sets are drawn for different splits: the seed differs, so the layout does."""
    sets = {"default": DEFAULT_UNSEEN, "one": unseen_split("", 1)[1]}
    pictures = set()
    for part, index in product(PARTS, range(40)):
        for unseen in sets.values():
            allowed = seen_indices(unseen) if part in ("train", "dev") else None
            pictures.add(
                (part, draw_scene(scene_seed(part, 0, index), 32, allowed).image.tobytes())
            )
    assert len({picture for _, picture in pictures}) == len(pictures)


@pytest.mark.parametrize("part", ["train", "dev", "val"])
def test_coco_panoptic_format(drawn: Path, part: str) -> None:
    info = json.loads((drawn / "dataset.json").read_text())
    place = info["parts"][part]
    table = json.loads((drawn / place["json"]).read_text())
    assert len(table["images"]) == len(table["annotations"]) == getattr(CONFIG, part)
    assert [c["id"] for c in table["categories"]] == list(range(1, 49))
    assert [c["name"] for c in table["categories"]] == list(CLASSES.names)
    assert sum(c["isthing"] for c in table["categories"]) == 40
    assert len({tuple(c["color"]) for c in table["categories"]}) == 48
    unseen = {CLASSES.ids[CLASSES.index_of_name[name]] for name in info["unseen"]}
    for index, (image, row) in enumerate(zip(table["images"], table["annotations"], strict=True)):
        scene = draw_scene(
            scene_seed(part, CONFIG.seed, index),
            CONFIG.size,
            None if part == "val" else seen_indices(info["unseen"]),
        )
        pixels = np.asarray(Image.open(drawn / place["images"] / image["file_name"]))
        assert (pixels == scene.image).all()
        assert pixels.shape == (image["height"], image["width"], 3)
        assert row["image_id"] == image["id"]
        code = np.asarray(Image.open(drawn / place["pngs"] / row["file_name"])).astype(int)
        ids = code @ np.array([1, 256, 65536])
        assert sorted(np.unique(ids)) == sorted(s["id"] for s in row["segments_info"])
        assert all(s["id"] > 255 for s in row["segments_info"])
        for number, segment in enumerate(row["segments_info"]):
            mask = ids == segment["id"]
            assert (mask == (scene.segment_map == number + 1)).all()
            ys, xs = np.nonzero(mask)
            assert segment["area"] == len(ys) and segment["iscrowd"] == 0
            x, y = xs.min(), ys.min()
            assert segment["bbox"] == [x, y, xs.max() - x + 1, ys.max() - y + 1]
            assert segment["category_id"] == CLASSES.ids[scene.labels[number]]
            assert part == "val" or segment["category_id"] not in unseen


def test_image_ids_and_names_differ_between_parts(drawn: Path) -> None:
    names = [p.name for part in ("train", "dev", "val") for p in (drawn / part).iterdir()]
    assert len(set(names)) == len(names) == 22
    assert min(names) == "000000000001.png"


def test_the_reader_reads_it(drawn: Path) -> None:
    dataset = pytest.importorskip("concat_cli.core.data.dataset")
    info = dataset.read_dataset_info(drawn)
    assert info.name == "shapes" and info.class_split == "default"
    assert info.vocabulary.unseen_indices == CLASSES.with_unseen(DEFAULT_UNSEEN).unseen_indices
    sample = dataset.PanopticDataset(info.parts["val"], info.vocabulary)[2]
    scene = draw_scene(scene_seed("val", CONFIG.seed, 2), CONFIG.size)
    assert (sample.image == scene.image).all()
    assert sorted(sample.labels.tolist()) == sorted(scene.labels.tolist())
    assert (sample.segment_map > 0).all()


def test_rerun_draws_nothing(drawn: Path) -> None:
    heard = Heard()
    prepare_shapes(drawn, CONFIG, heard)
    assert heard.tracked == 0 and "nothing to draw" in heard.lines[0]


def test_other_config_in_the_same_folder_is_refused(drawn: Path) -> None:
    before = (drawn / "dataset.json").read_bytes()
    with pytest.raises(UserError) as error:
        prepare_shapes(drawn, ShapesConfig(train=12, dev=4, val=6, seed=6))
    assert "seed 5 there, 6 asked" in error.value.what and "rm -r" in error.value.hint
    assert (drawn / "dataset.json").read_bytes() == before


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError) as error:
        prepare_shapes(tmp_path, CONFIG)
    assert "not empty" in error.value.what and "rm" not in error.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="is a file"):
        prepare_shapes(tmp_path / "thesis.tex", CONFIG)


def test_a_broken_run_leaves_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def full(path: Path, pixels: np.ndarray) -> None:
        written.append(path)
        if len(written) > 9:
            raise OSError(28, "No space left on device")

    out = tmp_path / "shapes"
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_png", full)
        with pytest.raises(UserError) as error:
            prepare_shapes(out, CONFIG, processes=1)
    assert "No space" in error.value.what and "free some space" in error.value.hint
    assert not out.exists()
    prepare_shapes(out, CONFIG, processes=1)
    assert (out / "dataset.json").is_file()


@pytest.mark.skipif(os.name != "posix", reason="a process's life cannot be told there")
def test_the_leavings_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    out = tmp_path / "shapes"
    kill = (
        "import os, signal; from pathlib import Path\n"
        "from concat_cli.core.config import ShapesConfig\n"
        "from concat_cli.core.prepare import shapes as m\n"
        "m.protocol.keep_seen = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"m.prepare_shapes(Path({str(out)!r}), ShapesConfig(train=2, dev=1, val=1))\n"
    )
    assert subprocess.run([sys.executable, "-c", kill], check=False).returncode == -9
    assert [p.name.startswith(".drawing") for p in out.iterdir()] == [True]
    prepare_shapes(out, ShapesConfig(train=2, dev=1, val=1))
    assert sorted(p.name for p in out.iterdir()) == [
        "annotations",
        "dataset.json",
        "dev",
        "train",
        "val",
    ]


def test_several_processes_write_the_same(tmp_path: Path) -> None:
    cfg = ShapesConfig(train=120, dev=1, val=1, size=32)
    for processes in (1, 2):
        prepare_shapes(tmp_path / str(processes), cfg, processes=processes)
    one, two = (
        {p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.*")}
        for n in ("1", "2")
    )
    assert one == two and len(one) == 2 * 122 + 4


def test_custom_split_in_any_order_is_one_data_set(tmp_path: Path) -> None:
    out = tmp_path / "shapes"
    small = {"train": 2, "dev": 1, "val": 1, "size": 32}
    prepare_shapes(out, ShapesConfig(**small, unseen="green water; striped star"))
    heard = Heard()
    prepare_shapes(out, ShapesConfig(**small, unseen="Striped Star;green water"), heard)
    assert heard.tracked == 0
    info = json.loads((out / "dataset.json").read_text())
    assert info["class_split"] == "custom" and info["unseen"] == ["striped star", "green water"]


def test_a_seed_out_of_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"shapes\.seed"):
        prepare_shapes(tmp_path / "shapes", ShapesConfig(seed=SEED_BOUND))


# --- unseen pixels void: the protocol of semantic zero-shot segmentation -----------------------


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("void") / "shapes"
    prepare_shapes(out, VOID, processes=1)
    return out


def truth(part: str, index: int, cfg: ShapesConfig = VOID) -> Scene:
    """The scene as it was drawn: of all classes."""
    return draw_scene(scene_seed(part, cfg.seed, index), cfg.size)


@pytest.mark.parametrize("part", ["train", "dev", "val"])
def test_void_tells_no_unseen_label_and_no_unseen_mask(hidden: Path, part: str) -> None:
    """Checked in the files themselves, against the scenes drawn anew."""
    info = read_dataset_info(hidden)
    place = info.part(part)
    rows = json.loads(place.index.read_text())["annotations"]
    met = 0
    for index, row in enumerate(rows):
        scene = truth(part, index)
        pixels = np.asarray(Image.open(place.images / row["file_name"]))
        assert (pixels == scene.image).all()  # every picture is shown as it is
        code = np.asarray(Image.open(place.labels / row["file_name"])).astype(int)
        ids = code @ np.array([1, 256, 65536])
        unseen = [n for n, label in enumerate(scene.labels.tolist(), 1) if label in UNSEEN]
        gone = np.isin(scene.segment_map, [] if part == "val" else unseen)
        assert ((ids == 0) == gone).all()
        kept = [n for n in range(1, len(scene.labels) + 1) if part == "val" or n not in unseen]
        assert len(row["segments_info"]) == len(kept)
        assert set(np.unique(ids[ids > 0])) == {s["id"] for s in row["segments_info"]}
        for number, segment in zip(kept, row["segments_info"], strict=True):
            assert segment["category_id"] == CLASSES.ids[scene.labels[number - 1]]
            mask = ids == segment["id"]
            assert (mask == (scene.segment_map == number)).all() and segment["area"] == mask.sum()
        met += len(unseen)
    assert met > 0  # unseen things and stuff are in the pictures
    samples = PanopticDataset(place, info.vocabulary)
    labels = {label for i in range(len(samples)) for label in samples[i].labels.tolist()}
    assert bool(labels & UNSEEN) == (part == "val")


def test_void_says_what_it_took_away(hidden: Path) -> None:
    scenes = [truth("train", i) for i in range(12)] + [truth("dev", i) for i in range(4)]
    found = read_dataset_info(hidden).protocol
    by_class = Counter(
        CLASSES.names[label] for scene in scenes for label in set(scene.labels.tolist()) & UNSEEN
    )
    segments = [int(label) in UNSEEN for scene in scenes for label in scene.labels]
    pixels = [
        (scene.segment_map == n).sum()
        for scene in scenes
        for n, label in enumerate(scene.labels.tolist(), 1)
        if label in UNSEEN
    ]
    assert found == {
        "unseen_pixels": "void",
        "images_listed": 16,
        "pixels_listed": 16 * 64 * 64,
        "images_dropped": 0,
        "segments_dropped": 0,
        "pixels_dropped": 0,
        "segments_void": sum(segments),
        "pixels_void": sum(pixels),
        "images_by_class": {name: by_class[name] for name in CLASSES.names if by_class[name]},
    }


def test_void_draws_the_same_again_and_val_as_ever(hidden: Path, tmp_path: Path) -> None:
    again, dropped = tmp_path / "again", tmp_path / "drop"
    prepare_shapes(again, VOID, processes=1)
    prepare_shapes(dropped, replace(VOID, unseen_pixels="drop"), processes=1)
    one, two, drop = (
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*.*")}
        for root in (hidden, again, dropped)
    )
    assert one == two
    val = [path for path in one if "val" in str(path)]
    assert len(val) == 13 and all(one[path] == drop[path] for path in val)
    train = [path for path in one if path.parts[0] == "train"]
    assert sum(one[path] != drop[path] for path in train) > 6  # unseen classes are drawn


def test_drop_and_void_are_two_data_sets(drawn: Path, hidden: Path) -> None:
    for folder, cfg, there in ((drawn, CONFIG, "drop"), (hidden, VOID, "void")):
        other = "void" if there == "drop" else "drop"
        with pytest.raises(UserError) as error:
            prepare_shapes(folder, replace(cfg, unseen_pixels=other))
        assert f"(unseen_pixels '{there}' there, '{other}' asked)" in error.value.what
        source = read_dataset_info(folder).source
        assert differing_keys(source, replace(cfg, unseen_pixels=other)) == {
            "unseen_pixels": (there, other)
        }
        assert differing_keys(source, cfg) == {}


def test_a_world_of_earlier_versions_is_known_again(drawn: Path, tmp_path: Path) -> None:
    """Its dataset.json says nothing of unseen pixels."""
    header = json.loads((drawn / "dataset.json").read_text())
    assert "unseen_pixels" not in header["source"]
    assert header.pop("protocol")["unseen_pixels"] == "drop"
    (tmp_path / "dataset.json").write_text(json.dumps(header))
    heard = Heard()
    prepare_shapes(tmp_path, CONFIG, heard)
    assert heard.tracked == 0 and "nothing to draw" in heard.lines[0]


def test_training_draws_and_takes_a_void_world(tmp_path: Path) -> None:
    keys = "shapes.train=8 shapes.dev=2 shapes.val=2 shapes.size=64 optim.steps=2 warmup.steps=1"
    cfg = mini_config(tmp_path / "shapes", *keys.split(), "shapes.unseen_pixels=void")
    result = train_con(cfg, Run("void", tmp_path), device="cpu")
    assert result.finished and result.steps == 2
    assert read_dataset_info(tmp_path / "shapes").protocol["segments_void"] > 0
    usual = replace(cfg, shapes=replace(cfg.shapes, unseen_pixels="drop"))
    with pytest.raises(UserError, match="unseen_pixels is 'void', not 'drop'") as caught:
        train_con(usual, Run("other", tmp_path), device="cpu")
    assert "Give shapes.unseen_pixels=void" in caught.value.hint
