"""A mosaic's runs give what torch makes of the same tensors, whatever is done to them and wherever it is cut."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from zeropipe.layout.mosaic import Mosaic, joined

Pair = tuple[torch.Tensor, Mosaic]


def read(mosaic: Mosaic, sources: list[torch.Tensor], start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop), by the runs alone; -1 where none came."""
    out = torch.full((stop - start,), -1)
    for run in mosaic.runs(start, stop):
        assert run.numel > 0
        lies = sources[run.source].as_strided((sources[run.source].numel(),), (1,))
        assert (out[run.at - start : run.at - start + run.numel] == -1).all()  # each element once
        out[run.at - start : run.at - start + run.numel] = lies[run.start : run.start + run.numel]
    return out


@st.composite
def mosaics(draw: st.DrawFn) -> tuple[Pair, list[torch.Tensor]]:
    """What a few random operations make of a few tensors, beside what torch makes of them."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    count = draw(st.integers(1, 3))
    numel = torch.Size(shape).numel()
    sources = [torch.arange(i * numel, (i + 1) * numel).view(shape) for i in range(count)]
    pairs: list[Pair] = [(source, Mosaic.of(i, shape)) for i, source in enumerate(sources)]
    for _ in range(draw(st.integers(0, 5))):
        pairs = draw(st.sampled_from([join, cut, unsqueeze, squeeze, transpose_stored, view]))(
            draw, pairs, sources
        )
    return draw(st.sampled_from(pairs)), sources


def join(draw: st.DrawFn, pairs: list[Pair], _: list[torch.Tensor]) -> list[Pair]:
    dim = draw(st.integers(0, pairs[0][0].dim() - 1)) if pairs[0][0].dim() else None
    if dim is None:
        return pairs
    return [(torch.cat([t for t, _ in pairs], dim), joined([m for _, m in pairs], dim))]


def cut(draw: st.DrawFn, pairs: list[Pair], _: list[torch.Tensor]) -> list[Pair]:
    if not pairs[0][0].dim():
        return pairs
    dim = draw(st.integers(0, pairs[0][0].dim() - 1))
    size = pairs[0][0].size(dim)
    start = draw(st.integers(0, size))
    stop = draw(st.integers(start, size))
    return [(t.narrow(dim, start, stop - start), m.cut(dim, start, stop)) for t, m in pairs]


def unsqueeze(draw: st.DrawFn, pairs: list[Pair], _: list[torch.Tensor]) -> list[Pair]:
    dim = draw(st.integers(0, pairs[0][0].dim()))
    return [(t.unsqueeze(dim), m.with_dim(dim)) for t, m in pairs]


def squeeze(draw: st.DrawFn, pairs: list[Pair], _: list[torch.Tensor]) -> list[Pair]:
    ones = [i for i, size in enumerate(pairs[0][0].shape) if size == 1]
    if not ones:
        return pairs
    dim = draw(st.sampled_from(ones))
    return [(t.squeeze(dim), m.without_dim(dim)) for t, m in pairs]


def view(draw: st.DrawFn, pairs: list[Pair], _: list[torch.Tensor]) -> list[Pair]:
    viewed = [m.viewed((m.numel,)) for _, m in pairs]
    return (
        [
            (t, m) if flat is None else (t.reshape(-1), flat)
            for (t, m), flat in zip(pairs, viewed, strict=True)
        ]
        if all(flat is not None for flat in viewed)
        else pairs
    )


def transpose_stored(draw: st.DrawFn, pairs: list[Pair], sources: list[torch.Tensor]) -> list[Pair]:
    """Other sources: files of torch hold tensors with strides."""
    transposed = [source.t() if source.dim() == 2 else source for source in sources]
    return [(t, Mosaic.of(i, t.shape, t.stride())) for i, t in enumerate(transposed)]


@given(mosaics(), st.integers(1, 5))
def test_runs_of_all_shards_are_what_torch_makes(made: tuple[Pair, list[torch.Tensor]], ranks: int):
    (expected, mosaic), sources = made
    assert mosaic.shape == tuple(expected.shape)
    flat = expected.reshape(-1)
    size = -(-flat.numel() // ranks)
    for rank in range(ranks):
        start, stop = min(rank * size, flat.numel()), min((rank + 1) * size, flat.numel())
        assert torch.equal(read(mosaic, sources, start, stop), flat[start:stop])


def test_fused_experts_are_one_run_for_each_source():
    rows, columns, experts = 6, 8, 4
    parts = [
        Mosaic.of((kind, e), (rows, columns)).with_dim(0) for kind in ("gate", "up") for e in range(experts)
    ]
    fused = joined([joined(parts[:experts], 0), joined(parts[experts:], 0)], 1)
    assert fused.shape == (experts, 2 * rows, columns)
    half = fused.numel // 2
    assert [run.numel for run in fused.runs(half, fused.numel)] == [rows * columns] * 4
    assert {run.source for run in fused.runs(half, fused.numel)} == {
        (k, e) for k in ("gate", "up") for e in (2, 3)
    }


def test_another_source_and_a_shape_that_cannot_be_viewed():
    pair = joined([Mosaic.of(0, (2, 3)), Mosaic.of(1, (2, 3))], 0)
    assert {run.source for run in pair.over(lambda source: source + 10).runs(0, 12)} == {10, 11}  # type: ignore[operator]
    assert pair.viewed((12,)) is None
    assert Mosaic.of(0, (2, 3)).cut(1, 0, 2).viewed((4,)) is None
