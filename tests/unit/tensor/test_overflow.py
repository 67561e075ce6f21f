"""The finite test is exact, and the diagnosis names the right parameter."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zeropipe.layout.flat import flat_shards
from zeropipe.tensor.overflow import (
    NonFinite,
    all_finite,
    earliest,
    first_nonfinite,
    first_nonfinite_in_shard,
    overflow_flag,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_finite_values_are_no_overflow(dtype: torch.dtype) -> None:
    big = torch.finfo(dtype).max
    assert all_finite(torch.full((1000,), big, dtype=dtype))  # their sum is inf
    assert all_finite(torch.tensor([big, -big] * 500, dtype=dtype))
    assert all_finite(torch.zeros(3, dtype=dtype))


@given(
    dtype=st.sampled_from(DTYPES),
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


def test_the_first_bad_parameter_is_named_and_counted() -> None:
    bad = torch.ones(4, 2, dtype=torch.float16)
    bad[0, 0], bad[3, 1], bad[2, 0] = math.inf, -math.inf, math.nan
    named = [("emb", torch.ones(3)), ("frozen", None), ("h.0.w", bad), ("h.1.w", torch.tensor([math.nan]))]
    found = first_nonfinite(named, rank=3, micro_step=1)
    assert found == NonFinite("h.0.w", num_inf=2, num_nan=1, numel=8, rank=3, micro_step=1)
    assert str(found) == (
        "gradient of parameter 'h.0.w' has 2 inf and 1 NaN in 8 elements (rank 3, micro-step 1)"
    )
    assert pickle.loads(pickle.dumps(found)) == found
    assert first_nonfinite(named[:2]) is None
    assert "(" not in str(NonFinite("a", 0, 1, 1))


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    num_shards=st.integers(1, 4),
    data=st.data(),
)
def test_a_shard_names_the_parameter_whose_element_is_bad(
    sizes: list[int], num_shards: int, data: st.DataObject
) -> None:
    layout = flat_shards(((f"p{i}", (n,), "float32") for i, n in enumerate(sizes)), num_shards)
    if layout.numel == 0:
        return
    at = data.draw(st.integers(0, layout.numel - 1))
    flat = torch.zeros(layout.padded_numel)
    flat[at] = math.nan
    owner = next(i for i in range(len(sizes)) if layout.tensor_range(i)[0] <= at < layout.tensor_range(i)[1])
    for shard in range(num_shards):
        start, stop = layout.shard_range(shard)
        found = first_nonfinite_in_shard(flat[start:stop], layout, shard, rank=shard, micro_step=0)
        if start <= at < stop:
            assert found is not None and (found.name, found.num_nan, found.rank) == (f"p{owner}", 1, shard)
        else:
            assert found is None


def test_padding_is_not_diagnosed() -> None:
    layout = flat_shards([("a", (3,), "float32")], 2)
    assert first_nonfinite_in_shard(torch.tensor([0.0, math.nan]), layout, 1) is None


def test_the_earliest_report_wins() -> None:
    def report(rank: int | None, micro: int | None) -> NonFinite:
        return NonFinite(f"{rank}/{micro}", 1, 0, 1, rank, micro)

    reports = [None, report(2, 1), report(0, 3), report(1, 1), report(0, None), None]
    assert earliest(reports) == report(1, 1)
    assert earliest(reversed(reports)) == report(1, 1)
    assert earliest([report(None, None), report(5, None)]) == report(5, None)
    assert earliest([None]) is None
