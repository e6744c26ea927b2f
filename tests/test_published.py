"""The list of published weights, and their way here: the client library fills its own cache."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import torch
import transformers
from hub_helpers import COMMIT, Hub, Repository, no_network, running

from concat_cli.app import main
from concat_cli.core.clip.source import WEIGHT_FILES, check_here, repository_of
from concat_cli.core.config import ClipConfig
from concat_cli.core.errors import UserError
from concat_cli.core.weights_from import hub as cache_of_the_hub
from concat_cli.core.weights_from.fetch import look_up, state_of, take_in
from concat_cli.core.weights_from.published import (
    CLASSES,
    CLIP_FILES,
    DEFAULT,
    Pair,
    in_words,
    located,
    pair_of,
    pairs,
    parts_of,
)

PAIRS = list(pairs().values())
PHOTOS = pairs()[DEFAULT]
WEIGHTS = bytes(range(256)) * 40


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_every_entry_is_whole(pair: Pair) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", pair.name)
    assert 10 < len(pair.purpose) < 60 and re.search(r"arXiv \d{4}\.\d{5}$", pair.source)
    for part in pair.parts:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", part.repository)
        assert part.licence and 1e7 < part.bytes < 2e9
        assert part.weights and all(re.fullmatch(r"[\w.-]+", n) for n in part.weights + part.others)
    assert pair.extra >= pair.clip.extra and located(pair.name).endswith(pair.segmentor.repository)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_each_clip_is_one_of_open_clip_of_that_size(pair: Pair) -> None:
    cfg = ClipConfig(pair.clip.model, pair.clip.pretrained)
    assert repository_of(cfg) == pair.clip.part.repository
    config = open_clip.get_model_config(cfg.model)
    assert pair.clip.extra == ("hf_tokenizer_name" in config["text_cfg"])
    assert pair.clip.extra == bool(pair.clip.part.others), "the tokenizer's files"
    kind = "CustomTextCLIP" if config.pop("custom_text", False) else "CLIP"
    with torch.device("meta"):
        count = sum(p.numel() for p in getattr(open_clip.model, kind)(**config).parameters())
    assert pair.clip.part.bytes == pytest.approx(4 * count, rel=0.02)
    assert CLIP_FILES == WEIGHT_FILES, "which the loader looks for"


def test_sizes_of_segmentors_are_those_of_their_parameters() -> None:
    shapes = {"small": (384, 12, 6, 3), "base": (768, 12, 12, 3), "large": (1024, 24, 16, 4)}
    for name, (width, layers, heads, last) in shapes.items():
        config = transformers.EomtConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            num_blocks=last, image_size=640, num_queries=200, num_labels=CLASSES,
        )  # fmt: skip
        with torch.device("meta"):
            model = transformers.EomtForUniversalSegmentation(config)
        count = sum(p.numel() for p in model.parameters())
        assert pairs()[f"eomt-{name}"].segmentor.bytes == pytest.approx(4 * count, rel=0.02)


def test_the_first_pair_needs_nothing_else_and_the_names_lead_to_pairs() -> None:
    assert next(iter(pairs())) == DEFAULT and not PHOTOS.extra and PHOTOS.bytes < 1e9
    assert pair_of(f"hf-hub:{PHOTOS.segmentor.repository}") is PHOTOS, "the first that has it"
    assert pair_of("hf-hub:org/other") is None and located("a/file") == "a/file"
    other, clip = parts_of("hf-hub:org/other")
    assert other.repository == "org/other" and clip is PHOTOS.clip.part
    with pytest.raises(UserError, match="'fotos'") as caught:
        parts_of("fotos")
    assert "photos" in caught.value.hint
    assert [in_words(n) for n in (0, 432_000_000, 1_410_000_000)] == [
        "of unknown size", "of about 430 MB", "of about 1.4 GB",
    ]  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """`photos` is published, with other bytes, and beside it what one comes across."""
    segmentor = {"config.json": b"{}", "README.md": b"-", "model.safetensors": WEIGHTS}
    clip = {"open_clip_config.json": b"{}", "open_clip_pytorch_model.bin": WEIGHTS[::-1]}
    found = Hub(
        {
            PHOTOS.segmentor.repository: Repository(segmentor, "other"),
            PHOTOS.clip.part.repository: Repository(clip),
            "org/plain": Repository({"pytorch_model.bin": WEIGHTS, "config.json": b"{}"}, None),
            "org/gated": Repository({"model.safetensors": WEIGHTS}, gated=True),
            "org/empty": Repository({"README.md": b"nothing"}),
        }
    )
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    with running(found, monkeypatch, tmp_path / "hub"):
        yield found


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """The exit code, stdout and stderr."""
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def test_it_is_told_before_it_is_fetched_and_found_after(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert state_of(PHOTOS.parts) == ""
    code, out, _ = call(capsys, "weights", "get", "photos")
    assert code == 0
    for told in (PHOTOS.segmentor.repository, "other", "mit", "0 MB to fetch into hub"):
        assert told in out
    assert [name for name, _ in hub.asked] == [
        "config.json", "model.safetensors", "open_clip_pytorch_model.bin",
    ]  # fmt: skip
    assert state_of(PHOTOS.parts) == "here"
    assert cache_of_the_hub.weights_file("photos").read_bytes() == WEIGHTS
    assert cache_of_the_hub.at_hand("photos") and not cache_of_the_hub.at_hand("eomt-small")
    check_here(ClipConfig(PHOTOS.clip.model, PHOTOS.clip.pretrained))
    code, out, _ = call(capsys, "weights", "get", "photos")
    assert code == 0 and out.count("here already") == 2 and len(hub.asked) == 3
    code, out, _ = call(capsys, "weights")
    (line,) = [line for line in out.splitlines() if line.startswith("photos ")]
    assert line.rstrip().endswith("here") and "--weights photos" in out
    code, out, _ = call(capsys, "weights", "--json")
    states = {row["name"]: row["state"] for row in json.loads(out)["pairs"]}
    assert states["photos"] == "here" and states["mask2former-small"] == "in part"
    assert states["fc-clip"] == "no"


def test_half_a_download_is_none_and_the_same_command_goes_on(
    hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 500)  # which it keeps
    hub.cut = [0] * 50 + [1000]
    code, _, err = call(capsys, "weights", "get", "photos")
    assert code == 2 and "model.safetensors could not be fetched" in err
    assert "goes on (concat weights get photos)" in err
    assert not cache_of_the_hub.at_hand("photos"), "half a file is none"
    hub.cut.clear()
    hub.asked.clear()
    assert call(capsys, "weights", "get", "photos")[0] == 0
    assert cache_of_the_hub.weights_file("photos").read_bytes() == WEIGHTS
    (start,) = (start for name, start in hub.asked if name == "model.safetensors")
    assert start == 1000, "what had come is not asked for again"


@pytest.mark.parametrize(
    ("name", "what", "hint"),
    [
        ("hf-hub:org/gated", "is gated", "hf auth login"),
        ("hf-hub:org/none", "no repository org/none", "Check the name"),
        ("hf-hub:org/empty", "holds no model.safetensors or pytorch_model.bin, but README", "form"),
        ("hf-hub:org/plain", "states no licence", "--force"),
        ("fotos", "'fotos'", "photos"),
    ],
)
def test_what_cannot_be_had_is_told(
    hub: Hub, capsys: pytest.CaptureFixture[str], name: str, what: str, hint: str
) -> None:
    code, _, err = call(capsys, "weights", "get", name)
    assert code == 2 and what in err and hint in err.partition("hint")[2]
    assert not [name for name, _ in hub.asked if name.startswith("model.")]


def test_without_a_licence_only_by_force(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "weights", "get", "hf-hub:org/plain", "--force")
    assert code == 0 and "not stated" in out and "--weights hf-hub:org/plain" in out
    assert cache_of_the_hub.weights_file("hf-hub:org/plain").read_bytes() == WEIGHTS


def test_a_full_disk_is_told_before(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="are needed at"):
        look_up("photos")
    assert not hub.asked


def test_a_folder_for_a_machine_without_network(
    hub: Hub, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = call(capsys, "weights", "get", "photos", "--to", "usb")
    assert code == 0 and "concat weights get photos --from usb" in out
    files = [path for path in (tmp_path / "usb").rglob("*") if not path.is_dir()]
    assert len(files) == 4 and not any(path.is_symlink() for path in files)
    no_network(monkeypatch, tmp_path / "other")
    code, _, err = call(capsys, "weights", "get", "photos")
    assert code == 2 and "cannot be reached" in err and "of about 190 MB" in err
    assert "`concat weights get photos --to DIR`" in err and "photos --from DIR" in err
    with pytest.raises(UserError, match="of about 190 MB") as caught:
        cache_of_the_hub.weights_file("photos")
    assert "`concat weights get photos --from DIR`" not in caught.value.what
    assert "concat weights get photos --from DIR" in caught.value.hint
    with pytest.raises(UserError, match="of about 600 MB") as caught:
        check_here(ClipConfig(PHOTOS.clip.model, PHOTOS.clip.pretrained))
    assert "concat weights get photos" in caught.value.hint
    code, out, _ = call(capsys, "weights", "get", "photos", "--from", "usb")
    assert code == 0 and "--weights photos" in out and state_of(PHOTOS.parts) == "here"
    taken = huggingface_hub.hf_hub_download(PHOTOS.segmentor.repository, "model.safetensors")
    assert Path(taken).read_bytes() == WEIGHTS and Path(taken).parent.name == COMMIT
    code, _, err = call(capsys, "predict", "usb", "--weights", "usb")
    assert code == 2
    code, _, err = call(capsys, "evaluate", "--weights", "usb")
    assert code == 2 and "concat weights get photos --from usb" in err


def test_a_damaged_folder_is_told(hub: Hub, tmp_path: Path) -> None:
    usb = tmp_path / "usb"
    assert main(["weights", "get", "photos", "--to", str(usb)]) == 0
    with pytest.raises(UserError, match=r"holds no fc-clip .* It holds: photos"):
        list(take_in("fc-clip", usb))
    (weights,) = usb.glob("facebook--*/model.safetensors")
    weights.write_bytes(WEIGHTS[:100])
    with pytest.raises(UserError, match="damaged: 100 of 10,240 bytes"):
        list(take_in("photos", usb))
    weights.unlink()
    with pytest.raises(UserError, match="is missing"):
        list(take_in("photos", usb))
    rows = json.loads((usb / "photos.json").read_text())
    for key, value in (("file", "../../evil"), ("commit", ".."), ("repository", "org/evil")):
        (usb / "photos.json").write_text(json.dumps([rows[0] | {key: value}]))
        with pytest.raises(UserError, match="no part of photos"):
            list(take_in("photos", usb))
    (usb / "photos.json").write_text("[{")
    with pytest.raises(UserError, match="cannot be read"):
        list(take_in("photos", usb))
    code = main(["weights", "get", "photos", "--to", "a", "--from", "b"])
    assert code == 2
