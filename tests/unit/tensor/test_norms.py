"""Norms: exact to fp64, safe for squares that overflow, the same for any cut, and per tensor of a shard."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zeropipe.layout.flat import flat_shards
from zeropipe.tensor import norms
from zeropipe.tensor.norms import (
    SegmentNorms,
    clip_coefficient,
    combine_terms,
    norm_from_term,
    norm_op,
    norm_term,
    rough_squared_norm,
    squared_norm,
    total_norm,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# At most 2**17 additions in a row, each off by at most 2**-53: 1.5e-11 if all errors pointed one way.
FP64_ROUNDINGS = 2.0 ** (17 - 53)
NUMEL = 150_000  # more than one chunk


def exact_square(x: torch.Tensor) -> float:
    return math.fsum(v * v for v in x.double().flatten().tolist())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [0, 1, 7, 1000, 150_001])
def test_squared_norm(dtype: torch.dtype, numel: int) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
    got = squared_norm(x)
    assert got.dtype == torch.float64 and got.shape == ()
    assert got.item() == pytest.approx(exact_square(x), rel=FP64_ROUNDINGS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [0, 1, 7, 1000, 150_001])
def test_the_rough_norm(dtype: torch.dtype, numel: int) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
    assert rough_squared_norm(x) == pytest.approx(exact_square(x), rel=1e-6)
    runs: list[torch.Tensor] = []
    rough_squared_norm(x, runs.append)
    assert torch.equal(torch.cat([*runs, x[:0]]), x if x.dtype == torch.float32 or runs else x[:0])


def test_the_rough_norm_of_what_is_too_large_or_not_finite() -> None:
    assert rough_squared_norm(torch.full((3,), 1e30)) == pytest.approx(3e60, rel=1e-6)
    assert rough_squared_norm(torch.tensor([1.0, math.inf])) == math.inf
    assert math.isnan(rough_squared_norm(torch.tensor([1.0, math.nan])))


@pytest.mark.parametrize("dtype", DTYPES)
def test_squares_that_do_not_fit_the_dtype(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    for value in (info.max, info.smallest_normal):
        x = torch.full((3,), value, dtype=dtype)
        assert squared_norm(x).item() == pytest.approx(3 * x[0].item() ** 2, rel=FP64_ROUNDINGS)
        assert squared_norm(x).item() > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("at", [0, 140_000, NUMEL - 1])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_a_norm_is_finite_exactly_when_its_elements_are(
    dtype: torch.dtype, bad: float, at: int, p: float
) -> None:
    x = torch.full((NUMEL,), torch.finfo(dtype).max if p <= 2 else 1.0, dtype=dtype)
    assert math.isfinite(norm_term(x, p).item())
    x[at] = bad
    assert not math.isfinite(norm_term(x, p).item())


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, math.inf])
def test_norms_of_other_orders(p: float) -> None:
    x = torch.randn(1001, dtype=torch.float64)
    expected = torch.linalg.vector_norm(x, p).item()
    assert total_norm([x[:10], x[10:10], x[10:].view(-1, 1)], p).item() == pytest.approx(
        expected, rel=FP64_ROUNDINGS
    )
    terms = [norm_term(part, p) for part in x.split(100)]
    assert norm_from_term(combine_terms(terms, p), p).item() == pytest.approx(expected, rel=FP64_ROUNDINGS)


def test_nothing_has_norm_zero() -> None:
    for p in (1.0, 2.0, math.inf):
        assert total_norm([], p).item() == 0
        assert total_norm([torch.zeros(0)], p).item() == 0
    assert (norm_op(2.0), norm_op(1.0), norm_op(math.inf)) == ("sum", "sum", "max")
    for p in (0.0, -1.0, -math.inf, math.nan):
        with pytest.raises(ValueError, match="positive"):
            norm_term(torch.ones(1), p)


@given(cuts=st.lists(st.integers(0, NUMEL), max_size=6), dtype=st.sampled_from(DTYPES))
@settings(max_examples=30, deadline=None)
def test_the_clipping_factor_is_the_same_bits_however_the_gradient_is_cut(
    cuts: list[int], dtype: torch.dtype
) -> None:
    x = torch.randn(NUMEL, generator=torch.Generator().manual_seed(0)).to(dtype)
    edges = [0, *sorted(cuts), NUMEL]
    parts = [squared_norm(x[a:b]) for a, b in pairwise(edges)]
    factor = clip_coefficient(combine_terms(parts).sqrt(), 1.0)
    assert torch.equal(factor.float(), clip_coefficient(total_norm([x]), 1.0).float())


def test_the_clipping_factor() -> None:
    assert clip_coefficient(4.0, 1.0).item() == 1 / (4 + norms.CLIP_EPS)
    assert clip_coefficient(0.5, 1.0).item() == 1
    assert clip_coefficient(0.0, 1.0).item() == 1
    assert clip_coefficient(torch.tensor(1e9), 0.0).item() == 1  # 0 is "off" in a configuration
    assert clip_coefficient(torch.tensor(math.inf), 0.0).item() == 1
    assert math.isnan(clip_coefficient(math.nan, 1.0).item())
    grads = [torch.randn(5, 3) * 10, torch.randn(7) * 10]
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    factor = clip_coefficient(total_norm(grads), 1.0).float()
    for p, g in zip(params, grads, strict=True):
        # torch rounds norm and factor to fp32, we once at the end: two units in the last place.
        torch.testing.assert_close(p.grad, g * factor, rtol=2**-22, atol=0)


SHAPES = st.lists(
    st.one_of(st.just(()), st.tuples(st.integers(0, 60)), st.tuples(st.integers(0, 8), st.integers(1, 9))),
    max_size=7,
)


@given(shapes=SHAPES, num_shards=st.integers(1, 5), align=st.integers(1, 4), dtype=st.sampled_from(DTYPES))
@settings(max_examples=80, deadline=None)
def test_segment_norms_of_all_shards_add_up_to_the_tensors(
    shapes: list[tuple[int, ...]], num_shards: int, align: int, dtype: torch.dtype
) -> None:
    layout = flat_shards(((str(i), s, "float32") for i, s in enumerate(shapes)), num_shards, align)
    flat = torch.randn(layout.padded_numel).to(dtype)
    flat[layout.numel :] = math.nan  # padding is nobody's
    total = torch.zeros(len(shapes), dtype=torch.float64)
    for shard in range(num_shards):
        start, stop = layout.shard_range(shard)
        part = SegmentNorms(layout, shard).squared(flat[start:stop])
        assert part.dtype == torch.float64 and part.shape == (len(shapes),)
        total += part
    for i in range(len(shapes)):
        a, b = layout.tensor_range(i)
        assert total[i].item() == pytest.approx(exact_square(flat[a:b]), rel=FP64_ROUNDINGS)


def test_segment_norms_of_a_tensor_longer_than_a_chunk() -> None:
    layout = flat_shards([("a", (3,), "float32"), ("b", (150_000,), "float32"), ("c", (5,), "float32")], 1)
    flat = torch.randn(layout.padded_numel)
    got = SegmentNorms(layout, 0).squared(flat)
    expected = [exact_square(flat[a:b]) for a, b in map(layout.tensor_range, range(3))]
    assert got.tolist() == pytest.approx(expected, rel=FP64_ROUNDINGS)
    assert not torch.isfinite(
        SegmentNorms(layout, 0).squared(flat.index_fill(0, torch.tensor([4]), math.inf))[1]
    )


def test_segment_norms_refuse_another_shard() -> None:
    layout = flat_shards([("a", (4, 2), "float32")], 2)
    with pytest.raises(ValueError, match="shard of 4 elements"):
        SegmentNorms(layout, 0).squared(torch.zeros(8))
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        SegmentNorms(layout, 0).squared(torch.zeros(2, 2))


def test_a_parameter_can_be_measured() -> None:
    assert not squared_norm(torch.nn.Parameter(torch.ones(4))).requires_grad
    assert not norm_term(torch.nn.Parameter(torch.ones(4)), math.inf).requires_grad
