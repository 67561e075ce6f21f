"""Norms: exact to fp64, safe for squares that overflow, the same for any cut; inf and NaN: found exactly, and named."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zeropipe.tensor import norms
from zeropipe.tensor.norms import (
    EXACT_BITS,
    NonFinite,
    all_finite,
    clip_coefficient,
    earliest,
    exact_squares,
    overflow_flag,
    rough_squared_norm,
    squared_norm,
    total_norm,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
FLOATS = [*DTYPES, torch.float64]
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
    assert math.isfinite(total_norm([x], p).item())
    x[at] = bad
    assert not math.isfinite(total_norm([x], p).item())


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, math.inf])
def test_norms_of_other_orders(p: float) -> None:
    x = torch.randn(1001, dtype=torch.float64)
    expected = torch.linalg.vector_norm(x, p).item()
    assert total_norm([x[:10], x[10:10], x[10:].view(-1, 1)], p).item() == pytest.approx(
        expected, rel=FP64_ROUNDINGS
    )
    assert total_norm(x.split(100), p).item() == pytest.approx(expected, rel=FP64_ROUNDINGS)


def test_nothing_has_norm_zero() -> None:
    for p in (1.0, 2.0, math.inf):
        assert total_norm([], p).item() == 0
        assert total_norm([torch.zeros(0)], p).item() == 0
    for p in (0.0, -1.0, -math.inf, math.nan):
        with pytest.raises(ValueError, match="positive"):
            total_norm([torch.ones(1)], p)


@given(cuts=st.lists(st.integers(0, NUMEL), max_size=6), dtype=st.sampled_from(DTYPES))
@settings(max_examples=30, deadline=None)
def test_the_clipping_factor_is_the_same_bits_however_the_gradient_is_cut(
    cuts: list[int], dtype: torch.dtype
) -> None:
    x = torch.randn(NUMEL, generator=torch.Generator().manual_seed(0)).to(dtype)
    edges = [0, *sorted(cuts), NUMEL]
    norm = total_norm(x[a:b] for a, b in pairwise(edges))
    factor = clip_coefficient(norm, 1.0)
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


def test_a_parameter_can_be_measured() -> None:
    assert not squared_norm(torch.nn.Parameter(torch.ones(4))).requires_grad
    assert not total_norm([torch.nn.Parameter(torch.ones(4))], math.inf).requires_grad


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_finite_values_are_no_overflow(dtype: torch.dtype) -> None:
    big = torch.finfo(dtype).max
    assert all_finite(torch.full((1000,), big, dtype=dtype))  # their sum is inf
    assert all_finite(torch.tensor([big, -big] * 500, dtype=dtype))
    assert all_finite(torch.zeros(3, dtype=dtype))


@given(
    dtype=st.sampled_from(FLOATS),
    numel=st.integers(1, 300),
    bad=st.lists(
        st.tuples(st.integers(0, 299), st.sampled_from([math.inf, -math.inf, math.nan])), max_size=4
    ),
)
@settings(max_examples=150, deadline=None)
def test_all_finite_is_exact(dtype: torch.dtype, numel: int, bad: list[tuple[int, float]]) -> None:
    x = torch.full((numel,), torch.finfo(dtype).max, dtype=dtype)
    for at, value in bad:
        x[at % numel] = value
    assert bool(all_finite(x)) == bool(torch.isfinite(x).all())
    assert bool(overflow_flag([x])) != bool(all_finite(x))


def test_tensors_without_anything_to_find() -> None:
    assert all_finite(torch.zeros(0))
    assert all_finite(torch.zeros(2, 0, 3, dtype=torch.float16))
    assert all_finite(torch.arange(4))
    assert all_finite(torch.tensor([True]))
    assert all_finite(torch.tensor(1.0))
    assert all_finite(torch.ones(2, dtype=torch.complex64))
    assert not all_finite(torch.tensor([1, complex(0, math.inf)]))
    assert not all_finite(torch.ones(4, 4).t().contiguous().t().fill_(math.nan)[:, 1])


def test_the_flag() -> None:
    assert overflow_flag([]).item() == 0
    assert overflow_flag([None, torch.ones(2)]).item() == 0
    flag = overflow_flag([torch.ones(2), None, torch.tensor([math.nan]), torch.ones(1)])
    assert flag.item() == 1 and flag.dtype == torch.float32 and flag.shape == ()


def test_a_report_says_what_was_found_and_where() -> None:
    found = NonFinite("h.0.w", num_inf=2, num_nan=1, numel=8, rank=3, micro_step=1)
    assert str(found) == (
        "gradient of parameter 'h.0.w' has 2 inf and 1 NaN in 8 elements (rank 3, micro-step 1)"
    )
    assert pickle.loads(pickle.dumps(found)) == found
    assert "(" not in str(NonFinite("a", 0, 1, 1))


def test_the_earliest_report_wins() -> None:
    def report(rank: int | None, micro: int | None) -> NonFinite:
        return NonFinite(f"{rank}/{micro}", 1, 0, 1, rank, micro)

    reports = [None, report(2, 1), report(0, 3), report(1, 1), report(0, None), None]
    assert earliest(reports) == report(1, 1)
    assert earliest(reversed(reports)) == report(1, 1)
    assert earliest([report(None, None), report(5, None)]) == report(5, None)
    assert earliest([None]) is None


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [1e-38, 1e-3, 1.0, 1e4, 1e38])
def test_an_exact_sum_of_squares_is_the_integer_that_it_says(dtype: torch.dtype, scale: float) -> None:
    """Each square, rounded to the unit (to even at a tie), added as whole numbers; whatever the cuts."""
    x = (torch.randn(NUMEL, generator=torch.Generator().manual_seed(3)).double() * scale).to(dtype)
    x = x[x.isfinite()]
    _, exponent = math.frexp(x.abs().amax().item()) if x.numel() and x.any() else (0.0, 0)
    found = exact_squares(x, exponent)
    for cuts in ([1, 5000, 65_536, 65_537], [len(x) // 3, 2 * len(x) // 3]):
        assert sum(exact_squares(part, exponent) for part in x.tensor_split(cuts)) == found
    some = x[:300]
    unit = Fraction(2) ** (2 * exponent - EXACT_BITS)
    # A square of fp64 is rounded to 53 bits first, in which the unit may lie between two.
    slack = 0 if dtype != torch.float64 else len(some)
    exact = sum(round(Fraction(v) * Fraction(v) / unit) for v in some.double().tolist())
    assert abs(exact_squares(some, exponent) - exact) <= slack
