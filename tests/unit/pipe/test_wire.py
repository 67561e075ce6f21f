"""What is packed comes out again: any nest of values, any dtype, any shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zeropipe.errors import UsageError
from zeropipe.runtime.pipe.wire import (
    ALIGN,
    FAILED,
    HEAD,
    Form,
    farewell,
    flatten,
    form_of,
    pack,
    rebuild,
    views,
)

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    values = torch.randint(0, 2, shape)
    return values.to(draw(st.sampled_from(DTYPES)))


plain = st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-1, 1) | st.text(max_size=3)
values = st.recursive(
    tensors() | plain,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


@settings(max_examples=60, deadline=None)
@given(values)
def test_a_value_survives_the_wire(value):
    tree, found = flatten(value, "a value")
    form = form_of(tree, found)
    buffer = pack(form, found, torch.device("cpu"))
    told = Form.from_bytes(form.to_bytes())
    assert told == form
    assert buffer.numel() == form.nbytes
    assert same(rebuild(told.tree, views(told, buffer)), value)


def test_each_tensor_starts_aligned_and_the_head_says_value():
    found = [torch.ones(3), torch.ones(5, dtype=torch.bool), torch.ones(())]
    form = form_of("", found)
    assert all(offset % ALIGN == 0 for offset in form.offsets)
    assert form.offsets[0] == HEAD
    assert pack(form, found, torch.device("cpu"))[0] != FAILED
    assert farewell(form.nbytes, torch.device("cpu")).numel() == form.nbytes


@pytest.mark.parametrize("value", [object(), {1: torch.ones(1)}, {"a": {1, 2}}, torch.nn.Linear(1, 1)])
def test_what_cannot_travel_is_named(value):
    with pytest.raises(UsageError, match="the output of stage 3 cannot be sent"):
        flatten(value, "the output of stage 3")
