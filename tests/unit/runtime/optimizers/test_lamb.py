"""Lamb follows its paper, and a sharded tensor gets the trust ratio of the whole tensor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.unit.runtime.optimizers.shards import like, nasty, run_sharded, run_whole
from zeropipe.errors import UsageError
from zeropipe.runtime.optimizers import Lamb, ShardView
from zeropipe.runtime.optimizers.shard_view import SELF

from .shards import layout_of

# Sums over pieces run in another order: a few roundings of each norm, grown over a few steps.
FP64_ORDER = 1e-13
FP32_ORDER = 2e-6


def textbook(p, grads, lr, betas, eps, wd, lo=0.01, hi=10.0, correct=True):
    """arXiv 1904.00962, Algorithm 2, one tensor, written down naively."""
    m = v = torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        mh, vh = (m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)) if correct else (m, v)
        r = mh / (vh.sqrt() + eps) + wd * p
        w, u = p.norm(), r.norm()
        ratio = (w / u).clamp(lo, hi) if w > 0 and u > 0 else 1.0
        p = p - lr * ratio * r
    return p


@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("wd", [0.0, 0.1])
def test_it_is_the_paper(wd, correct):
    gen = torch.Generator().manual_seed(0)
    start = nasty(gen, torch.float64)
    grads = [like(start, gen) for _ in range(4)]

    def make(groups):
        return Lamb(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=wd, bias_correction=correct)

    (ours,) = run_whole(make, [(start, {})], [[g] for g in grads])
    for i, (p, result) in enumerate(zip(start, ours, strict=True)):
        expected = textbook(p, [g[i] for g in grads], 0.01, (0.8, 0.95), 1e-6, wd, correct=correct)
        torch.testing.assert_close(result, expected, rtol=FP64_ORDER, atol=FP64_ORDER)


@pytest.mark.parametrize(("size", "align"), [(2, 1), (3, 1), (4, 8), (7, 1)])
def test_shards_equal_the_whole(monkeypatch, size, align):
    gen = torch.Generator().manual_seed(size)
    groups = [
        (nasty(gen, torch.float64), {}),
        (nasty(gen, torch.float64)[1:5], {"lr": 0.02, "max_coeff": 0.5}),
    ]
    grads = [[like(tensors, gen) for tensors, _ in groups] for _ in range(3)]

    def make(given):
        return Lamb(given, lr=0.01, weight_decay=0.1)

    sharded, wire = run_sharded(monkeypatch, make, groups, grads, size, align)
    whole = run_whole(make, groups, grads)
    for mine, theirs in zip(sharded, whole, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=FP64_ORDER, atol=FP64_ORDER)
    # One all-reduce per rank and step, of two sums per tensor, for all groups together.
    tensors = sum(len(t) for t, _ in groups)
    assert sorted(wire.log) == [("all_reduce", rank, 2 * tensors) for rank in range(size) for _ in grads]


def test_fp32_error_is_no_larger_on_shards(monkeypatch):
    gen = torch.Generator().manual_seed(5)
    start = nasty(gen)
    grads = [[like(start, gen)] for _ in range(5)]

    def make(given):
        return Lamb(given, lr=0.01, weight_decay=0.1)

    wide = run_whole(
        make, [([t.double() for t in start], {})], [[[g.double() for g in s[0]]] for s in grads]
    )[0]
    whole = run_whole(make, [(start, {})], grads)[0]
    (sharded,), _ = run_sharded(monkeypatch, make, [(start, {})], grads, 3)
    error = max(((a - w).abs().max().item() for a, w in zip(sharded, wide, strict=True) if a.numel()))
    plain = max(((a - w).abs().max().item() for a, w in zip(whole, wide, strict=True) if a.numel()))
    assert error <= max(2 * plain, FP32_ORDER)


def test_masters_without_gradient_are_not_stepped(monkeypatch):
    gen = torch.Generator().manual_seed(2)
    groups = [(nasty(gen, torch.float64), {}), (nasty(gen, torch.float64), {})]
    grads = [[like(tensors, gen) for tensors, _ in groups] for _ in range(3)]
    sharded, _ = run_sharded(monkeypatch, Lamb, groups, grads, 3, idle=(1, 0))
    whole = run_whole(Lamb, groups, grads, idle=(1, 0))
    for a, b in zip(sharded[0] + sharded[1], whole[0] + whole[1], strict=True):
        torch.testing.assert_close(a, b, rtol=FP64_ORDER, atol=FP64_ORDER)


def test_bf16_parameters_get_wide_norms():
    p = nn.Parameter(torch.full((1 << 16,), 1.0, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    Lamb([p], lr=0.5, max_coeff=1.0).step()
    # |x| = 256 and |r| = 256, so the ratio is 1 and the step 0.5: exact in bf16 only if norms are wide.
    assert torch.equal(p.detach(), torch.full_like(p, 0.5))


def test_non_contiguous_parameter_is_stepped():
    base = torch.randn(4, 6)
    strided = nn.Parameter(base.t().clone(memory_format=torch.preserve_format))
    plain = nn.Parameter(base.t().contiguous())
    assert not strided.is_contiguous()
    for p in (strided, plain):
        p.grad = torch.ones_like(p) * 0.3
        Lamb([p], lr=0.1).step()
    assert torch.equal(strided, plain)
    assert not torch.equal(plain.detach(), base.t())


def test_skips_missing_gradients_and_refuses_sparse_ones():
    p = nn.Parameter(torch.ones(3))
    optimizer = Lamb([p], weight_decay=0.5)
    optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3))
    p.grad = torch.ones(3).to_sparse()
    with pytest.raises(UsageError, match="sparse=False"):
        optimizer.step()


def test_state_round_trip_continues_bitwise():
    def fresh():
        p = nn.Parameter(torch.arange(1.0, 7.0).view(2, 3))
        return p, Lamb([p], lr=0.1)

    a, opt_a = fresh()
    b, opt_b = fresh()
    for step in range(4):
        a.grad = torch.full_like(a, 0.1 * step)
        opt_a.step()
        if step == 1:
            b.data.copy_(a.data)
            opt_b.load_state_dict(copy.deepcopy(opt_a.state_dict()))
        if step > 1:
            b.grad = a.grad.clone()
            opt_b.step()
    assert torch.equal(a, b)


def test_wrong_master_and_wrong_view_are_refused():
    layout = layout_of([torch.zeros(4)], 1)
    with pytest.raises(UsageError, match=r"expected \(4,\), found \(5,\)"):
        Lamb([p := nn.Parameter(torch.zeros(5))]).bind_shards({p: ShardView(layout, 0, SELF)})
    with pytest.raises(UsageError, match="one group member per shard"):
        ShardView(layout_of([torch.zeros(4)], 2), 0, SELF)


@pytest.mark.parametrize(
    "bad",
    [{"lr": -1}, {"betas": (1.0, 0.9)}, {"eps": -1e-8}, {"max_coeff": 0.001}, {"weight_decay": float("nan")}],
)
def test_bad_values_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Lamb([nn.Parameter(torch.zeros(1))], **bad)
