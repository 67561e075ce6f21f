"""Which tensors share memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zeropipe.tensor.model import overlapping


def named(*tensors: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    return [(str(number), tensor) for number, tensor in enumerate(tensors)]


BASE = torch.arange(24.0).view(4, 6)


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ((torch.ones(3), torch.ones(3)), None),
        ((BASE, BASE[1:2]), ("0", "1")),
        ((BASE[:2], BASE[2:]), None),  # end to end
        ((BASE[:, :3], BASE[:, 3:]), None),  # columns: their ranges overlap, their elements do not
        ((BASE[:, :4], BASE[:, 3:]), ("0", "1")),
        ((BASE.t(), BASE), ("0", "1")),
        ((BASE.view(-1)[0:3:2], BASE.view(-1)[1:2]), None),  # an element in a hole
        ((torch.ones(3), BASE[::2], torch.ones(2), BASE[1::2]), None),
        ((BASE, BASE.view(torch.int32)), ("0", "1")),
        ((torch.empty(0), torch.empty(0)), None),
        ((torch.empty(3, device="meta"), torch.empty(3, device="meta")), None),
        ((torch.nn.Parameter(BASE), torch.nn.Parameter(BASE.view(-1)[23:])), ("0", "1")),
        ((torch.eye(3).to_sparse(), torch.eye(3).to_sparse()), None),
    ],
)
def test_those_that_share_an_element(tensors: tuple[torch.Tensor, ...], found: object) -> None:
    assert [tuple(sorted(pair)) for pair in overlapping(named(*tensors))] == ([found] if found else [])


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 8), st.integers(1, 4)), min_size=2, max_size=5))
def test_as_sets_of_addresses(cuts: list[tuple[int, int, int]]) -> None:
    """(start, numel, stride) of views of one tensor; the referee lists the elements of each."""
    base = torch.zeros(80)
    views = [base.as_strided((numel,), (stride,), start) for start, numel, stride in cuts]
    places = [set(range(start, start + numel * stride, stride)) for start, numel, stride in cuts]
    share = {(str(j), str(i)) for i in range(len(cuts)) for j in range(i) if places[i] & places[j]}
    assert {(min(pair), max(pair)) for pair in overlapping(named(*views))} == share
