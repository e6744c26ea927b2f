"""Generators of pseudo vision queries: shapes, noise, statistics, and parity with torch's layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.methods.concat.generator import Generator, moment_matching


def make(text_width: int = 12, width: int = 16) -> Generator:
    torch.manual_seed(0)
    return Generator(text_width, width, layers=2, primitives=10, heads=4, ffn=24).eval()


def texts(count: int, width: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return F.normalize(torch.randn(count, width, generator=generator), dim=-1)


def test_shapes_and_noise() -> None:
    net = make()
    noise = net.sample_noise(5, torch.Generator().manual_seed(3))
    assert noise.shape == (5, net.noise_size)
    assert torch.equal(noise, net.sample_noise(5, torch.Generator().manual_seed(3)))
    assert not torch.equal(noise, net.sample_noise(5, torch.Generator().manual_seed(4)))
    out = net(texts(5), noise)
    assert out.shape == (5, 16) and out.isfinite().all()


def test_noise_sizes() -> None:
    assert make().noise_size == 2 * 16  # one of the query width for each layer


def test_the_same_noise_gives_the_same_query_and_other_noise_another() -> None:
    net, text = make(), texts(1).expand(4, -1)
    noise = net.sample_noise(4, torch.Generator().manual_seed(0))
    out = net(text, noise)
    torch.testing.assert_close(out, net(text, noise))
    assert torch.pdist(out).min() > 1e-2


def test_rows_do_not_see_each_other() -> None:
    net, text = make(), texts(6)
    noise = net.sample_noise(6, torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(text, noise)[2:4], net(text[2:4], noise[2:4]))


def test_every_part_of_the_noise_and_every_weight_matters() -> None:
    net, text = make(), texts(8)
    noise = net.sample_noise(8, torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.randn(16, generator=torch.Generator().manual_seed(2))
    (net(text, noise) * weights).square().sum().backward()
    assert noise.grad is not None and (noise.grad.abs().sum(0) > 0).all()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_starts_near_the_real_distribution() -> None:
    net = make(text_width=64, width=32)
    mean, std = torch.linspace(-3, 3, 32), torch.linspace(0.5, 4, 32)
    net.set_statistics(mean, std)
    noise = net.sample_noise(400, torch.Generator().manual_seed(0))
    out = net(texts(40, 64).repeat(10, 1), noise).detach()
    scaled = (out - mean) / std
    assert 0.6 < scaled.std() < 1.6 and scaled.mean().abs() < 0.3


def test_statistics_travel_in_the_state() -> None:
    net, other = make(), make()
    net.set_statistics(torch.full((16,), 2.0), torch.full((16,), 3.0))
    other.load_state_dict(net.state_dict())
    noise = net.sample_noise(3, torch.Generator().manual_seed(0))
    assert torch.equal(net(texts(3), noise), other(texts(3), noise))
    assert not any("statistics" in name for name, _ in net.named_parameters())


def copy_layer(ours: nn.Module, theirs: nn.TransformerDecoderLayer) -> None:
    """Gives a primitive layer the weights of torch's decoder layer."""
    width = theirs.linear2.out_features
    with torch.no_grad():
        alone, cross = theirs.self_attn, theirs.multihead_attn
        pairs = [
            (ours.own[0].weight, alone.in_proj_weight[2 * width :]),
            (ours.own[0].bias, alone.in_proj_bias[2 * width :]),
            (ours.own[1].weight, alone.out_proj.weight),
            (ours.own[1].bias, alone.out_proj.bias),
            (ours.query.weight, cross.in_proj_weight[:width]),
            (ours.query.bias, cross.in_proj_bias[:width]),
            (ours.key_value.weight, cross.in_proj_weight[width:]),
            (ours.key_value.bias, cross.in_proj_bias[width:]),
            (ours.out.weight, cross.out_proj.weight),
            (ours.out.bias, cross.out_proj.bias),
            (ours.ffn[0].weight, theirs.linear1.weight),
            (ours.ffn[0].bias, theirs.linear1.bias),
            (ours.ffn[3].weight, theirs.linear2.weight),
            (ours.ffn[3].bias, theirs.linear2.bias),
        ]
        for norm, other in zip(ours.norms, (theirs.norm1, theirs.norm2, theirs.norm3), strict=True):
            pairs += [(norm.weight, other.weight), (norm.bias, other.bias)]
        for mine, value in pairs:
            mine.copy_(value)


def test_a_layer_is_torchs_decoder_layer_with_noise_before_the_second_norm() -> None:
    net = make()
    layer = net.layers[0]
    peer = nn.TransformerDecoderLayer(16, 4, 24, dropout=0.1, batch_first=True).eval()
    for parameter in peer.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    copy_layer(layer, peer)
    tokens, noise = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(5))
    bank = net.primitives.expand(7, -1, -1)
    x = tokens[:, None]  # a sequence of one token each
    x = peer.norm1(x + peer.self_attn(x, x, x, need_weights=False)[0])
    cross = peer.multihead_attn(x, bank, bank, need_weights=False)[0]
    x = peer.norm2(x + cross + noise[:, None])
    x = peer.norm3(x + peer.linear2(F.relu(peer.linear1(x))))
    got = layer(tokens, net.primitives, noise)
    torch.testing.assert_close(got, x[:, 0], atol=1e-5, rtol=1e-5)
    quiet = layer(tokens, net.primitives, torch.zeros_like(noise))
    torch.testing.assert_close(quiet, peer(tokens[:, None], bank)[:, 0], atol=1e-5, rtol=1e-5)


def test_dropout_only_while_training() -> None:
    net, text = make(), texts(4)
    noise = net.sample_noise(4, torch.Generator().manual_seed(0))
    still = net(text, noise)
    net.train()
    torch.manual_seed(0)
    assert not torch.equal(net(text, noise), still)
    net.eval()
    torch.testing.assert_close(net(text, noise), still)


def test_learns_class_means_and_keeps_a_spread() -> None:
    net, text = make(), texts(4)
    net.train()
    generator = torch.Generator().manual_seed(0)
    means = 2 * torch.randn(4, 16, generator=generator)
    labels = torch.arange(4).repeat(16)
    real = means[labels] + 0.5 * torch.randn(64, 16, generator=generator)
    net.set_statistics(real.mean(0), real.std(0))
    optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(100):
        fake = net(text[labels], net.sample_noise(64, generator))
        own = [(fake[labels == c], real[labels == c]) for c in range(4)]
        loss = sum(moment_matching(*pair, (0.25, 0.5, 1.0, 2.0)) for pair in own)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    net.eval()
    fake = net(text[labels], net.sample_noise(64, generator)).detach()
    assert torch.equal(torch.cdist(fake, means).argmin(1), labels)
    spread = torch.stack([fake[labels == c].std(0).mean() for c in range(4)])
    assert spread.min() > 0.1
