"""The command line: the examples of every help, results and errors as a person sees them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import export_helpers
import numpy as np
import pytest
from drawn_labelme import shape, write_labelme
from drawn_layouts import CASES
from drawn_own import draw_own
from drawn_yolo import draw_yolo
from hub_helpers import no_network
from PIL import Image
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from concat_cli.app import main
from concat_cli.commands.options import every_example
from concat_cli.commands.train import resume_command
from concat_cli.console import Console, ConsoleProgress, duration, show_error
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.cost import Cost
from concat_cli.core.infer.files import predict_paths
from concat_cli.core.progress import Progress

SCENES = ["--train", "8", "--dev", "2", "--val", "3", "--size", "64"]
DRAWN = ["shapes.train=8", "shapes.dev=2", "shapes.val=3", "shapes.size=64"]  # the same as keys
SMALL = """
    shapes.train=8 shapes.dev=2 shapes.val=3 shapes.size=64 warmup.steps=1
    model.width=32 model.mask_width=32 model.heads=2 model.queries=6 model.decoder_layers=1
    model.encoder_ffn=32 model.decoder_ffn=32 data.crop=64 infer.size=64 infer.max_size=64
    loss.points=32 align.instance=0.5 align.image=0.1 optim.steps=2 optim.batch_size=4
    optim.per_device=4 optim.warmup=1 optim.precision=fp32 optim.save_every=1 cat.primitives=8
    cat.ffn=32 cat.heads=2 cat.layers=1 cat.steps=2 cat.eval_every=1 cat.batch=8 cat.negatives=8
    cat.fold=2
    finetune.steps=2 finetune.batch=16 infer.min_score=0.0
""".split()  # fmt: skip
SMALL_ZSS = """
    shapes.train=8 shapes.dev=2 shapes.val=3 shapes.size=64 shapes.unseen_pixels=drop
    data.root=data/shapes data.crop=64 infer.size=64 infer.max_size=64 clip_zss.head_width=32
    clip_zss.pseudo=false clip_zss.synthesizer=0 optim.steps=2 optim.batch_size=4
    optim.per_device=4 optim.warmup=1 optim.precision=fp32
""".split()  # fmt: skip
NO_COST = Cost(1, False, {"semantic": 1.0, "panoptic": None}, 1.0, "cpu", 1)
Output = tuple[int, str, str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where every example can run: drawn data, COCO's layout, a run, a photo, a list."""
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["prepare-data", "shapes", "data/shapes", *SCENES]) == 0
        assert main(["train-con", *SMALL]) == main(["train-cat"]) == main(["finetune"]) == 0
        unaligned = [*SMALL, "align.instance=0", "align.image=0", "warmup.masks=1"]
        assert main(["train-zegformer", *unaligned]) == 0
        assert main(["train-clip-zss", *SMALL_ZSS]) == 0
    coco = root / "data" / "coco"
    for part, name in (("train", "train2017"), ("val", "val2017")):
        shutil.copytree(root / "data/shapes" / part, coco / name)
        pngs = root / f"data/shapes/annotations/panoptic_{part}"
        shutil.copytree(pngs, coco / "annotations" / f"panoptic_{name}")
        shutil.copy(pngs.with_suffix(".json"), coco / "annotations" / f"panoptic_{name}.json")
    shutil.copytree(root / "runs/shapes", root / "runs/demo")
    shutil.copytree(Path(__file__).parents[1] / "configs", root / "configs")
    draw_layouts(root / "data")
    (root / "split.yaml").write_text("unseen: [cow]")
    (root / "classes.txt").write_text("solid star\nstriped ring\ngreen water : stuff\n")
    scene = sorted((root / "data/shapes/val").iterdir())[0]
    Image.open(scene).convert("RGB").save(root / "photo.jpg")
    return root


def draw_layouts(data: Path) -> None:
    """Each data set that the examples prepare, where they look for it."""
    for case, folder in (
        ("coco-stuff", "coco"),
        ("coco instances", "coco"),
        ("coco instances 65 zips", "coco"),
        ("voc trainaug", "voc"),
        ("context mat 459 zip", "voc"),
        ("ade semantic", "ade"),
        ("ade full", "ade-full"),
        ("cityscapes", "cityscapes"),
    ):
        CASES[case].draw(data / folder)
    own = data / "own"
    draw_own(own)
    write_labelme(own / "labelme" / "one.json", [shape("cat", "rectangle", [[6, 4], [24, 20]])])
    draw_yolo(own)


@pytest.fixture
def inside(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(world)
    return world


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> Output:
    """Exit code, stdout and stderr of a command line."""
    capsys.readouterr()
    code = main(list(arguments))
    return code, *capsys.readouterr()


def each_example() -> Iterator[str]:
    for lines in every_example().values():
        for line in lines:
            yield from line.split(" && ")


def check_told(code: int, err: str) -> None:
    """A mistake whose mending is told."""
    assert code == 2 and "concat weights get photos" in err


@pytest.mark.parametrize("line", sorted(set(each_example())))
def test_every_example_runs(
    line: str, inside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long ones with --dry-run, drawn worlds with few scenes; data on disk are drawn for the test,
    with other classes than COCO's, or with unseen ones in every image. What a model costs is
    measured in test_compare.py."""
    monkeypatch.setattr("concat_cli.core.evaluate.compare.measure_cost", lambda *_: NO_COST)
    words = shlex.split(line)[1:]
    if words[0] == "serve":
        pytest.skip("runs until it is ended: test_serve_process.py starts it")
    if "photos" in words and words[0] != "prepare-data":  # which are not here: nothing is fetched
        no_network(monkeypatch, inside / "hub")
        code, _, err = call(capsys, *words)
        return check_told(code, err)
    if words[0] in ("train-con", "train-cat", "finetune", "train-zegformer"):
        words = [*words, "--dry-run", *DRAWN]
    if words[0] == "train-clip-zss":
        preview = "--preview" in words
        voc = any("voc" in word for word in words)
        words = [*words, *(["--fresh"] if not preview else []), *([] if voc else SMALL_ZSS)]
    if words[0] == "compare":
        words = [*words, "--bootstrap", "20"]
    if words[1:] == ["model.onnx"]:
        pytest.skip("takes a minute: test_onnx.py runs it")
    if words[0] in ("export", "texts"):
        export_helpers.written(Path("runs/own/con/last.safetensors"))
    if words[:2] == ["prepare-data", "shapes"]:
        words = [*words, *SCENES]
    if (
        words[:2] in (["prepare-data", "coco"], ["prepare-data", "coco-instances"])
        or "drop" in words
    ):
        words = [*words, "--class-split", "all_seen"]
    if "--predictions" in words:
        assert main(["evaluate", "--save", "scores"]) == 0
    code, out, err = call(capsys, *words)
    assert code == 0, err
    assert out and "error" not in err


def test_predict_writes_what_it_says(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(
        capsys, "predict", "photo.jpg", "data/shapes/val", "--vocab", "classes.txt", "--json",
        "--out", "results",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    assert result["images"][0]["file"] == "photo.jpg"
    assert len(result["images"]) == 4
    index = json.loads(Path(result["panoptic_json"]).read_text())
    assert [c["name"] for c in index["categories"]] == ["solid star", "striped ring", "green water"]
    for image, entry in zip(result["images"], index["annotations"], strict=True):
        ids = np.asarray(Image.open(image["png"])).astype(int) @ [1, 256, 65536]
        assert ids.shape == (image["height"], image["width"])
        assert set(np.unique(ids)) - {0} == {s["id"] for s in image["segments"]}
        assert image["segments"] == sorted(entry["segments_info"], key=lambda s: -s["area"])
        assert Image.open(image["overlay"]).size[0] >= 64
    assert "drawn shapes" in err


def test_a_picture_without_segments_is_a_result(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, "predict", "photo.jpg", "--min-score", "1", "--out", "empty")
    assert code == 0 and "no segment" in out and "ms a picture: load" in out
    assert (
        json.loads(Path("empty/panoptic.json").read_text())["annotations"][0]["segments_info"] == []
    )


def test_predicting_with_other_keys(
    inside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Any] = []

    def predicting(predictor: Any, *args: Any, **keys: Any) -> Any:
        used.append(predictor)
        return predict_paths(predictor, *args, **keys)

    monkeypatch.setattr("concat_cli.core.infer.files.predict_paths", predicting)
    words = ["predict", "photo.jpg", "--name", "shapes_zegformer", "--out"]
    for branch, needed in (("segment", False), ("image", True)):
        keys = ["--set", f"zegformer.branch={branch}", "--set", "infer.min_score=0.1"]
        code, _, err = call(capsys, *words, branch, *keys, "--min-score", "0.2")
        assert code == 0 and Path(branch, "panoptic.json").exists(), err
        assert used[-1].needs_clip_image == needed
        assert used[-1].cfg.min_score == 0.2  # the option goes last
    for key in ("optim.lr=1", "zegformer.targets=category"):
        for more in ([], ["--dry-run"]):
            code, _, err = call(capsys, *words, "not", "--set", key, *more)
            assert code == 2 and f"{key.split('=')[0]} cannot be changed" in err
            assert "zegformer.branch, " in err
    code, _, err = call(capsys, "predict", "photo.jpg", "--set", "zegformer.branch=image")
    assert code == 2 and "zegformer.branch cannot be changed" in err  # of CONCAT's weights
    assert len(used) == 2 and not Path("not").exists()


def test_unreadable_pictures_are_all_named_and_the_others_written(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = Path("photo.jpg").read_bytes()
    Path("mixed").mkdir()
    for name, data in (("a.jpg", b"x"), ("b.jpg", photo), ("c.jpg", photo[: len(photo) // 2])):
        Path("mixed", name).write_bytes(data)
    code, out, err = call(capsys, "predict", "mixed", "--out", "mixed-out")
    assert code == 2 and "b.jpg" in out and "mixed-out/panoptic.json" in out
    assert "2 pictures could not be read" in err and "a.jpg" in err and "c.jpg" in err
    assert len(json.loads(Path("mixed-out/panoptic.json").read_text())["images"]) == 1


def test_dry_runs_check_and_write_nothing(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in (
        "predict photo.jpg --vocab classes.txt --out dry",
        "evaluate",
        "prepare-data shapes dry",
    ):
        code, out, err = call(capsys, *line.split(), "--dry-run")
        assert code == 0 and out.endswith("dry run: nothing was written\n"), err
        assert not Path("dry").exists()
        assert ("dry" in line) == any(row.split()[-1:] == ["dry"] for row in out.splitlines())
        if "--vocab" in line:
            assert "solid star, striped ring, green water" in out
    Path("odd.txt").write_text("a zebra\n")
    for line, what in (
        ("predict photo.jpg --weights none.safetensors", "no file none.safetensors"),
        ("predict photo.jpg --vocab none.txt", "no vocabulary file none.txt"),
        ("predict photo.jpg --vocab odd.txt", "zebra"),
    ):
        code, _, err = call(capsys, *line.split(), "--dry-run")
        assert code == 2 and what in err


def test_files_are_divided_as_their_data_set_says_or_not_at_all(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = Path("data/shapes/annotations/panoptic_val.json")
    code, out, err = call(
        capsys, "evaluate", "--predictions", str(truth), "--truth", str(truth), "--json"
    )
    assert code == 0 and "divided as in data/shapes/dataset.json" in err
    assert {row["seen"] for row in json.loads(out)["per_class"]} == {True, False}
    shutil.copytree(truth.parent, "alone/annotations")
    words = ["evaluate", "--predictions", str(truth), "--truth", f"alone/annotations/{truth.name}"]
    code, out, err = call(capsys, *words, "--json")
    assert code == 0 and "no --class-split: classes are not divided" in err
    assert json.loads(out)["panoptic"]["seen"] is None
    code, _, err = call(capsys, *words, "--split", "unseen")
    assert code == 2 and "--class-split" in err


def test_evaluate_json_is_pure_and_split_reports_less(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, "evaluate", "--split", "seen", "--json")
    report = json.loads(out)
    assert code == 0 and "weights runs/shapes/finetune" in err
    assert report["panoptic"]["unseen"] is None and report["protocol"]["candidates"] == 48
    assert report["protocol"]["stage"] == "finetune" and report["images"] == 3


def test_weights_that_name_pixels_are_scored_for_semantic_maps_alone(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", "--name", "shapes_clip_zss"]
    for asked in ([], ["--dry-run"], ["--save", "wrong"]):
        code, _, err = call(capsys, *words, "--tasks", "panoptic", *asked)
        assert code == 2 and "cannot be scored for: panoptic. They say of every pixel" in err
        assert "\n hint: Score them with --tasks semantic" in err and not Path("wrong").exists()
    for more in ([], ["--dry-run"]):
        code, _, err = call(capsys, *words, "--diagnostics", *more)
        assert code == 2 and "--diagnostics looks at segments" in err
    code, out, _ = call(capsys, *words, "--json")
    assert code == 0 and json.loads(out)["protocol"]["tasks"] == ["semantic"]


def test_the_same_command_resumes_and_another_one_stops(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Path("runs/shapes/con/last.safetensors").read_bytes()
    code, out, _ = call(capsys, "train-con", *SMALL)
    assert code == 0 and "all 2 steps are already done" in out and "next" in out
    assert Path("runs/shapes/con/last.safetensors").read_bytes() == before
    code, _, err = call(capsys, "train-con", *SMALL, "optim.lr=0.5")
    assert code == 2 and "optim.lr: 0.001 -> 0.5" in err and "--fresh" in err


def evaluated(folder: str) -> int:
    """The exit code of one of the processes of a `torchrun`, which keeps what it prints."""
    printed = Path(f"printed-{os.environ['RANK']}")
    with printed.open("w") as file, contextlib.redirect_stdout(file):
        return main(["evaluate", "--json", "--device", "cpu", "--save", folder])


def launched(folder: str) -> None:
    """`torchrun`, whose processes it forks, where otherwise interpreters would start that import
    for seconds what is here already."""
    words = "--rdzv-backend c10d --rdzv-endpoint localhost:0 --nproc-per-node 2"
    words += " --start-method fork -m concat_cli"
    config, *_ = config_from_args(parse_args(words.split()))
    assert elastic_launch(config, evaluated)(folder) == {0: 0, 1: 0}


def test_processes_share_the_pictures_and_write_one_result(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes of a `torchrun` report what one does."""
    code, out, err = call(capsys, "evaluate", "--json", "--device", "cpu", "--save", "shared-1")
    assert code == 0, err
    alone = json.loads(out)
    torchrun = get_context("fork").Process(target=launched, args=("shared-2",))
    torchrun.start()
    torchrun.join(200)
    assert torchrun.exitcode == 0
    together = json.loads(Path("printed-0").read_text())
    assert not Path("printed-1").read_text()
    assert together["panoptic"] == alone["panoptic"]
    assert together["per_class"] == alone["per_class"]
    written = [Path(out, "panoptic.json").read_bytes() for out in ("shared-1", "shared-2")]
    assert written[0] == written[1]


def test_names_taught_by_file(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "finetune", "--vocab", "classes.txt")
    assert code == 0 and "runs/shapes/finetune-classes/last.safetensors" in out
    _, out, _ = call(capsys, "predict", "photo.jpg", "--vocab", "classes.txt", "--dry-run")
    assert "runs/shapes/finetune-classes/last.safetensors" in out


def test_words_that_the_built_in_clip_never_saw(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("pets.txt").write_text("a zebra\nsolid star\n")
    for command in (["predict", "photo.jpg"], ["finetune"]):
        code, _, err = call(capsys, *command, "--vocab", "pets.txt")
        assert code == 2 and "zebra" in err and "--force" in err
    assert not Path("runs/shapes/finetune-pets/last.safetensors").exists()
    code, out, _ = call(capsys, "predict", "photo.jpg", "--vocab", "pets.txt", "--force")
    assert code == 0 and "zebra" in out


@pytest.mark.parametrize(
    ("line", "what", "hint"),
    [
        ("train-con optim.lrr=1", "unknown key 'optim.lrr'", "Did you mean optim.lr?"),
        ("train-con -c configs/dem.yaml", "no configuration configs/dem.yaml", "demo"),
        ("train-con data.root=none", "none", "concat prepare-data"),
        ("train-cat --name nobody", "no weights of stage con", "concat train-con --name nobody"),
        ("finetune --name a/b", "cannot be the name of a run", ""),
        ("finetune --vocab none.txt", "no vocabulary file none.txt", "a class a line"),
        ("finetune --weights runs/shapes/con/last.safetensors", "is of stage 'con'", "train-cat"),
        ("evaluate --name nobody", "Run nobody has no weights", "concat train-con --name nobody"),
        ("evaluate --weights classes.txt", "no complete weights file", ""),
        ("evaluate --predictions p.json", "belong together", "both"),
        ("evaluate --predictions p.json --truth t.json", "no file", ""),
        ("evaluate --official", "compares files", "--predictions"),
        ("predict none.jpg", "no picture none.jpg", "files, folders or globs"),
        ("predict configs", "holds no picture", "**"),
        ("predict nothing*.png", "No picture matches", ""),
        ("predict classes.txt", "classes.txt", ""),
        ("prepare-data coco none", "none", ""),
        ("prepare-data shapes data/x --unseen ring", "", ""),
        ("prepare-data shapes data/x --train 0", "at least 1", ""),
        ("prepare-data shapes classes.txt --val 3", "classes.txt", ""),
    ],
)
def test_mistakes_are_told_in_few_lines(
    line: str, what: str, hint: str, inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, *shlex.split(line))
    assert code == 2
    assert err.startswith("error: ") and len(err.strip().splitlines()) <= 4
    assert what in err and "\n hint: " in err and hint in err.partition("\n hint: ")[2]


@pytest.mark.parametrize(
    "line", ["trian-con", "predict", "evaluate --splt x", "train-con --device tpu"]
)
def test_wrong_usage_is_exit_code_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, *line.split())
    assert code == 2 and "Error" in err and not out


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 2, "Cannot write /x/y"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "No permission"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "optim.per_device"),
        (MemoryError("Unable to allocate"), 2, "infer.batch"),
        (UserError("it is broken", "mend it"), 2, "error: it is broken\n hint: mend it\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_a_command_may_raise(
    error: BaseException,
    code: int,
    shown: str,
    inside: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("concat_cli.methods.concat.con.train_con", fail)
    found, _, err = call(capsys, "train-con")
    assert found == code and shown in err and "Traceback" not in err
    if code == 2:
        monkeypatch.setenv("CONCAT_DEBUG", "1")
        with pytest.raises(type(error)):
            main(["train-con"])


@pytest.mark.skipif(os.name != "posix", reason="no process is sent signals there")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_any_command_and_says_so(
    number: int, inside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While there is nothing to save, what is half done is cleared away."""
    cleared: list[bool] = []

    def work(*_: Any, **__: Any) -> None:
        assert f"process {os.getpid()} " in Path("runs/shapes/.lock").read_text()
        try:
            os.kill(os.getpid(), number)
            time.sleep(9)
        finally:
            cleared.append(True)

    before = signal.getsignal(number)
    monkeypatch.setattr("concat_cli.methods.concat.con.train_con", work)
    code, out, err = call(capsys, "train-con")
    assert code == 128 + number and err.startswith("stopped; the same command goes on")
    assert cleared and "done" not in out and signal.getsignal(number) is before


def test_a_lost_process_of_the_group_is_told_by_the_first_alone(
    inside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:1] Connection closed")

    monkeypatch.setattr("concat_cli.methods.concat.con.train_con", fail)
    with pytest.raises(RuntimeError):  # without a group it is a fault of ours
        main(["train-con"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = call(capsys, "train-con")
    assert code == 1 and err.startswith("error: Another process") and err.count("\n") == 2
    monkeypatch.setenv("CONCAT_LAUNCHED", "1")
    code, _, err = call(capsys, "train-con")
    assert code == 1 and not err
    monkeypatch.delenv("CONCAT_LAUNCHED")
    monkeypatch.setenv("RANK", "1")
    code, _, err = call(capsys, "train-con")
    assert code == 1 and not err


@pytest.mark.parametrize(
    ("exit_code", "code", "told"), [(-9, 1, "Process 1 was ended by SIGKILL"), (2, 2, "")]
)
def test_the_launcher_is_brief(
    exit_code: int,
    code: int,
    told: str,
    inside: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What its processes have said themselves it does not say again."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    from concat_cli import launch

    def fail(args: Any) -> None:
        assert (args.nproc_per_node, args.module, args.training_script) == ("2", True, "concat_cli")
        assert args.training_script_args == ["train-con", "--name", "a"]
        failure = ProcessFailure(local_rank=1, pid=5, exitcode=exit_code, error_file="none")
        raise ChildFailedError("concat_cli", {1: failure})

    monkeypatch.setenv("CONCAT_LAUNCHED", "")  # is put back
    monkeypatch.setattr(run, "run", fail)
    assert launch.main(["--nproc-per-node", "2", "train-con", "--name", "a"]) == code
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == (2 if told else 0)


def test_faults_of_ours_are_not_hidden(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("concat_cli.methods.concat.con.train_con", fail)
    with pytest.raises(ValueError, match="a bug"):
        main(["train-con"])


def test_progress_without_a_terminal_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    progress: Progress = ConsoleProgress(Console(), every=0.0)
    for item in progress.track(range(3), "work"):
        progress.status(f"loss {item}")
    out, err = capsys.readouterr()
    assert [line.split(" · ")[0] for line in out.splitlines()] == [
        "work: 1/3",
        "work: 2/3",
        "work: 3/3",
    ]
    assert out.splitlines()[-1].endswith("loss 2") and "\r" not in out + err


def test_progress_of_resumed_work_counts_from_where_it_was(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for _ in ConsoleProgress(Console(), every=0.0).track(range(4, 6), "work", total=2):
        pass
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" · ")[0] for line in lines] == ["work: 5/6", "work: 6/6"]


def test_other_ranks_are_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    console = Console()
    console.say("a")
    console.table(["b"], [["c"]])
    console.done({"d": "e"}, ["f"])
    console.json({})
    assert list(console.progress.track([1, 2], "g")) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_table_and_markup(capsys: pytest.CaptureFixture[str]) -> None:
    Console().table(["name", "PQ"], [["[bold]x[/bold]", 12.345], ["y", None]])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["name", "PQ"],
        ["[bold]x[/bold]", "12.3"],
        ["y", "-"],
    ]


def test_durations() -> None:
    assert [duration(s) for s in (8.31, 65, 7800)] == ["8.3 s", "1 min 5 s", "2 h 10 min"]


def test_the_command_that_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, less what would start again."""
    line = ["/bin/concat", "train-con", "-c", "my runs.yaml", "--fresh", "optim.lr=0.5"]
    monkeypatch.setattr(sys, "argv", line)
    assert resume_command() == "concat train-con -c 'my runs.yaml' optim.lr=0.5"


def test_what_a_terminal_would_obey_is_shown_as_its_escape(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Names of classes, files and keys are other people's text: no output hands it on raw."""
    odd = "a\x1b]0;owned\x07\x1b[2J\x9b31m\r\x00\u202egnp.\u2028\ud800猫 [red]ä"
    console = Console()
    console.say(odd)
    console.warn(odd)
    console.text(odd)
    console.table([odd], [[odd], [1.5]])
    console.done({"results": odd}, [odd])
    for _ in ConsoleProgress(console, every=0.0).track([1], odd):
        console.progress.say(odd)
        console.progress.status(odd)
    show_error(UserError(odd, odd))
    out, err = capsys.readouterr()
    kept = set("\n\t") | {char for char in out + err if char.isprintable()}
    assert set(out + err) <= kept and out.count("猫 [red]ä") >= 7
    assert "\\u001b]0;owned\\u0007" in out and "\\u001b" in err
    console.json({odd: [odd]})
    out = capsys.readouterr().out
    assert json.loads(out) == {odd: [odd]} and out.isprintable() is False
    assert all(char.isprintable() or char == "\n" for char in out)


def test_the_middle_of_an_endless_message_is_left_out() -> None:
    """A damaged file may hold a name of any length."""
    error = UserError(f"a.json: there is no class {'x' * 100_000}.", "Mend it.")
    assert len(error.what) < 6000 and error.what.startswith("a.json") and "more) ..." in error.what


def test_what_was_typed_wrongly_is_shown_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    """Also marks that turn the direction of text, which the parser's own errors repeat."""
    odd = "\x1b[31m\u202egnp"
    for words in (["predict", f"--{odd}"], ["doctor", odd], [odd]):
        assert main(words) == 2
        printed = capsys.readouterr().err
        assert not {"\x1b", "\u202e"} & set(printed) and "u202egnp" in printed
