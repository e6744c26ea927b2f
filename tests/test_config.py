"""Configuration: deltas, overrides, coercion by type, every mistake at once; shipped files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concat_cli.core.config import Config, OptimConfig
from concat_cli.core.config_file import diff, dump_yaml, from_dict, load_config, override, to_dict
from concat_cli.core.errors import UserError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "some.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_file_then_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "optim: {lr: 1e-4, steps: 7}\nmodel:\n  backbone: resnet50\n")
    cfg = load_config(path, ["optim.steps=9", "data.cache=no", "optim.step_at=0.5, 0.7"])
    assert (cfg.optim.lr, cfg.optim.steps, cfg.optim.step_at) == (1e-4, 9, (0.5, 0.7))
    assert (cfg.model.backbone, cfg.data.cache) == ("resnet50", False)
    assert cfg.loss == Config().loss


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e3", 1000), ("12", 12), ("1_000", 1000), ("2.0", 2)],
)
def test_whole_numbers(text: str, value: int) -> None:
    assert load_config(None, [f"optim.steps={text}"]).optim.steps == value


def test_strings_stay_as_written(tmp_path: Path) -> None:
    path = write(tmp_path, "clip: {model: no, pretrained: 0010}\nshapes:\n")
    assert load_config(path).clip.model == "no"
    assert load_config(path).clip.pretrained == "0010"


@pytest.mark.parametrize(
    ("override_text", "what", "hint"),
    [
        ("optim.lrr=1", "unknown key 'optim.lrr'", "Did you mean optim.lr?"),
        ("lr=1", "unknown key 'lr'", "optim.lr"),
        ("optm.lr=1", "unknown key 'optm.lr'", "optim.lr"),
        ("nothing.like.it=1", "unknown key", "Sections are"),
        (
            "optim.steps=many",
            "optim.steps must be a whole number, is 'many'",
            "optim.steps is a whole number; its",
        ),
        ("optim.steps=1.5", "optim.steps must be a whole number", ""),
        ("optim.lr=nan", "optim.lr must be finite", ""),
        ("optim.lr=", "optim.lr has no value", ""),
        ("data.cache=perhaps", "data.cache must be true or false", "default is"),
        ("model.pixel_decoder=fpm", "must be one of fpn, deformable", ""),
        ("optim.lr=-1", "lr must be positive", "optim.lr is a number; its default"),
        ("finetune.calibrate=true cat.fold=0", "finetune.calibrate=true needs cat.fold > 0", ""),
        (
            "model.detach_class_path=true model.mask_pooling=false",
            "model.detach_class_path=true needs model.mask_pooling=true",
            "",
        ),
        ("steps", "no key=value", "optim.steps=500"),
    ],
)
def test_each_mistake_is_named(override_text: str, what: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, override_text.split(" "))
    assert what in caught.value.what
    assert hint in caught.value.hint


def test_all_mistakes_at_once_with_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, "optim:\n  lrr: 1\n  steps: x\n  lr: 1\n  lr: 2\nmodle: {width: 3}\n")
    with pytest.raises(UserError) as caught:
        load_config(path, ["data.crop=3"])
    for part in (
        f"{path}:2: unknown key 'optim.lrr'. Did you mean optim.lr?",
        f"{path}:3: optim.steps must be",
        f"{path}:5: 'lr' is given twice",
        f"{path}:6: unknown section 'modle'. Did you mean model",
        "command line: data: crop must be at least 32",
    ):
        assert part in caught.value.what


@pytest.mark.parametrize("text", ["optim: [1", "- a\n- b\n", "optim: 3\n", "\tx: 1"])
def test_files_of_another_form(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"some\.yaml:\d"):
        load_config(write(tmp_path, text))


def test_a_missing_file_names_near_ones(tmp_path: Path) -> None:
    write(tmp_path, "")
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "sone.yaml")
    assert str(tmp_path / "some.yaml") in caught.value.hint


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="Cannot read"):
        load_config(path)


@given(
    lr=st.floats(1e-8, 10),
    steps=st.integers(0, 10**9),
    name=st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=20),
    at=st.lists(st.floats(0, 1), max_size=3),
)
def test_yaml_and_dict_round_trips(lr: float, steps: int, name: str, at: list[float]) -> None:
    cfg = Config(optim=OptimConfig(lr=lr, steps=steps, step_at=tuple(at)))
    cfg = replace(cfg, clip=replace(cfg.clip, model=name))
    assert from_dict(to_dict(cfg)) == cfg
    assert override(cfg, ["data.flip=0"]) == replace(cfg, data=replace(cfg.data, flip=0.0))


@pytest.mark.parametrize("full", [False, True])
def test_dumped_yaml_reads_back(tmp_path: Path, full: bool) -> None:
    cfg = load_config(None, ["optim.lr=1e-7", "clip.model=no", "data.cache=false", "cat.fold=0"])
    text = dump_yaml(cfg, full)
    assert load_config(write(tmp_path, text)) == cfg
    assert ("batch_size" in text) == full


def test_diff_is_readable() -> None:
    cfg = load_config(None, ["optim.lr=0.5", "shapes.unseen=ring"])
    assert diff(Config(), cfg) == ["shapes.unseen: (empty) -> ring", "optim.lr: 0.001 -> 0.5"]


def test_saved_keys_that_do_not_exist() -> None:
    with pytest.raises(UserError, match=r"unknown key 'optim\.old'"):
        from_dict({"optim": {"old": 1}})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_build(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a short list of deltas with a header, and its models can be built."""
    from concat_cli.core.runs import Run
    from concat_cli.core.train.plan import describe

    cfg = load_config(path)
    monkeypatch.chdir(tmp_path)
    run = Run("any", tmp_path)
    assert "million parameters" in describe("con", cfg, run)["segmentor"]
    assert "million parameters" in describe("cat", cfg, run)["generator"]
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.strip() and not line.startswith("#")]) <= 40
    header = "\n".join(line for line in lines if line.startswith("#"))
    assert "Hardware: " in header and "result" in header
