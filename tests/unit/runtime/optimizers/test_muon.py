"""Muon on shards is Muon, bit for bit, however the matrices are cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.unit.runtime.optimizers.shards import layout_of, like, nasty, run_sharded, run_whole
from zeropipe.errors import UsageError
from zeropipe.layout.flat import flat_shards
from zeropipe.runtime.optimizers import Muon, muon
from zeropipe.runtime.optimizers.muon import (
    NS_COEFFICIENTS,
    NS_DTYPE,
    is_matrix,
    merged_runs,
    newton_schulz,
    plan_rounds,
)

BF16_STEPS = 0.03  # a handful of bf16 roundings (2**-8 each) on singular values near 1


def make(groups):
    return Muon(groups, lr=0.02, weight_decay=0.1)


def assert_bitwise(sharded, whole):
    for mine, theirs in zip(sharded, whole, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize("align", [1, 16])
def test_shards_equal_the_whole_bitwise(monkeypatch, size, align):
    gen = torch.Generator().manual_seed(size)
    groups = [
        (nasty(gen), {}),
        (nasty(gen)[4:9], {"use_muon": True, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"}),
        (nasty(gen)[1:5], {"use_muon": False, "lr": 0.001}),
    ]
    grads = [[like(tensors, gen) for tensors, _ in groups] for _ in range(3)]
    sharded, wire = run_sharded(monkeypatch, make, groups, grads, size, align)
    assert_bitwise(sharded, run_whole(make, groups, grads))
    # Each cut matrix travels to its owner and back once a step, less the owner's own piece.
    cut = 0
    for tensors, extra in groups[:2]:
        layout = layout_of(tensors, size, align)
        for i, tensor in enumerate(tensors):
            pieces = layout.tensor_pieces(i)
            if is_matrix(tensor.shape, extra.get("use_muon")) and len(pieces) > 1:
                cut += tensor.numel() - max(p.numel for p in pieces)
    assert sum(n for _, _, n in wire.log) == 2 * cut * len(grads) > 0


def test_small_rounds_give_the_same_bits(monkeypatch):
    gen = torch.Generator().manual_seed(9)
    groups = [(like([torch.zeros(5, 4), torch.zeros(6, 7), torch.zeros(3, 3)], gen), {}) for _ in range(3)]
    grads = [[like(tensors, gen) for tensors, _ in groups] for _ in range(2)]
    monkeypatch.setattr(muon, "plan_rounds", lambda a, b: plan_rounds(a, b, max_owned=1))
    sharded, _ = run_sharded(monkeypatch, make, groups, grads, 3)
    assert_bitwise(sharded, run_whole(make, groups, grads))


def test_masters_without_gradient_are_not_stepped(monkeypatch):
    gen = torch.Generator().manual_seed(2)
    groups = [(nasty(gen), {}), (nasty(gen), {})]
    grads = [[like(tensors, gen) for tensors, _ in groups] for _ in range(3)]
    sharded, _ = run_sharded(monkeypatch, make, groups, grads, 3, idle=(1, 0))
    whole = run_whole(make, groups, grads, idle=(1, 0))
    assert_bitwise(sharded, whole)


def test_it_agrees_with_torch_muon():
    gen = torch.Generator().manual_seed(3)
    for shape in [(8, 8), (12, 5), (5, 12)]:
        for adjust in ("original", "match_rms_adamw"):
            start = torch.randn(shape, generator=gen)
            ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
            a = Muon([ours], lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust)
            b = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust)
            for _ in range(3):
                ours.grad = torch.randn(shape, generator=gen)
                theirs.grad = ours.grad.clone()
                a.step()
                b.step()
            step = 0.02 * max(1.0, 0.2 * max(shape) ** 0.5, (shape[0] / shape[1]) ** 0.5)
            assert (ours - theirs).abs().max() <= 3 * step * BF16_STEPS


def test_newton_schulz_maps_singular_values_near_one():
    gen = torch.Generator().manual_seed(4)
    for shape in [(16, 16), (32, 8), (8, 32), (1, 7), (7, 1)]:
        o = newton_schulz(torch.randn(shape, generator=gen), 5, NS_COEFFICIENTS, 1e-7)
        assert o.shape == shape and o.dtype == NS_DTYPE
        s = torch.linalg.svdvals(o.float())
        # The quintic with these coefficients does not converge to 1; it lands in about [0.7, 1.2].
        assert s.min() > 0.3 and s.max() < 1.3
    assert not newton_schulz(torch.zeros(3, 4), 5, NS_COEFFICIENTS, 1e-7).any()


def test_other_parameters_follow_adamw():
    gen = torch.Generator().manual_seed(6)
    start = torch.randn(33, generator=gen)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a = Muon([ours], lr=0.01, weight_decay=0.1)
    b = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, foreach=False)
    for _ in range(4):
        ours.grad = torch.randn(33, generator=gen)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # same formula, another order of roundings


def test_state_holds_only_what_each_kind_needs():
    matrix, vector = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(4))
    optimizer = Muon([matrix, vector])
    matrix.grad, vector.grad = torch.ones_like(matrix), torch.ones_like(vector)
    optimizer.step()
    assert set(optimizer.state[matrix]) == {"step", "momentum_buffer"}
    assert set(optimizer.state[vector]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": -1},
        {"momentum": 1.0},
        {"adjust_lr_fn": "spectral"},
        {"ns_coefficients": (1, 2)},
        {"ns_steps": -1},
    ],
)
def test_bad_values_are_refused(bad):
    with pytest.raises(ValueError):
        Muon([nn.Parameter(torch.zeros(2, 2))], **bad)


def test_use_muon_on_a_vector_is_refused():
    optimizer = Muon([{"params": [p := nn.Parameter(torch.zeros(4))], "use_muon": True}])
    p.grad = torch.ones(4)
    with pytest.raises(UsageError, match=r"found shape \(4,\)"):
        optimizer.step()


shapes = st.lists(st.lists(st.integers(0, 9), min_size=0, max_size=3).map(tuple), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(st.lists(shapes, min_size=1, max_size=3), st.integers(1, 6), st.integers(1, 40))
def test_plan_covers_each_cut_matrix_once_within_bounds(many, size, max_owned):
    layouts = [flat_shards([(f"t{i}", s, "float32") for i, s in enumerate(g)], size) for g in many]
    matrices = [[i for i, t in enumerate(layout.tensors) if len(t.shape) >= 2] for layout in layouts]
    rounds = plan_rounds(layouts, matrices, max_owned)
    cuts = [cut for cuts in rounds for cut in cuts]
    expected = [
        (slot, i)
        for slot, (layout, mine) in enumerate(zip(layouts, matrices, strict=True))
        for i in mine
        if len(layout.tensor_pieces(i)) > 1
    ]
    assert [(c.slot, c.tensor) for c in cuts] == expected
    for cut in cuts:
        (owned,) = (piece for piece in cut.pieces if piece.shard == cut.owner)
        assert owned.numel == max(p.numel for p in cut.pieces)
        assert len({p.shard for p in cut.pieces}) == len(cut.pieces)
    for together in rounds:
        for owner in range(size):
            owned = [c.numel for c in together if c.owner == owner]
            assert len(owned) <= 1 or sum(owned) <= max_owned


def test_equal_pieces_are_shared_out_among_owners():
    layouts = [flat_shards([("w", (4, 4), "float32")], 4) for _ in range(8)]  # ZeRO-3: one layout a parameter
    owners = [cut.owner for cuts in plan_rounds(layouts, [[0]] * 8) for cut in cuts]
    assert sorted(owners) == [0, 0, 1, 1, 2, 2, 3, 3]


@settings(max_examples=100, deadline=None)
@given(shapes, st.integers(1, 5))
def test_runs_cover_the_shard_once(given_shapes, size):
    layout = flat_shards([(f"t{i}", s, "float32") for i, s in enumerate(given_shapes)], size)
    matrices = frozenset(i for i, s in enumerate(given_shapes) if len(s) >= 2)
    for shard in range(size):
        pieces = layout.pieces(shard)
        runs = merged_runs(pieces, matrices)
        seen = sorted(i for kind in runs for run in kind for i in range(run.start, run.stop))
        assert seen == list(range(sum(p.numel for p in pieces)))
        mine = {i for run in runs[0] for i in range(run.start, run.stop)}
        for p in pieces:
            assert (p.offset in mine) == (p.tensor in matrices)
