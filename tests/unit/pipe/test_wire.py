"""What is packed comes out again: any nest of values, any dtype, any shape."""

from __future__ import annotations

import enum
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
    Value,
    flatten,
    map_tensors,
    rebuild,
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
    made = flatten(value, "a value").detached()
    form = Form.of(made)
    buffer = form.pack(made.tensors, torch.device("cpu"))
    told = Form.from_bytes(form.to_bytes())
    assert told == form
    assert buffer.numel() == form.nbytes
    found = told.unpack(buffer)
    assert found.wanted == made.wanted
    assert same(rebuild(found.tree, found.tensors), value)


def test_each_tensor_starts_aligned_and_the_head_says_value():
    found = [torch.ones(3), torch.ones(5, dtype=torch.bool), torch.ones(())]
    form = Form.of(Value("", found, [False] * 3))
    assert all(offset % ALIGN == 0 for offset in form.offsets)
    assert form.offsets[0] == HEAD
    assert form.pack(found, torch.device("cpu"))[0] != FAILED
    assert form.farewell(torch.device("cpu")).numel() == form.nbytes
    assert form.farewell(torch.device("cpu"))[0] == FAILED


@pytest.mark.parametrize("value", [object(), {1: torch.ones(1)}, {"a": {1, 2}}, torch.nn.Linear(1, 1)])
def test_what_cannot_travel_is_named(value):
    with pytest.raises(UsageError, match="the output of stage 3 cannot be sent"):
        flatten(value, "the output of stage 3")


class Color(enum.IntEnum):
    RED = 1


class Pair(NamedTuple):
    h: Any
    k: Any


class Output(OrderedDict[str, Any]):
    """As transformers' ModelOutput: keys that are attributes too."""

    def __init__(self, **items: Any) -> None:
        super().__init__(**items)
        self.__dict__.update(items)


@dataclass(frozen=True)
class Frozen:
    h: Any
    note: str = "n"
    made: list[int] = field(init=False, default_factory=list)


@dataclass(slots=True)
class Slots:
    h: Any
    kind: Color


class Row(list[Any]):
    pass


class Named(dict[str, Any]):
    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def row(*items: Any) -> Row:
    made = Row(items)
    made.length = len(items)  # type: ignore[attr-defined]
    return made


ODD = [
    Pair(torch.ones(2), None),
    Output(h=torch.ones(2), mask=None),
    OrderedDict(b=torch.ones(1), a=1),
    Frozen(torch.ones(2)),
    Slots(torch.ones(2), Color.RED),
    row(torch.ones(1), 2),
    Named(h=torch.ones(2)),
    torch.Size((2, 3)),
    {"deep": [Pair(Frozen(Output(h=torch.ones(1))), (Color.RED,))]},
    torch.return_types.max((torch.ones(2), torch.zeros(2))),
    torch.nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)]),
]


@pytest.mark.parametrize("value", ODD, ids=lambda value: type(value).__name__)
def test_containers_keep_their_class_and_attributes(value):
    """They became plain tuples and dicts, or lost their attributes, where a cut fell and only there."""
    tree, found, _ = flatten(value, "a value")
    for copied in (rebuild(tree, found), map_tensors(value, torch.clone, "a value")):
        assert type(copied) is type(value)
        assert same(vars(copied), vars(value)) if hasattr(value, "__dict__") else True
        if isinstance(value, (tuple, list, dict)):
            assert same(copied, value)
    assert str(rebuild(tree, found)) == str(value)


def test_a_tensor_that_is_there_twice_travels_once():
    h = torch.ones(2)
    tree, found, _ = flatten(Output(h=h), "a value")
    assert len(found) == 1
    copied = rebuild(tree, found)
    assert copied["h"] is copied.h


def test_what_would_not_be_found_or_made_on_the_other_side_is_named():
    class Local(NamedTuple):
        h: Any

    ring: list[Any] = []
    ring.append(ring)
    lambdas = defaultdict(lambda: 1, h=torch.ones(1))
    for value, words in (
        (Local(1), "class at the top of a module"),
        (ring, "contains itself"),
        (lambdas, "cannot be sent"),
    ):
        with pytest.raises(UsageError, match=words):
            flatten(value, "the output of stage 3")
    assert map_tensors(Local(torch.ones(1)), torch.clone, "the output").h == 1  # nothing leaves the process
