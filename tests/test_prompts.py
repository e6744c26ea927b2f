"""Prompts: names, templates, text embeddings and their cache."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from clip_helpers import random_clip
from safetensors.torch import save

from concat_cli.core.clip import prompts
from concat_cli.core.clip.prompts import (
    check_names,
    check_words,
    class_texts,
    clean_name,
    encode_classes,
    known_words,
    text_embeddings,
)
from concat_cli.core.config import ClipConfig
from concat_cli.core.data.class_split import CLASSES, load_class_list
from concat_cli.core.errors import UserError
from concat_cli.core.progress import Silent
from concat_cli.core.vocabulary import ClassEntry, Vocabulary
from concat_cli.core.vocabulary_file import parse_names
from concat_cli.methods.zegformer.config import MASKED_PROMPTS

VOCABULARY = Vocabulary(
    (
        ClassEntry("cat", 1, synonyms=("kitten", "tabby")),
        ClassEntry("sky-other-merged", 2, kind="stuff"),
    )
)


class Lines(Silent):
    """Progress that keeps what was said."""

    def __init__(self):
        self.said = []

    def say(self, message):
        self.said.append(message)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return random_clip(tmp_path_factory.mktemp("clip"), image_tower=False)


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("sky-other-merged", "sky"),
        ("tree-merged", "tree"),
        ("door-stuff", "door"),
        ("wall-brick", "brick wall"),
        ("floor-other-merged", "floor"),
        ("window-blind", "window blind"),
        ("playingfield", "playing field"),
        ("traffic light", "traffic light"),
        ("hot_dog", "hot dog"),
        ("other", "other"),
        ("wall painting", "wall painting"),
        ("ceiling-fan", "ceiling fan"),
        ("floor-lamp", "floor lamp"),
        ("wall-clock", "wall clock"),
        ("Floor-Wood", "Wood Floor"),
        (" striped  star ", "striped star"),
    ],
)
def test_clean_name(name, clean):
    assert clean_name(name) == clean


def test_embeddings_are_means_over_synonyms_and_templates(clip, tmp_path):
    cfg = ClipConfig(templates="imagenet_select")
    embeddings = text_embeddings(clip, VOCABULARY, cfg, tmp_path)
    assert embeddings.shape == (2, clip.embed_dim)
    for row, names in zip(embeddings, (("cat", "kitten", "tabby"), ("sky",)), strict=True):
        each = [clip.encode_text([t.format(n)])[0] for n in names for t in IMAGENET_SELECT]
        assert len(each) == 8 * len(names)
        torch.testing.assert_close(row, F.normalize(torch.stack(each).mean(0), dim=0))


IMAGENET_SELECT = prompts.TEMPLATES["imagenet_select"]


def test_the_masked_templates_are_32_different_ones():
    masked = MASKED_PROMPTS
    assert len(masked) == len(set(masked)) == 32
    assert all(template.count("{}") == 1 for template in masked)
    assert sum("masked" in template for template in masked) == 4 + 1 + 5
    assert sum("cropped" in template for template in masked) == 1 + 4 + 1
    assert sum(template.endswith("in the scene") for template in masked) == 6 + 5 + 5


def test_a_set_of_templates_may_be_asked_for(clip, tmp_path):
    cfg = ClipConfig()
    plain = text_embeddings(clip, VOCABULARY, cfg, tmp_path)
    masked = encode_classes(clip, class_texts(VOCABULARY, cfg, MASKED_PROMPTS))
    each = clip.encode_text([t.format("sky") for t in MASKED_PROMPTS])
    torch.testing.assert_close(masked[1], F.normalize(each.mean(0), dim=0))
    assert not torch.allclose(masked, plain)
    assert torch.equal(text_embeddings(clip, VOCABULARY, cfg, tmp_path), plain)


def test_many_texts_are_told_of_before_they_are_encoded(clip, tmp_path, monkeypatch):
    """A thousand names in 14 templates are minutes on a CPU: nobody is to think that it hangs."""
    lines, counts = Lines(), []
    lines.track = lambda items, what: counts.append(len(items)) or iter(items)
    few, cfg = (
        text_embeddings(clip, VOCABULARY, ClipConfig(), tmp_path / "few", lines),
        ClipConfig(),
    )
    assert not lines.said
    monkeypatch.setattr(prompts, "MANY_TEXTS", 4)
    monkeypatch.setattr(prompts, "TEXT_BATCH", 3)
    many = text_embeddings(clip, VOCABULARY, cfg, tmp_path / "many", lines)
    assert lines.said == ["CLIP reads 4 texts of 2 names, once: on a CPU, minutes"]
    assert counts == [2]
    torch.testing.assert_close(many, few)
    text_embeddings(clip, VOCABULARY, cfg, tmp_path / "many", lines)
    assert len(lines.said) == 1, "they are kept"


def test_names_may_stay_as_they_are(clip, tmp_path):
    cfg = ClipConfig(clean_names=False)
    raw = text_embeddings(clip, VOCABULARY, cfg, tmp_path)[1]
    torch.testing.assert_close(raw, clip.encode_text(["a photo of a sky-other-merged."])[0])


def test_a_cache_hit_equals_computation_and_encodes_nothing(clip, tmp_path, monkeypatch):
    first = text_embeddings(clip, VOCABULARY, ClipConfig(), tmp_path)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(2))
    monkeypatch.setattr(type(clip), "encode_text", None)
    assert torch.equal(text_embeddings(clip, VOCABULARY, ClipConfig(), tmp_path), first)


def test_other_names_or_templates_are_other_cache_entries(clip, tmp_path):
    text_embeddings(clip, VOCABULARY, ClipConfig(), tmp_path)
    text_embeddings(clip, VOCABULARY, ClipConfig(templates="imagenet_select"), tmp_path)
    text_embeddings(clip, VOCABULARY, ClipConfig(clean_names=False), tmp_path)
    text_embeddings(clip, Vocabulary(VOCABULARY.entries[:1]), ClipConfig(), tmp_path)
    assert len(list((tmp_path / "text").iterdir())) == 4


@pytest.mark.parametrize("damage", ["truncated", "garbage", "another", "value", "wider", "older"])
def test_a_broken_cache_is_computed_again_and_said(clip, tmp_path, damage):
    expected = text_embeddings(clip, VOCABULARY, ClipConfig(), tmp_path)
    (path,) = (tmp_path / "text").iterdir()
    data = path.read_bytes()
    small = text_embeddings(clip, Vocabulary(VOCABULARY.entries[:1]), ClipConfig(), tmp_path / "x")
    assert small.shape[0] == 1
    (other,) = (tmp_path / "x" / "text").iterdir()
    damaged = {
        "truncated": data[:50], "garbage": b"\0" * 99, "another": other.read_bytes(),
        "value": data[:-1] + bytes([data[-1] ^ 1]),
        "wider": save({"embeddings": torch.ones(2, expected.shape[1] + 1)}),
        "older": save({"embeddings": expected}),  # whose values nothing can vouch for
    }  # fmt: skip
    path.write_bytes(damaged[damage])
    lines = Lines()
    again = text_embeddings(clip, VOCABULARY, ClipConfig(), tmp_path, lines)
    torch.testing.assert_close(again, expected)
    assert "computed again" in lines.said[0]
    assert path.read_bytes() == data


def test_a_cache_that_cannot_be_written_costs_only_time(clip, tmp_path):
    (tmp_path / "text").write_text("a file where a folder should be")
    lines = Lines()
    embeddings = text_embeddings(clip, VOCABULARY, ClipConfig(), tmp_path, lines)
    assert embeddings.shape == (2, clip.embed_dim)
    assert "not cached" in lines.said[0]


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CONCAT_CACHE", str(tmp_path))
    assert prompts.default_cache_dir() == tmp_path
    monkeypatch.delenv("CONCAT_CACHE")
    assert prompts.default_cache_dir().parts[-2:] == (".cache", "concat")


def test_unknown_words_stop_a_small_clip_only():
    assert known_words("ViT-B-16") is None and check_words(VOCABULARY, None) == ()
    words = frozenset({"cat", "kitten", "striped"})
    with pytest.raises(UserError, match="'tabby', 'sky'") as caught:
        check_words(VOCABULARY, words)
    assert "--force" in caught.value.hint and "concat weights get photos" in caught.value.hint
    assert check_words(VOCABULARY, words, force=True) == ("tabby", "sky")
    known = Vocabulary((ClassEntry("a striped Cat", 1, synonyms=("the kitten",)),))
    assert check_words(known, words) == ()


@pytest.mark.parametrize(
    "names",
    [
        ["red-square", "red square"],
        ["wall-other", "wall"],
        ["Hot_Dog", "hot-dog : stuff"],
        ["tree-merged, fir", "brick", "tree, oak"],
        ["sky, heaven-other", "heaven, sky-merged"],
    ],
)
def test_two_classes_of_one_prompt_are_refused(names):
    vocabulary = parse_names(names)
    first, second = vocabulary.names[0], vocabulary.names[-1]
    with pytest.raises(UserError, match=f"'{first}' and '{second}' are one prompt"):
        check_names(vocabulary, ClipConfig(model="ViT-B-16"))
    check_names(vocabulary, ClipConfig(model="ViT-B-16", clean_names=False))


def test_no_published_list_has_twins():
    """Not even ADE20K's 847, in which classes share synonyms."""
    for path in CLASSES.glob("*.yaml"):
        check_names(load_class_list(path.stem), ClipConfig(model="ViT-B-16"))
