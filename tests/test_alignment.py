"""CON: InfoNCE, pooling and the token bank against naive loops, and who is never a negative."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from concat_cli.core.train.teacher import Negatives, TokenBank, aggregate, info_nce


def rows(count: int, seed: int, width: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64)


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float(a @ b / a.norm() / b.norm())


def naive_info_nce(
    queries: Tensor,
    tokens: Tensor,
    valid: list[bool],
    temperature: float,
    groups: list[int],
    extra: list[tuple[Tensor, int]],
) -> float:
    losses = []
    for i, query in enumerate(queries):
        if not valid[i]:
            continue
        hit = cosine(query, tokens[i]) / temperature
        others = [(tokens[j], groups[j]) for j in range(len(tokens)) if j != i and valid[j]]
        logits = [
            cosine(query, token) / temperature
            for token, group in others + extra
            if group < 0 or group != groups[i]
        ]
        losses.append(math.log(sum(math.exp(x) for x in [hit, *logits])) - hit)
    return sum(losses) / max(len(losses), 1)


@settings(max_examples=30, deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(0, 5))
def test_info_nce_against_a_loop(data: st.DataObject, count: int, extra: int) -> None:
    group = st.integers(-1, 3)
    valid = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    groups = data.draw(st.lists(group, min_size=count, max_size=count))
    bank_groups = data.draw(st.lists(group, min_size=extra, max_size=extra))
    bank_valid = data.draw(st.lists(st.booleans(), min_size=extra, max_size=extra))
    queries, tokens, bank = rows(count, 0), rows(count, 1), rows(extra, 2)
    usable = [(bank[j], bank_groups[j]) for j in range(extra) if bank_valid[j]]
    got = info_nce(
        queries,
        tokens,
        torch.tensor(valid),
        0.2,
        torch.tensor(groups),
        Negatives(
            bank,
            torch.tensor(bank_groups, dtype=torch.int64),
            torch.tensor(bank_valid, dtype=torch.bool),
        ),
    )
    want = naive_info_nce(queries, tokens, valid, 0.2, groups, usable)
    assert got.item() == pytest.approx(want, abs=1e-9)


def test_info_nce_without_groups_or_bank_is_cross_entropy_on_the_diagonal() -> None:
    queries, tokens = rows(5, 3), rows(5, 4)
    logits = torch.tensor([[cosine(q, t) / 0.1 for t in tokens] for q in queries])
    want = torch.nn.functional.cross_entropy(logits, torch.arange(5))
    got = info_nce(queries, tokens, torch.ones(5, dtype=torch.bool), 0.1)
    torch.testing.assert_close(got.float(), want.float())


def all_of(tokens: Tensor, groups: Tensor) -> Negatives:
    return Negatives(tokens, groups, torch.ones_like(groups, dtype=torch.bool))


def moved_by(queries: Tensor, groups: Tensor, bank: Tensor, bank_groups: Tensor) -> list[bool]:
    """Which bank tokens have an influence on the loss of each query alone."""
    bank = bank.clone().requires_grad_()
    valid = torch.ones(len(queries), dtype=torch.bool)
    loss = info_nce(queries, rows(len(queries), 9), valid, 0.2, groups, all_of(bank, bank_groups))
    (gradient,) = torch.autograd.grad(loss, bank)
    return (gradient.abs().sum(-1) > 0).tolist()


def test_same_group_is_never_a_negative() -> None:
    bank_groups = torch.tensor([4, 2, -1, 4])
    got = moved_by(rows(1, 5), torch.tensor([4]), rows(4, 6), bank_groups)
    assert got == [False, True, True, False]


def test_no_group_keeps_every_token() -> None:
    got = moved_by(rows(1, 5), torch.tensor([-1]), rows(3, 6), torch.tensor([-1, 2, -1]))
    assert got == [True, True, True]


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(6)))
def test_order_does_not_matter(order: list[int]) -> None:
    queries, tokens = rows(6, 0), rows(6, 1)
    valid = torch.tensor([True, True, False, True, True, True])
    groups = torch.tensor([0, 1, 1, 0, -1, 2])
    one = info_nce(queries, tokens, valid, 0.1, groups)
    other = info_nce(queries[order], tokens[order], valid[order], 0.1, groups[order])
    torch.testing.assert_close(one, other)


def test_padding_does_not_matter_and_may_hold_anything() -> None:
    queries, tokens, groups = rows(3, 0), rows(3, 1), torch.tensor([0, 1, 0])
    one = info_nce(queries, tokens, torch.ones(3, dtype=torch.bool), 0.1, groups)
    pad = torch.zeros(2, 6, dtype=torch.float64)
    queries = torch.cat([queries, pad]).requires_grad_()
    padded = info_nce(
        queries,
        torch.cat([tokens, pad]),
        torch.tensor([True, True, True, False, False]),
        0.1,
        torch.tensor([0, 1, 0, -1, -1]),
    )
    torch.testing.assert_close(padded, one)
    (gradient,) = torch.autograd.grad(padded, queries)
    assert gradient.isfinite().all() and not gradient[3:].any()


@pytest.mark.parametrize("count", [0, 3])
def test_no_valid_row_gives_zero_and_a_finite_gradient(count: int) -> None:
    queries = rows(count, 0).requires_grad_()
    loss = info_nce(queries, rows(count, 1), torch.zeros(count, dtype=torch.bool), 0.1)
    (gradient,) = torch.autograd.grad(loss, queries)
    assert loss == 0 and not gradient.any()


def test_tokens_of_all_processes_give_the_loss_of_one() -> None:
    queries, tokens, bank = rows(6, 0), rows(6, 1), rows(4, 2)
    valid = torch.tensor([True, True, True, False, False, True])
    groups, bank_groups = torch.tensor([0, 1, 1, 0, -1, 2]), torch.tensor([0, 3, 1, -1])
    whole = info_nce(queries, tokens, valid, 0.1, groups, all_of(bank, bank_groups))
    gathered, parts = Negatives(tokens, groups, valid), []
    for start in (0, 3):
        own = slice(start, start + 3)
        negatives = gathered.without_rows(start, 3).joined(all_of(bank, bank_groups))
        count = valid.sum() / 2  # the mean over the two processes
        parts.append(
            info_nce(queries[own], tokens[own], valid[own], 0.1, groups[own], negatives, count)
        )
    torch.testing.assert_close(sum(parts) / 2, whole)


def test_info_nce_gradient() -> None:
    queries = rows(4, 0).requires_grad_()
    valid, groups = torch.tensor([True, True, False, True]), torch.tensor([0, 1, 1, 0])
    bank_groups = torch.tensor([1, -1, 0])

    def loss(x: Tensor) -> Tensor:
        return info_nce(x, rows(4, 1), valid, 0.3, groups, all_of(rows(3, 2), bank_groups))

    assert torch.autograd.gradcheck(loss, queries)


def test_info_nce_is_fp32_inside() -> None:
    queries, tokens = rows(4, 0).float(), rows(4, 1).float()
    valid = torch.ones(4, dtype=torch.bool)
    want = info_nce(queries, tokens, valid, 0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(info_nce(queries, tokens, valid, 0.05), want)


def naive_aggregate(
    queries: Tensor, pooling: str, cls: Tensor, objectness: Tensor, matched: Tensor, t: float
) -> Tensor:
    pooled = []
    for b in range(len(queries)):
        weights = []
        for q in range(queries.shape[1]):
            if pooling == "attention":
                weights.append(math.exp(cosine(queries[b, q], cls[b]) / t) * objectness[b, q])
            else:
                weights.append(
                    objectness[b, q] if pooling == "objectness" else float(matched[b, q])
                )
        share = torch.tensor([float(w) for w in weights], dtype=torch.float64)
        share = share / max(float(share.sum()), 1e-12)
        unit = torch.stack([q / q.norm() for q in queries[b]])
        pooled.append((share[:, None] * unit).sum(0))
    return torch.stack(pooled)


@pytest.mark.parametrize("pooling", ["attention", "objectness", "matched"])
def test_aggregate_against_a_loop(pooling: str) -> None:
    queries, cls = rows(15, 0).view(3, 5, 6), rows(3, 1)
    objectness = rows(3, 2, 5).sigmoid()
    matched = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]], dtype=torch.bool)
    got = aggregate(queries, pooling, cls, objectness, matched, 0.2)
    want = naive_aggregate(queries, pooling, cls, objectness, matched, 0.2)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("pooling", ["attention", "objectness", "matched"])
def test_aggregate_ignores_lengths_and_the_order_of_queries(pooling: str) -> None:
    queries, cls = rows(10, 0).view(2, 5, 6), rows(2, 1)
    objectness, matched = rows(2, 2, 5).sigmoid(), rows(2, 3, 5) > 0
    order = [3, 1, 4, 0, 2]
    one = aggregate(queries, pooling, cls, objectness, matched, 0.2)
    lengths = torch.arange(1.0, 6.0)[:, None]
    other = aggregate(
        (queries * lengths)[:, order],
        pooling,
        3 * cls,
        objectness[:, order],
        matched[:, order],
        0.2,
    )
    torch.testing.assert_close(one, other)


def test_attention_looks_at_queries_like_the_cls_token() -> None:
    queries = torch.eye(4, 6, dtype=torch.float64)[None]
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    objectness = torch.ones(1, 4, dtype=torch.float64)
    got = aggregate(queries, "attention", queries[:, 2], objectness, nothing, 0.05)
    torch.testing.assert_close(got[0], queries[0, 2], atol=1e-6, rtol=0)


@pytest.mark.parametrize("pooling", ["attention", "objectness", "matched"])
def test_pooled_alignment_gradient(pooling: str) -> None:
    queries = rows(15, 0).view(3, 5, 6).requires_grad_()
    cls, objectness = rows(3, 1), rows(3, 2, 5).sigmoid()
    matched = rows(3, 3, 5) > 0

    def loss(x: Tensor) -> Tensor:
        pooled = aggregate(x, pooling, cls, objectness, matched, 0.3)
        return info_nce(pooled, cls, torch.ones(3, dtype=torch.bool), 0.3)

    assert torch.autograd.gradcheck(loss, queries)


def test_an_image_without_matched_query_gives_no_gradient() -> None:
    queries = rows(10, 0).view(2, 5, 6).requires_grad_()
    matched = torch.tensor([[False] * 5, [True] * 5])
    objectness, cls = torch.ones(2, 5, dtype=torch.float64), rows(2, 1)
    pooled = aggregate(queries, "matched", cls, objectness, matched, 0.2)
    loss = info_nce(pooled, cls, torch.ones(2, dtype=torch.bool), 0.2, torch.arange(2))
    (gradient,) = torch.autograd.grad(loss, queries)
    assert gradient.isfinite().all() and not gradient[0].any() and gradient[1].any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 5), st.lists(st.lists(st.booleans(), max_size=7), max_size=5))
def test_bank_is_first_in_first_out(size: int, pushes: list[list[bool]]) -> None:
    bank, kept, number = TokenBank(size, 2), [], 0
    for valid in pushes:
        tokens = torch.tensor([[number + i, -number - i] for i in range(len(valid))]).view(-1, 2)
        groups = torch.arange(number, number + len(valid))
        bank.push(tokens.float(), groups, torch.tensor(valid, dtype=torch.bool))
        kept += [number + i for i, keep in enumerate(valid) if keep]
        number += len(valid)
    want = kept[max(len(kept) - size, 0) :]
    assert bank.groups[bank.valid].tolist() == want
    assert bank.tokens[bank.valid, 0].tolist() == [float(i) for i in want]
    assert bank.tokens.shape == (size, 2) and bank.valid.sum() == len(want)


def test_bank_goes_on_from_its_state() -> None:
    one, other = TokenBank(5, 6), TokenBank(5, 6)
    valid = torch.tensor([True, False, True])
    one.push(rows(3, 0), torch.arange(3), valid)
    other.load_state_dict(one.state_dict())
    for bank in (one, other):
        bank.push(rows(4, 1), torch.arange(4), torch.ones(4, dtype=torch.bool))
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    assert set(one.state_dict()) == {"tokens", "groups", "valid"}


def test_bank_may_be_fed_before_the_backward_pass() -> None:
    bank, queries = TokenBank(3, 6), rows(2, 0).float().requires_grad_()
    both = torch.ones(2, dtype=torch.bool)
    bank.push(rows(2, 1), torch.arange(2), both)
    loss = info_nce(queries, rows(2, 2).float(), both, 0.1, None, bank.negatives())
    bank.push(rows(2, 3), torch.arange(2), both)
    (gradient,) = torch.autograd.grad(loss, queries)
    assert gradient.any()


def test_empty_bank_changes_nothing() -> None:
    queries, tokens = rows(4, 0), rows(4, 1)
    valid = torch.ones(4, dtype=torch.bool)
    for size in (0, 8):
        bank = TokenBank(size, 6)
        bank.push(tokens, torch.arange(4), ~valid)
        got = info_nce(queries, tokens, valid, 0.1, None, bank.negatives())
        torch.testing.assert_close(got, info_nce(queries, tokens, valid, 0.1))
