"""A fingerprint shows every edit that people make, and no reading."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zeropipe.runtime.zero.gather.edits import SMALL, fingerprint

LARGE = SMALL  # elements of at least one byte: past the size that is copied
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [0, 1, 7, 1000, 3 * LARGE + 5])
def test_the_same_bytes_match(dtype, numel):
    value = (torch.arange(numel) % 100).to(dtype)
    assert fingerprint(value).matches(value.clone())


@settings(max_examples=25, deadline=None)
@given(st.integers(LARGE, 3 * LARGE), st.data())
def test_one_changed_element_shows(numel, data):
    value = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    print_ = fingerprint(value)
    at = data.draw(st.integers(0, numel - 1))
    value[at] = torch.nextafter(value[at], torch.tensor(1e9))  # one bit
    assert not print_.matches(value)


@settings(max_examples=25, deadline=None)
@given(st.integers(150, 400), st.integers(150, 400), st.integers(0, 1))
def test_rows_or_columns_that_change_places_show(rows, columns, dim):
    value = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    print_ = fingerprint(value)
    assert not print_.matches(value.flip(dim).contiguous())
    assert not print_.matches(value.roll(1, dim).contiguous())


def test_special_values():
    value = torch.zeros(LARGE)
    value[3] = float("nan")
    print_ = fingerprint(value)
    assert print_.matches(value.clone())  # NaN is equal to itself here
    value[7] = -0.0
    assert not print_.matches(value)
    assert not print_.matches(torch.zeros(LARGE + 1))


def test_it_is_small():
    parts = fingerprint(torch.zeros(2**20)).parts
    assert sum(part.numel() * part.element_size() for part in parts) < 2**20 * 4 / 80
