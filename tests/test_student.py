"""The student of CLIP-ZSS: SegFormer's head, padding, and the synthesizer of prototypes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import SegformerConfig
from transformers.models.segformer.modeling_segformer import SegformerDecodeHead

from concat_cli.core.checkpoint import load_weights, save_weights
from concat_cli.core.config import Config
from concat_cli.core.config_file import to_dict
from concat_cli.core.errors import UserError
from concat_cli.core.model.backbone import Backbone
from concat_cli.core.model.layers import Attention
from concat_cli.core.model.query_decoder import DecoderLayer
from concat_cli.methods.clip_zss.config import ClipZssConfig
from concat_cli.methods.clip_zss.student import (
    AllMlpHead,
    Student,
    Synthesizer,
    build_student,
    build_synthesizer,
    check_student_start,
    restore_student,
)

CHANNELS = (6, 10, 12, 20)


def maps(seed: int = 0, size: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, c, size >> level, size >> level, generator=generator)
        for level, c in enumerate(CHANNELS)
    ]


def images(count: int = 2, height: int = 64, width: int = 96) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


# --- the head -----------------------------------------------------------------------------------


def copied_head(theirs: SegformerDecodeHead) -> tuple[AllMlpHead, nn.Conv2d]:
    """Our head and projection with the weights of transformers' head."""
    head = AllMlpHead(CHANNELS, 8)
    for own, given in zip(head.linears, theirs.linear_projections, strict=True):
        own.load_state_dict({k: v.view(own.state_dict()[k].shape)
                             for k, v in given.proj.state_dict().items()})  # fmt: skip
    # they concatenate the coarsest map first
    parts = theirs.linear_fuse.weight.chunk(4, dim=1)[::-1]
    head.fuse.load_state_dict({"weight": torch.cat(parts, 1)})
    head.norm.load_state_dict(theirs.batch_norm.state_dict())
    projection = nn.Conv2d(8, 5, 1)
    projection.load_state_dict(theirs.classifier.state_dict())
    return head, projection


@pytest.mark.parametrize("training", [False, True])
def test_the_head_is_segformers(training: bool) -> None:
    """With transformers' weights it gives transformers' result, and the same gradient."""
    torch.manual_seed(0)
    cfg = SegformerConfig(
        hidden_sizes=list(CHANNELS), decoder_hidden_size=8, num_labels=5,
        classifier_dropout_prob=0.0,
    )  # fmt: skip
    theirs = SegformerDecodeHead(cfg)
    nn.init.normal_(theirs.batch_norm.running_mean)
    nn.init.uniform_(theirs.batch_norm.running_var, 0.5, 2.0)
    head, projection = copied_head(theirs)
    head.dropout = nn.Dropout2d(0.0)
    head.train(training), theirs.train(training)
    got, want = projection(head(maps())), theirs(tuple(maps()))
    assert got.shape == (2, 5, 16, 16)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for out in (got, want):
        out.square().mean().backward()
    ours, given = head.linears[3].weight.grad, theirs.linear_projections[3].proj.weight.grad
    assert ours is not None and given is not None and given.abs().max() > 0
    torch.testing.assert_close(ours.flatten(1), given, rtol=1e-3, atol=1e-6)


def test_whole_channels_are_dropped_in_training_alone() -> None:
    torch.manual_seed(0)
    head = AllMlpHead(CHANNELS, 64, dropout=0.5)
    found = head(maps()).flatten(2)
    gone = (found == 0).all(-1)
    assert 0.3 < gone.float().mean() < 0.7
    assert not torch.equal(head(maps()).flatten(2), found)
    head.eval()
    assert torch.equal(head(maps()), head(maps()))


# --- the student --------------------------------------------------------------------------------


def student(**keys: object) -> Student:
    torch.manual_seed(0)
    cfg = replace(ClipZssConfig(head_width=16), **keys)  # type: ignore[arg-type]
    return build_student(cfg, 24).eval()


def test_it_maps_images_into_clips_space_at_stride_4() -> None:
    found = student()(images())
    assert found.shape == (2, 24, 16, 24)
    floats = student()(images().float() / 255)
    torch.testing.assert_close(found, floats)


def test_an_image_gives_the_same_alone_and_padded() -> None:
    """The small encoder and the head are exact under padding."""
    model = student()
    alone = model(images())
    padded = torch.full((2, 3, 128, 160), 77, dtype=torch.uint8)
    padded[..., :64, :96] = images()
    padding = torch.ones(2, 128, 160, dtype=torch.bool)
    padding[:, :64, :96] = False
    together = model(padded, padding)
    assert together.shape == (2, 24, 32, 40)
    torch.testing.assert_close(together[..., :16, :24], alone, rtol=1e-4, atol=1e-5)


def test_the_scale_is_learned_or_fixed_and_never_beyond_clips() -> None:
    learned, fixed = student(), student(learn_scale=False, logit_scale=5.0)
    assert learned.scale.item() == pytest.approx(14.3) and fixed.scale.item() == pytest.approx(5.0)
    assert "log_scale" in dict(learned.named_parameters())
    assert "log_scale" not in dict(fixed.named_parameters()) and "log_scale" in fixed.state_dict()
    with torch.no_grad():
        learned.log_scale.fill_(9.0)
    assert learned.scale.item() == 100.0


@pytest.mark.parametrize("encoder", ["resnet18", "pvt_v2_b0"])
def test_timms_encoders_fit(encoder: str) -> None:
    model = student(encoder=encoder)
    assert model(images(1)).shape == (1, 24, 16, 24)
    assert model.encoder.channels == tuple(
        timm.create_model(encoder, features_only=True).feature_info.channels()[-4:]
    )


def test_the_encoder_takes_its_weights_from_a_file(tmp_path: Path) -> None:
    published = timm.create_model("resnet18", pretrained=False)
    path = tmp_path / "r18.pth"
    torch.save(published.state_dict(), path)
    cfg = ClipZssConfig(encoder="resnet18", encoder_weights=str(path))
    check_student_start(cfg)
    body = build_student(cfg, 24, pretrained=True).encoder.body.body
    assert torch.equal(body.layer2[0].conv1.weight, published.layer2[0].conv1.weight)
    assert not torch.equal(
        build_student(cfg, 24).encoder.body.body.layer2[0].conv1.weight,
        published.layer2[0].conv1.weight,
    )
    with pytest.raises(UserError, match=r"no file .*missing\.pth"):
        check_student_start(replace(cfg, encoder_weights=str(tmp_path / "missing.pth")))
    check_student_start(replace(cfg, encoder_weights="timm"))


OWN_CLIP = {"model": "tiny", "pretrained": "", "sha256": ""}


def test_a_file_of_weights_gives_the_student_back(tmp_path: Path) -> None:
    cfg = Config().with_own(ClipZssConfig(head_width=16, synthesizer=2, pseudo=True))
    torch.manual_seed(3)
    made = build_student(cfg.own(ClipZssConfig), 24).eval()
    tensors = {f"student.{k}": v for k, v in made.state_dict().items()}
    meta = {"format": 1, "stage": "clip_zss", "config": to_dict(cfg), "vocabulary": [],
            "trained": [], "clip": OWN_CLIP}  # fmt: skip
    save_weights(tmp_path / "w.safetensors", tensors, meta)
    found = restore_student(load_weights(tmp_path / "w.safetensors"))
    assert not found.training
    torch.testing.assert_close(found(images()), made(images()))


def test_batch_norms_of_the_encoder_learn() -> None:
    assert all(p.requires_grad for p in Student(Backbone(), 8).parameters())


# --- the synthesizer ----------------------------------------------------------------------------


def synthesizer(layers: int = 2, trained: bool = True) -> Synthesizer:
    torch.manual_seed(0)
    made = build_synthesizer(ClipZssConfig(pseudo=True, synthesizer=layers, heads=4), 16)
    assert made is not None and len(made.layers) == layers
    if trained:  # as after a step
        nn.init.normal_(made.out.weight, std=0.5)
    return made


def given(count: int = 5, tokens: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    present = torch.ones(2, count, dtype=torch.bool)
    valid = torch.ones(2, tokens, dtype=torch.bool)
    rows = (torch.randn(2, n, 16, generator=generator) for n in (count, tokens))
    centroids, cls = rows
    return centroids, present, cls, valid


def test_it_starts_at_the_centroids() -> None:
    centroids, *rest = given()
    found = synthesizer(trained=False)(centroids, *rest)
    cosine = torch.cosine_similarity(found, centroids, dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_no_layers_is_no_synthesizer() -> None:
    assert build_synthesizer(ClipZssConfig(), 16) is None


def test_what_is_not_there_is_not_read() -> None:
    """Neither absent labels nor unused rows of the bank change a prototype that is there."""
    model, (centroids, present, cls, valid) = synthesizer(), given()
    present[:, 3:] = False
    valid[0, 2] = False
    before = model(centroids, present, cls, valid)
    other_centroids, other_cls = centroids.clone(), cls.clone()
    other_centroids[:, 3:] = torch.randn(2, 2, 16)
    other_cls[0, 2] = 50.0
    after = model(other_centroids, present, other_cls, valid)
    torch.testing.assert_close(after[:, :3], before[:, :3])
    read = model(other_centroids, torch.ones_like(present), cls, valid)
    assert not torch.allclose(read[:, :3], before[:, :3], atol=1e-3)
    read = model(centroids, present, other_cls, torch.ones_like(valid))
    assert not torch.allclose(read[0, :3], before[0, :3], atol=1e-3)


def test_lengths_mean_nothing() -> None:
    model, (centroids, present, cls, valid) = synthesizer(), given()
    longer = model(7 * centroids, present, 3 * cls, valid)
    torch.testing.assert_close(longer, model(centroids, present, cls, valid))


def test_an_image_without_labels_gives_finite_numbers() -> None:
    model, (centroids, present, cls, valid) = synthesizer(), given()
    found = model(torch.zeros_like(centroids), torch.zeros_like(present), cls, valid)
    found.sum().backward()
    assert torch.isfinite(found).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def attended(attention: Attention, queries: Tensor, read: Tensor) -> Tensor:
    """(Q, D) queries that each read all of (T, D), head by head."""
    parts = (attention.query(queries), attention.key(read), attention.value(read))
    heads = zip(*(part.chunk(attention.heads, 1) for part in parts), strict=True)
    said = [(q @ k.T / k.shape[1] ** 0.5).softmax(1) @ v for q, k, v in heads]
    return attention.out(torch.cat(said, 1))


def naive_prototypes(model: Synthesizer, centroids: Tensor, tokens: Tensor) -> Tensor:
    """(N, E) and (T, E) of one image, of which there is nothing that must not be read."""
    starts, memory = (4 * x / x.norm(dim=1, keepdim=True) for x in (centroids, tokens))  # E = 16
    rows = starts
    for layer in model.layers:
        assert isinstance(layer, DecoderLayer)
        rows = layer.cross_norm(rows + attended(layer.cross_attention, rows, memory))
        rows = layer.self_norm(rows + attended(layer.self_attention, rows, rows))
        rows = layer.feed_forward_norm(rows + layer.feed_forward(rows))
    return starts + model.out(rows)


@settings(max_examples=15, deadline=None)
@drawn(st.integers(0, 1000))
def test_masks_equal_slices_of_single_images(seed: int) -> None:
    """With random parameters throughout; an image has any number of labels, also none."""
    model, generator = synthesizer(), torch.Generator().manual_seed(seed)
    centroids, cls = (torch.randn(3, n, 16, generator=generator) for n in (5, 4))
    present, valid = (torch.rand(3, n, generator=generator) < 0.5 for n in (5, 4))
    valid[torch.arange(3), torch.randint(4, (3,), generator=generator)] = True
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        found = model(centroids, present, cls, valid)
        for b in range(3):
            want = naive_prototypes(model, centroids[b, present[b]], cls[b, valid[b]])
            torch.testing.assert_close(found[b, present[b]], want, rtol=1e-4, atol=1e-4)
