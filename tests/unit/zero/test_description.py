"""The table of parameters: sizes in words, and what it says of a model that zeropipe does not know."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from zeropipe import zero
from zeropipe.runtime.zero.description import _size

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@given(st.integers(0, 2**62))
def test_a_size_is_said_in_the_largest_unit_that_it_fills(nbytes):
    number, unit = _size(nbytes).split()
    scale = 1024 ** UNITS.index(unit)
    assert (
        abs(float(number) * scale - nbytes) <= scale * 0.05 * 1.001
    )  # one decimal, and the float's own rounding
    assert unit == "B" or nbytes >= scale
    assert unit == "TiB" or nbytes < 1024 * scale


def test_a_plain_model_is_whole_everywhere():
    rows = zero.describe(nn.Linear(3, 2, dtype=torch.bfloat16))
    weight = rows["weight"]
    assert (weight.shape, weight.numel, weight.bytes_here, weight.bytes_whole) == ((2, 3), 6, 12, 12)
    assert (weight.layout, weight.held_by, weight.persistent, weight.trained) == (
        "whole",
        "every rank",
        True,
        False,
    )
    assert weight.kind is zero.ZeroParamType.NORMAL and weight.state is zero.ZeroParamStatus.AVAILABLE
    assert len(rows) == 2 and rows.bytes_here == rows.bytes_whole == 16
    assert "stays" not in str(rows)
