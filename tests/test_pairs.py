"""Published pairs as weights: opened by every name, told from ours, and fetched by no accident."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hub_helpers import Hub, Repository, no_network, running
from PIL import Image

from concat_cli.app import main
from concat_cli.commands import doctor
from concat_cli.core import checkpoint
from concat_cli.core.checkpoint import Weights, open_weights
from concat_cli.core.config import ClipConfig
from concat_cli.core.data.dataset import read_dataset_info
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate import compare
from concat_cli.core.evaluate.scores import Scoring
from concat_cli.core.evaluate.weights import _protocol, open_subject
from concat_cli.core.infer.predictor import Predictor, at_test, named_by, told
from concat_cli.core.method import Method, methods
from concat_cli.core.progress import SILENT
from concat_cli.core.runs import BUILT_IN, find_weights
from concat_cli.core.segmentors import PublishedSegmentor
from concat_cli.core.vocabulary import ClassEntry, Vocabulary
from concat_cli.core.weights_from.published import DEFAULT, pairs
from concat_cli.methods.borrowed import weights as borrowed

PHOTOS = pairs()[DEFAULT]
OWN = ("person", "cat", "grass-merged")
RANDOM = "clip.pretrained=random"  # a CLIP that is here


def segmentor(source: str, names: tuple[str, ...] = OWN) -> PublishedSegmentor:
    """One that opens; it has no weights."""
    found = PublishedSegmentor()
    found.source, found.sha256, found.width, found.count = source, "b" * 64, 8, 4
    kinds = ("thing", "thing", "stuff")
    found.vocabulary = Vocabulary(
        tuple(ClassEntry(name, i, kind=kinds[i % 3]) for i, name in enumerate(names))
    )
    return found.eval()


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Segmentors open by any name; what was opened. There is no network, and the cache is empty."""
    asked: list[str] = []

    def opened(source: str) -> PublishedSegmentor:
        asked.append(source)
        return segmentor(source)

    monkeypatch.setattr(borrowed, "open_segmentor", opened)
    no_network(monkeypatch, tmp_path / "hub")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    return asked


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize(
    ("name", "clip"),
    [
        ("photos", PHOTOS), ("fc-clip", pairs()["fc-clip"]),
        ("photos-siglip", pairs()["photos-siglip"]),
        (f"hf-hub:{pairs()['eomt-large'].segmentor.repository}", pairs()["eomt-large"]),
        ("hf-hub:org/unlisted", PHOTOS),
    ],
)  # fmt: skip
def test_a_pair_has_the_clip_of_its_entry(published: list[str], name: str, clip) -> None:
    found = open_weights(Path(name))
    assert published == [name] and found.stage == "borrowed" and not found.tensors
    config = found.meta["config"]
    assert config["model"]["segmentor"] == name
    assert (config["clip"]["model"], config["clip"]["pretrained"]) == (
        clip.clip.model, clip.clip.pretrained,
    )  # fmt: skip
    assert found.meta["clip"]["sha256"] == "" and found.meta["trained"] == [*OWN, "grass"]
    assert named_by(found).names == OWN and named_by(found).is_thing == (True, True, False)
    line = borrowed.told(at_test(found))
    assert clip.clip.model in line and ("not listed" in line) == ("unlisted" in name)
    other = at_test(found, ["clip.model=RN50", "clip.pretrained=openai"])
    assert borrowed.told(other).endswith("CLIP RN50 openai (as asked)")
    other = at_test(found, ["clip.pretrained=random"])
    assert borrowed.told(other).endswith(f"CLIP {clip.clip.model} random (as asked)")
    assert isinstance(borrowed.restore(found), PublishedSegmentor)
    assert published == [name], "which is opened once"


def test_weights_of_ours_come_first(published: list[str], tmp_path: Path) -> None:
    """As a file, in a folder, from the hub; and no segmentor is asked for."""
    folder = tmp_path / "ours"
    cached = tmp_path / "hub" / "models--org--ours"
    snapshot = cached / "snapshots" / "abc"
    for place in (folder, snapshot, cached / "refs"):
        place.mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    for place in (folder, snapshot):
        shutil.copy(BUILT_IN, place / "model.safetensors")
    expected = open_weights(BUILT_IN)
    for given in (str(BUILT_IN), folder, "hf-hub:org/ours", Path("hf-hub:org/ours")):
        found = open_weights(given)
        assert found.sha256 == expected.sha256 and found.tensors.keys() == expected.tensors.keys()
        assert open_weights(given, tensors=False).meta == expected.meta
    assert published == []
    for more in range(0, 256, 8):  # the length of the header begins the file, whatever it is
        meta = expected.meta | {"note": "x" * more}
        checkpoint.save_weights(tmp_path / "any.safetensors", {"a": torch.zeros(1)}, meta)
        assert open_weights(tmp_path / "any.safetensors").stage == expected.stage
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(BUILT_IN.read_bytes()[:5000])
    with pytest.raises(UserError, match="no complete weights file"):
        open_weights(cut)
    with pytest.raises(UserError, match=r"no file none\.safetensors") as caught:
        open_weights("none.safetensors")
    assert "concat weights" in caught.value.hint and published == []
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.bin")
    assert open_weights(tmp_path / "model.bin").stage == "borrowed", "a method's to judge"


def opens_all(given: str) -> Weights:
    """As a method of somebody else's."""
    return Weights({}, {"stage": "mine"}, Path(given), "")


def opens_none(_: str) -> None:
    """As one that does not know them."""


def test_installed_methods_are_asked_before_the_built_in_ones(
    published: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def method(opens: str) -> Method:
        return Method("x", (), "", "", "", "", opens=f"{__name__}:{opens}")

    monkeypatch.setattr(checkpoint, "methods", lambda: (*methods(), method("opens_none")))
    assert open_weights("photos").stage == "borrowed"
    monkeypatch.setattr(checkpoint, "methods", lambda: (*methods(), method("opens_all")))
    assert open_weights("photos").stage == "mine" and published == ["photos"]


def test_names_and_folders_of_published_weights_are_handed_through(tmp_path: Path) -> None:
    for name in ("photos", "hf-hub:org/name", "some.bin"):
        assert find_weights(None, Path(name)).path == Path(name)
    (tmp_path / "m2f").mkdir()
    with pytest.raises(UserError, match="holds no weights"):
        find_weights(None, tmp_path / "m2f")
    (tmp_path / "m2f" / "config.json").write_text("{}")
    assert find_weights(None, tmp_path / "m2f").path == tmp_path / "m2f"
    (tmp_path / "photos").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert find_weights(None, Path("photos")).path == Path("photos"), "the name comes first"


def test_to_predict_fetches_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the segmentor nor the CLIP, though the hub is there."""
    part = PHOTOS.clip.part
    page = Repository({"open_clip_model.safetensors": b"-", "model.safetensors": b"-"})
    hub = Hub({part.repository: page, PHOTOS.segmentor.repository: page})
    with running(hub, monkeypatch, tmp_path / "hub"):
        with pytest.raises(UserError, match="photos is not in the cache") as caught:
            Predictor.load("photos", ["dog"])
        assert "concat weights get photos" in caught.value.hint
        pair = borrowed.pair(
            segmentor("photos"), ClipConfig(PHOTOS.clip.model, "laion2b_s34b_b88k")
        )
        with pytest.raises(UserError, match=r"CLIP ViT-B-16 laion2b_s34b_b88k is not in the cache"):
            Predictor.load(pair, ["dog"])
        pair = borrowed.open_weights  # with the CLIP of the list:
        monkeypatch.setattr(borrowed, "open_segmentor", segmentor)
        with pytest.raises(UserError, match="CLIP ViT-B-16 datacomp") as caught:
            Predictor.load(pair("photos"), ["dog"])
        assert "concat weights get photos" in caught.value.hint
    assert hub.asked == []


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """The exit code, stdout and stderr."""
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("names", "classes", "source"),
    [
        (["--classes", "dog; cat, kitten; grass : stuff;"], "dog, cat, grass", "3 of --classes"),
        (["--classes", "one\ntwo"], "one, two", "2 of --classes"),
        (["--vocab", "-"], "lamp, sky", "2 of standard input"),
        ([], "person, cat, grass-merged", "3 of the weights"),
    ],
)
def test_classes_from_everywhere(
    published: list[str], photo: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, names: list[str], classes: str, source: str,
) -> None:  # fmt: skip
    text = "\ufefflamp  # on the left\n\nsky : stuff\n"
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    asked = ["predict", photo, "--weights", "photos", *names, "--dry-run", "--set", RANDOM]
    code, out, _ = call(capsys, *asked)
    assert code == 0 and classes in out and source in out and "note" not in out


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["--classes", "dog", "--vocab", "-"], "exclude each other"),
        (["--classes", " ; "], 'names no class. hint: Write --classes "dog; cat, kitten;'),
        (["--classes", "dog; cat; Dog"], "'Dog' stands twice in the vocabulary: --classes, item 1"),
        (["--classes", "dog: animal"], "unknown kind 'animal'"),
        (["--vocab", "dog; cat"], "The names themselves go to --classes"),
        (["--vocab", "-"], "not UTF-8 (byte 1)"),
    ],
)
def test_classes_that_are_none(
    published: list[str], photo: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, names: list[str], what: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"a\xff")))
    code, _, err = call(capsys, "predict", photo, "--weights", "photos", *names, "--dry-run")
    assert code == 2 and what in " ".join(err.split())


def test_one_class_with_many_commas_is_doubted(
    published: list[str], photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", photo, "--weights", "photos", "--classes", "dog, cat, sofa", "--dry-run"]
    _, out, _ = call(capsys, *words)
    assert out.count("read as 1 class with 2 synonyms; separate classes by ;") == 1

    class Said:
        def __init__(self) -> None:
            self.lines: list[str] = []

        track, status = SILENT.track, SILENT.status

        def say(self, message: str) -> None:
            self.lines.append(message)

    said = Said()
    predictor = Predictor.load(BUILT_IN, ["star, ring, cross"], "cpu", progress=said, force=True)
    assert len(predictor.vocabulary) == 1
    assert sum("read as 1 class with 2 synonyms" in line for line in said.lines) == 1
    assert "names 1 class (things 1, stuff 0; trained with labels: 0)" in said.lines
    said.lines.clear()
    Predictor.load(BUILT_IN, ["star, ring", "cross"], "cpu", progress=said, force=True)
    assert not any("read as" in line for line in said.lines)


def test_a_plan_says_that_the_clip_is_not_here(
    published: list[str], photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, "predict", photo, "--weights", "photos", "--dry-run")
    assert code == 2 and "CLIP ViT-B-16 datacomp_xl_s13b_b90k is not in the cache" in err


def test_a_name_that_is_nearly_one_is_asked_about(
    published: list[str], photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, "predict", photo, "--weights", "fotos")
    assert code == 2 and "Did you mean photos" in err and "`concat weights` lists" in err


def test_a_published_segmentor_is_not_exported(
    published: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, "export", "out", "--weights", "photos")
    assert code == 2 and "photos stands on a published segmentor" in err


@pytest.mark.parametrize(
    ("command", "keys"),
    [("zegformer", ()), ("clip-zss", ("shapes.unseen_pixels=drop",))],
)
def test_what_trains_no_borrowed_masks_says_so(
    published: list[str], mini_world: Path, command: str, keys: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    drawn = [f"data.root={mini_world}", "shapes.train=24", "shapes.dev=8", "shapes.val=12"]
    drawn += ["shapes.size=64", *keys, "segmentor=photos"]
    for more in ([], ["--dry-run"]):
        code, _, err = call(capsys, f"train-{command}", *drawn, *more, "--device", "cpu")
        told = " ".join(err.split())
        assert code == 2 and "model.segmentor=photos" in told and "concat train-con" in told


def test_a_list_is_read_as_a_list() -> None:
    """Each item is a class: none is left out as a comment, and rows of YAML will do."""
    weights = open_weights(BUILT_IN, tensors=False)
    names = ["#1 fan", "sky : stuff", {"name": "cat", "synonyms": ["kitten"]}]
    found = named_by(weights, names)
    assert found.names == ("#1 fan", "sky", "cat") and found.entries[2].synonyms == ("kitten",)
    assert told(found) == "names 3 classes (things 2, stuff 1; trained with labels: 0)"
    assert named_by(weights, ["cat\n dog"]).names == ("cat dog",)
    for wrong in (["cat", " "], ["cat; dog"], []):
        with pytest.raises(UserError, match="The list"):
            named_by(weights, wrong)


def test_the_built_in_weights_say_what_is_for_photos(
    photo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photo.parent)
    _, out, _ = call(capsys, "predict", photo, "--device", "cpu", "--set", "infer.size=32")
    line = "for photos: `concat weights get photos`, then --weights photos"
    assert out.count(line) == 1
    code, _, err = call(capsys, "predict", photo, "--classes", "dog; cat")
    assert code == 2 and "`concat weights get photos`, then --weights photos" in err


def test_labels_of_unseen_classes_are_told_and_a_split_is_refused(
    published: list[str], mini_world: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Where the data set is the one whose classes the segmentor knows."""
    info = read_dataset_info(mini_world)
    names, unseen = info.vocabulary.names, len(info.vocabulary.unseen_indices)
    monkeypatch.setattr(borrowed, "open_segmentor", lambda source: segmentor(source, names))
    key = f"data.root={mini_world}"
    subject = open_subject(Path("photos"), [key], tensors=False)
    assert not subject.foreign and len(subject.leaked()) == unseen > 0
    protocol = _protocol(subject, SILENT)
    assert protocol["unseen_with_labels"] == unseen and protocol["filtering"] == {}
    assert protocol["weights"] == "photos" and protocol["stage"] == "borrowed"
    evaluate = ["evaluate", "--weights", "photos", key, "--dry-run"]
    code, out, _ = call(capsys, *evaluate, RANDOM)
    assert code == 0 and "borrowed" in out
    code, _, err = call(capsys, *evaluate)
    assert code == 2 and "CLIP ViT-B-16 datacomp_xl_s13b_b90k is not in the cache" in err
    split = [*evaluate, RANDOM, "--split", "unseen"]
    code, _, err = call(capsys, *split)
    assert code == 2 and f"labels of {unseen} of the unseen classes" in err and "--force" in err
    assert call(capsys, *split, "--force")[0] == 0
    assert len(subject.candidates(Scoring(split="unseen", force=True))) == len(names)
    code, _, err = call(capsys, "evaluate", "--weights", "photos", "--dry-run")
    assert code == 2 and "data.root=data/ade" in err


def test_a_data_set_of_other_classes_is_divided_by_name(
    published: list[str], mini_world: Path
) -> None:
    subject = open_subject(Path("photos"), [f"data.root={mini_world}"], tensors=False)
    assert subject.foreign and subject.leaked() == []
    assert subject.info.class_split == "by the names trained on"
    assert _protocol(subject, SILENT)["overlap"]["count"] == 0


def test_pairs_are_compared_by_what_they_are(
    published: list[str], mini_world: Path, tmp_path: Path
) -> None:
    entry = compare.parse_entry("mine=photos:infer.size=320", tmp_path)
    assert (entry.label, entry.weights) == ("mine", Path("photos"))
    assert compare.parse_entry("hf-hub:org/name").weights == Path("hf-hub:org/name")
    Path("folder").mkdir()
    Path("folder/config.json").write_text("{}")
    assert compare.parse_entry("folder").weights == Path("folder")
    key = f"data.root={mini_world}"
    subjects = [
        open_subject(Path(name), [key, *more], tensors=False)
        for name, more in (
            ("photos", ()), ("fc-clip", ()), ("photos", ("clip.model=RN50", "clip.pretrained=x")),
        )
    ]  # fmt: skip
    clips = [compare._clip_of(one)[1] for one in subjects]
    listed = PHOTOS.clip
    assert clips[0] == f"{listed.model} {listed.pretrained}" and clips[2] == "RN50 x"
    assert len(set(clips)) == 3
    assert compare._trained_on(subjects[0]) == ("COCO panoptic", "COCO panoptic")


def test_doctor_tells_which_pairs_are_here(published: list[str], tmp_path: Path) -> None:
    (check,) = doctor._published()
    assert check.state == "missing" and check.todo.endswith("concat weights get photos")
    for part in PHOTOS.parts:
        root = tmp_path / "hub" / f"models--{part.repository.replace('/', '--')}"
        (root / "snapshots" / "abc").mkdir(parents=True)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text("abc")
        for name in (*part.others, part.weights[0]):
            (root / "snapshots" / "abc" / name).write_bytes(b"-")
    (check,) = doctor._published()
    assert (check.name, check.state) == ("--weights photos", "ok")
    assert "133 classes of COCO panoptic" in check.found
