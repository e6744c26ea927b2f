"""What `fuzz.py` spoils: sound files of every kind that is read, and what a user does with them.

Everything is drawn or trained at random here; nothing is stored.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import published_helpers as published
import torch
import yaml
from data_helpers import official_part, write_part
from drawn_labelme import pixels, shape, write_labelme
from drawn_yolo import draw_yolo
from fuzz_helpers import INSTANCES, prepare_and_read, read_all, write_instances
from PIL import Image
from safetensors.torch import save_file
from scipy.io import savemat

from concat_cli.core.build import build_segmentor
from concat_cli.core.checkpoint import load_state, load_weights, save_state, save_weights
from concat_cli.core.clip.encoder import ClipIdentity
from concat_cli.core.clip.prompts import cached_texts
from concat_cli.core.clip.tokens import TokenCache
from concat_cli.core.config import CatConfig, Config, InferConfig, ModelConfig
from concat_cli.core.config_file import SHIPPED, dump_yaml, load_config, to_dict
from concat_cli.core.evaluate.files import evaluate_files
from concat_cli.core.infer.pictures import to_array
from concat_cli.core.infer.predictor import Predictor
from concat_cli.core.metadata import FORMAT
from concat_cli.core.model.swin import SWINS
from concat_cli.core.prepare.run import Options, prepare_data
from concat_cli.core.runs import Run
from concat_cli.core.segmentors.source import open_segmentor
from concat_cli.core.vocabulary import ClassEntry, Vocabulary
from concat_cli.core.vocabulary_file import parse_vocabulary
from concat_cli.core.weights_from import files as weights_from
from concat_cli.core.weights_from.files import read_tensors
from concat_cli.methods.clip_zss.config import ClipZssConfig
from concat_cli.methods.clip_zss.student import build_student
from concat_cli.methods.concat.generator import build_generator, restore_generator
from concat_cli.methods.concat.on_borrowed import facts_of, on_top
from concat_cli.methods.zegformer.config import ZegFormerConfig
from concat_cli.methods.zegformer.maskformer import build_zegformer

GOLDEN = Path(__file__).parent / "golden" / "pq"
CLIP_WIDTH = 128  # of the built-in one
CLASSES = Vocabulary(
    (
        ClassEntry("solid circle", 1, ("red ring",)),
        ClassEntry("green water", 2, kind="stuff"),
        ClassEntry("striped star", 7, seen=False),
    )
)
MODEL = ModelConfig(
    width=32, mask_width=32, heads=4, encoder_ffn=32, decoder_ffn=32, decoder_layers=2, queries=6
)
CFG = Config(
    model=MODEL,
    cat=CatConfig(layers=1, primitives=8, heads=4, ffn=32),
    infer=InferConfig(size=64, max_size=96, min_score=0.0),
)
PICTURE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)


@dataclass(frozen=True)
class Target:
    """One kind of input.

    make: (folder) writes sound files. files: patterns of those that are spoilt. use: (folder) what
    a user does; what it returns tells whether a spoilt file changed the result. share: of all
    inputs. why: what may be accepted with another result, and why that is right.
    """

    make: Callable[[Path], object]
    files: tuple[str, ...]
    use: Callable[[Path], object]
    share: int
    why: str


def digest(*values: Any) -> str:
    """Of arrays, tensors and plain values."""
    found = hashlib.sha256()
    for value in values:
        value = value.numpy() if isinstance(value, torch.Tensor) else value
        found.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return found.hexdigest()


def _meta(stage: str, cfg: Config, **more: Any) -> dict[str, Any]:
    return {
        "format": FORMAT, "version": "1", "stage": stage, "step": 3, "config": to_dict(cfg),
        "vocabulary": CLASSES.to_json(), "trained": ["solid circle", "green water"], "taught": [],
        "clip": {"model": "tiny", "pretrained": "", "sha256": ""},
        "data": {"name": "shapes", "class_split": "default", "filtering": {}},
    } | more  # fmt: skip


def _named(part: str, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {f"{part}.{name}": tensor for name, tensor in module.state_dict().items()}


def _concat(folder: Path) -> None:
    torch.manual_seed(0)
    tensors = _named("segmentor", build_segmentor(MODEL, CLIP_WIDTH))
    tensors |= _named("generator", build_generator(CFG.cat, CLIP_WIDTH, MODEL.width))
    save_weights(folder / "w.safetensors", tensors, _meta("cat", CFG))


def _zegformer(folder: Path) -> None:
    torch.manual_seed(0)
    cfg = CFG.with_own(replace(CFG.own(ZegFormerConfig), branch="segment"))
    tensors = _named("segmentor", build_zegformer(cfg, CLIP_WIDTH))
    save_weights(folder / "w.safetensors", tensors, _meta("zegformer", cfg))


def _clip_zss(folder: Path) -> None:
    torch.manual_seed(0)
    cfg = CFG.with_own(ClipZssConfig(head_width=16))
    tensors = _named("student", build_student(cfg.own(ClipZssConfig), CLIP_WIDTH))
    save_weights(folder / "w.safetensors", tensors, _meta("clip_zss", cfg))


def _published(kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        preprocessor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 128}
        published.saved(published.random_model(kind), folder, preprocessor)

    return make


def know_the_toy() -> None:
    """Makes the small Swin of the published ones one that is built here."""
    toy = published.TOY
    SWINS[published.SWIN_TOY] = toy
    weights_from._SWINS[toy.width, toy.depths[2]] = "toy"
    weights_from._SIDES[toy.window] = 128


def _on_borrowed(folder: Path) -> None:
    _published("mask2former")(folder / "there")
    torch.manual_seed(0)
    segmentor = open_segmentor(str(folder / "there"))
    built = on_top(segmentor, MODEL, CLIP_WIDTH)  # pyright: ignore[reportArgumentType]
    facts = facts_of(segmentor) | {"source": "there"}  # pyright: ignore[reportArgumentType]
    save_weights(
        folder / "w.safetensors", _named("segmentor", built), _meta("con", CFG, published=facts)
    )


def _predicted(folder: Path) -> str:
    """Both models of a weights file, and what they find in a picture."""
    weights = load_weights(folder / "w.safetensors")
    published_ = weights.meta.get("published")
    if isinstance(published_, dict) and published_.get("source") == "there":
        published_["source"] = str(folder / "there")  # as the working directory is not the folder
    if weights.stage == "cat":
        restore_generator(weights)
    predictor = Predictor.load(weights, device="cpu")
    if predictor.cfg.max_size > 512 or len(predictor.vocabulary) > 99:
        return f"not run: {predictor.cfg}"  # it takes time and memory as it was asked to
    found = predictor(PICTURE)
    return digest(found.panoptic_map, found.segments, found.vocabulary)


def _segmentor(folder: Path) -> str:
    found: Any = open_segmentor(str(folder))
    return digest(found.vocabulary, found.size, found.max_size, *found.state_dict().values())


def _elsewhere(folder: Path) -> None:
    torch.manual_seed(0)
    values = {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(3), "steps": torch.tensor(7)}
    save_file(values, folder / "w.safetensors", {"format": "pt"})
    torch.save({"model": values, "epoch": 3}, folder / "w.pth")


def _run(folder: Path) -> Run:
    return Run("mine", folder)


def _stage(folder: Path) -> None:
    stage = _run(folder).stage("finetune-words")
    stage.open(CFG, inputs={"weights": "ab" * 32, "vocabulary": "cat : thing"})
    for step in range(5):
        stage.append_metrics({"step": step, "loss": 0.5, "dev": {"score": 0.1}})
    save_state(stage.state, {"step": 3, "module": {"a": torch.ones(3)}, "best": 0.5})
    _concat(stage.path)
    (stage.path / "w.safetensors").rename(stage.last)
    (folder / "words.txt").write_text("cat\n")


def _resumed(folder: Path) -> str:
    run, words = _run(folder), folder / "words.txt"
    stage = run.stage("finetune-words")
    taught = run.was_taught(words)
    rows = stage.read_metrics()
    stage.forget_metrics_after(3)
    inputs = {"weights": "ab" * 32, "vocabulary": "cat : thing"}
    stage.open(CFG, inputs=inputs)
    state = load_state(stage.state)
    return digest(taught, rows, state, stage.config_yaml.read_text())


def _configuration(folder: Path) -> None:
    (folder / "mine.yaml").write_text(dump_yaml(CFG, full=True))
    shutil.copy(SHIPPED / "concat_coco_119_14.yaml", folder / "shipped.yaml")


def _words(folder: Path) -> None:
    (folder / "a.txt").write_text("cat, kitten\nsky : stuff\n# no\ntraffic light\n")
    rows = ["cat", {"name": "sky", "kind": "stuff", "synonyms": ["heaven"]}, "traffic light"]
    (folder / "b.json").write_text(json.dumps(rows))
    (folder / "c.yaml").write_text(yaml.safe_dump(rows))


def _coco(folder: Path) -> None:
    write_part(official_part(folder, "train"), {1: [3, 20], 2: [3, 21], 3: [20]})
    write_part(official_part(folder, "val"), {4: [3, 7, 20]})
    (folder / "split.yaml").write_text("unseen: [cow]\nallow_missing: true\n")


def _coco_in_zips(folder: Path) -> None:
    _coco(folder)
    for inner in ("train2017", "val2017"):
        with zipfile.ZipFile(folder / f"{inner}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted((folder / inner).iterdir()):
                archive.write(path, f"{inner}/{path.name}")
        shutil.rmtree(folder / inner)


def _prepared(folder: Path) -> None:
    _coco(folder)
    prepare_and_read(folder)


def _prepare(folder: Path) -> str:
    options = Options(class_split=str(folder / "split.yaml"), processes=1, unseen_pixels="void")
    prepare_data("coco", folder, folder / "out", options)
    return read_all(folder / "out")


def _read_and_prepared(folder: Path) -> str:
    """As it is, then prepared again: what was checked, and can be made again, is."""
    found = read_all(folder / "out")
    return digest(found, prepare_and_read(folder))


def _maps(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("grey", "mat", "images"):
        (folder / name).mkdir()
    for number in range(2):
        values = rng.integers(0, 3, (24, 32)).astype(np.uint8)
        Image.fromarray(values).save(folder / "grey" / f"{number}.png")
        savemat(folder / "mat" / f"{number}.mat", {"LabelMap": values}, do_compression=number > 0)
        picture = values.repeat(3).reshape(24, 32, 3)
        Image.fromarray(picture).save(folder / "images" / f"{number}.jpg")
    (folder / "classes.txt").write_text("road : stuff = 0\ncar, automobile = 1\nvoid = 2\n")


def _from_maps(folder: Path) -> str:
    found: list[str] = []
    for labels in ("grey", "mat"):
        shutil.rmtree(folder / "out", ignore_errors=True)
        given = {"images": "images", "labels": labels, "classes": "classes.txt"}
        found.append(prepare_and_read(folder, "custom", **given))
    return digest(found)


def _from_instances(folder: Path) -> str:
    return prepare_and_read(folder, "custom", **INSTANCES)


def _labelme(folder: Path) -> None:
    ring = np.ones((8, 9), bool)
    ring[3:5, 3:6] = False
    for name in ("a", "sub/b"):
        shapes = [
            shape("dog", "polygon", [[2, 3], [12, 3], [12, 9], [2, 9]], group_id=1),
            shape("cat", "circle", [[30, 20], [36, 20]]),
            pixels("dog", ring, 40, 20, group_id=1),
        ]
        write_labelme(folder / f"{name}.json", shapes)


def _from_labelme(folder: Path) -> str:
    shutil.rmtree(folder / "out", ignore_errors=True)
    return prepare_and_read(folder, "custom", json=".")


def _from_yolo(folder: Path) -> str:
    shutil.rmtree(folder / "out", ignore_errors=True)
    return prepare_and_read(folder, "custom", yolo="data.yaml")


def _pictures(folder: Path) -> None:
    picture = Image.fromarray(PICTURE)
    for ending in ("png", "jpg", "webp", "tif", "bmp", "gif"):
        picture.save(folder / f"p.{ending}")
    Image.fromarray(PICTURE[..., 0].astype(np.uint16) * 200).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    picture.save(folder / "turned.jpg", exif=exif)


def _decoded(folder: Path) -> str:
    return digest(*(to_array(path) for path in sorted(folder.iterdir())))


def _scored(folder: Path) -> str:
    report = evaluate_files(folder / "pred.json", folder / "gt.json").to_json()
    return digest(json.dumps(report, sort_keys=True))


def _panoptic_files(folder: Path) -> None:
    shutil.copytree(GOLDEN, folder, dirs_exist_ok=True)
    (folder / "expected.json").unlink()


class _Words:
    """A stand-in for CLIP's text tower."""

    identity = ClipIdentity("tiny", "", "ab" * 32)
    device = torch.device("cpu")

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        rows = [np.frombuffer(hashlib.sha256(t.encode()).digest(), np.uint8) for t in texts]
        return torch.nn.functional.normalize(torch.tensor(np.stack(rows)).float(), dim=-1)


def _texts(folder: Path) -> str:
    words: Any = _Words()
    rows = [["cat", "kitten"], ["sky"]]
    return digest(cached_texts("ab" * 32, rows, lambda: words, folder))


def _tokens(folder: Path) -> str:
    words: Any = _Words()
    cache = TokenCache(folder, words.identity, 8)
    keys = [bytes([n]) * 16 for n in range(6)]
    rows = torch.arange(48.0).reshape(6, 8)
    return digest(cache._tokens(words, keys, lambda missing: rows[missing]))


_NO_SUM = "no digest lies beside it: other values of the same form are another input"
_WEIGHTS = (
    "keys that no prediction reads; other thresholds, sizes, names or kinds that stand in the "
    "schema's ranges; a changed finite value of a tensor: a file carries no digest of its own"
)
_ANNOTATIONS = "another id, category, name or number that is one, or a key that nothing reads"
TARGETS: dict[str, Target] = {
    "weights of CONCAT": Target(_concat, ("w.safetensors",), _predicted, 9, _WEIGHTS),
    "weights of ZegFormer": Target(_zegformer, ("w.safetensors",), _predicted, 4, _WEIGHTS),
    "weights of CLIP-ZSS": Target(_clip_zss, ("w.safetensors",), _predicted, 4, _WEIGHTS),
    "weights on borrowed masks": Target(_on_borrowed, ("w.safetensors",), _predicted, 4, _WEIGHTS),
    "published Mask2Former": Target(
        _published("mask2former"), ("*.json", "*.safetensors"), _segmentor, 5, _NO_SUM
    ),
    "published EoMT": Target(
        _published("eomt"), ("*.json", "*.safetensors"), _segmentor, 5, _NO_SUM
    ),
    "weights from elsewhere": Target(
        _elsewhere, ("*",), lambda folder: digest(*(
            sorted(read_tensors(path).items()) for path in sorted(folder.iterdir())
        )), 4, _NO_SUM,
    ),
    "run files": Target(
        _stage, ("mine/*/*.yaml", "mine/*/*.json*", "mine/*/*.pt", "mine/*/*.safetensors",
                 "words.txt"), _resumed, 8,
        "metrics are a log: a line that is none is left out; weights' keys as above",
    ),
    "configurations": Target(
        _configuration, ("*.yaml",),
        lambda folder: digest(*(load_config(path) for path in sorted(folder.iterdir()))), 7,
        "another value in its key's range",
    ),
    "vocabularies": Target(
        _words, ("*",),
        lambda folder: digest(*(parse_vocabulary(path) for path in sorted(folder.iterdir()))), 7,
        "any line without control characters is a name",
    ),
    "COCO panoptic": Target(
        _coco, ("annotations/*.json", "annotations/*/*.png", "*2017/*", "split.yaml"), _prepare, 10,
        _ANNOTATIONS,
    ),
    "COCO in zips": Target(_coco_in_zips, ("*.zip",), _prepare, 4, "members that nothing reads"),
    "COCO instances": Target(
        write_instances, ("annotations/*.json", "*2017/*"), _from_instances, 8, _ANNOTATIONS
    ),
    "label maps and class tables": Target(
        _maps, ("classes.txt", "grey/*", "mat/*"), _from_maps, 5, _NO_SUM
    ),
    "labelme": Target(_labelme, ("*.json", "*/*.json", "*.jpg"), _from_labelme, 4, _ANNOTATIONS),
    "YOLO polygons": Target(
        draw_yolo, ("data.yaml", "labels/*/*", "images/*/*"), _from_yolo, 4, _ANNOTATIONS
    ),
    "prepared data": Target(_prepared, ("out/**/*.json*",), _read_and_prepared, 6, _ANNOTATIONS),
    "pictures": Target(_pictures, ("*",), _decoded, 6, _NO_SUM),
    "panoptic files that are scored": Target(
        _panoptic_files, ("*.json", "*/*.png"), _scored, 6, _ANNOTATIONS
    ),
    "cache of texts": Target(_texts, ("text/*",), _texts, 3, "none: damage is computed again"),
    "cache of CLS tokens": Target(
        _tokens, ("tokens/*/*",), _tokens, 2, "a row has no digest: other finite values are a token"
    ),
}  # fmt: skip
