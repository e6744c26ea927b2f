"""Configuration: deltas, overrides, coercion by type, every mistake at once; shipped files."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from concat_cli.core import config_file
from concat_cli.core.config import Config, OptimConfig
from concat_cli.core.config_file import diff, dump_yaml, from_dict, load_config, override, to_dict
from concat_cli.core.errors import UserError
from concat_cli.methods.clip_zss.config import ClipZssConfig
from concat_cli.methods.zegformer.config import ZegFormerConfig

pytestmark = pytest.mark.core

CONFIGS = sorted(config_file.SHIPPED.glob("*.yaml"))


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
        ("no.such.thing=1", "unknown key", "Sections are"),
        (
            "optim.steps=many",
            "optim.steps must be a whole number at least 0, is 'many'",
            "optim.steps is a whole number at least 0; its default is 1000",
        ),
        ("optim.steps=1.5", "optim.steps must be a whole number", ""),
        ("optim.lr=nan", "optim.lr must be finite", ""),
        ("optim.lr=", "optim.lr has no value", ""),
        ("data.cache=perhaps", "data.cache must be true or false", "default is"),
        ("model.pixel_decoder=fpm", "must be one of fpn, deformable", ""),
        ("optim.lr=-1", "optim.lr must be above 0, is '-1'", "optim.lr is a number above 0; its"),
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
        "command line: data.crop must be at least 32, is '3'",
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


# --- ranges -----------------------------------------------------------------------------------


def just_outside() -> list[tuple[str, str]]:
    """Each numeric key with the nearest values, below and above, that it must not take."""
    found: list[tuple[str, str]] = []
    for section, values in Config().sections().items():
        for name, schema in TypeAdapter(type(values)).json_schema()["properties"].items():
            item = schema.get("items", schema)
            if item.get("type") not in ("integer", "number"):
                continue
            step = 1 if item["type"] == "integer" else 1e-3
            ends = {"minimum": -step, "maximum": step, "exclusiveMinimum": 0, "exclusiveMaximum": 0}
            there = [item[end] + beyond for end, beyond in ends.items() if end in item]
            assert len(there) == 2, f"{section}.{name} needs a least and a greatest value"
            found += [(f"{section}.{name}", f"{value!r}") for value in there]
    return found


@pytest.mark.parametrize(("key", "value"), just_outside())
def test_no_number_leaves_its_range(key: str, value: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, [f"{key}={value}"])
    assert f"{key} must be " in caught.value.what and f"{key} is a" in caught.value.hint


@pytest.mark.parametrize(
    "text",
    """infer.batch=0 model.heads=0 bank.views=0 cat.heads=7 align.image=-1 cat.lr=0 cat.bandwidths=
    cat.bandwidths=0,1 optim.clip_norm=0 data.scale_max=1e9 data.scale_max=0.5 infer.max_size=64
    clip_zss.windows= clip_zss.windows=4,2 clip_zss.synthesizer=1 optim.step_at=2 cat.steps=1e10
    optim.lr=inf cat.bandwidths=inf model.width=60 model.width=6 zegformer.exponent=1.1
    shapes.seed=-1""".split(),
)
def test_values_that_would_fail_later_are_refused(text: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, [text])
    name = text.partition("=")[0].split(".")[1]
    assert name in caught.value.what or name in caught.value.hint


def test_the_norms_of_a_deformable_decoder_want_more() -> None:
    keys = ["model.width=36", "model.heads=4"]
    assert load_config(None, keys).model.width == 36
    with pytest.raises(UserError, match="for this pixel_decoder, of 32"):
        load_config(None, [*keys, "model.pixel_decoder=deformable"])


def test_cat_heads_that_nobody_chose_do_not_matter() -> None:
    """To a method without CAT the default need not fit."""
    assert load_config(None, ["model.width=36", "model.heads=4"]).model.width == 36


def test_keys_of_former_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was renamed is taken; one that is gone, where it has the value that is left."""
    monkeypatch.setitem(config_file.RENAMED, "optim.old_lr", "optim.lr")
    monkeypatch.setitem(config_file.DROPPED, "cat.old", "false")
    for key, value in config_file.DROPPED.items():
        section, name = key.split(".")
        assert from_dict({section: {name: value}}) == Config()
        assert load_config(None, [f"{key}={value}"]) == Config()
    assert from_dict({"optim": {"old_lr": 0.5}, "cat": {"old": False}}).optim.lr == 0.5
    with pytest.raises(UserError, match=r"cat\.old is no more"):
        from_dict({"cat": {"old": True}})


def test_shipped_configurations_are_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "demo.yaml", str(config_file.SHIPPED / "demo.yaml")):
        assert load_config(name) == load_config(config_file.SHIPPED / "demo.yaml")
    for name, meant in (
        ("dmo", "Did you mean demo?"),
        ("configs/demo.yaml", "demo?"),
        ("x", "are"),
    ):
        with pytest.raises(UserError, match="no configuration") as caught:
            load_config(name)
        assert meant in caught.value.hint
    write(tmp_path, "optim: {steps: 7}").rename("demo.yaml")
    assert load_config("demo.yaml").optim.steps == 7
    assert load_config("demo") == load_config(config_file.SHIPPED / "demo.yaml")


def test_a_methods_own_section() -> None:
    cfg = load_config(None, ["zegformer.crop=mask", "clip_zss.glm=1"])
    assert cfg.own(ZegFormerConfig).crop == "mask" and cfg.own(ClipZssConfig).glm == 1
    assert diff(Config(), cfg) == ["zegformer.crop: cropmask -> mask", "clip_zss.glm: 0.0 -> 1.0"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 20_000, "no valid YAML"),
        ("model: " + "{a: " * 20_000, "no valid YAML"),
        ("optim:\n  step_at: [[0.5]]\n", ":2: 'optim.step_at' takes a value, or a list"),
        ("optim:\n  lr: {a: 1}\n", ":2: 'optim.lr' takes a value"),
        ("optim:\n  step_at: &a [*a]\n", "takes a value"),
    ],
    ids=range(5),
)
def test_values_inside_values_are_told_by_line(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        load_config(path)
    assert "mine.yaml" in caught.value.what and " at 0x" not in caught.value.what
