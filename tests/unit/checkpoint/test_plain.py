"""Any state goes into words that load without running code, and comes back as it was; what needs code is named."""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import io
import pathlib
import random
import uuid
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zeropipe.checkpoint.save.plain import MARK, Absent, decode, encode, lowered, settle
from zeropipe.checkpoint.utils import mapped


class Colour(enum.Enum):
    RED = 1
    GREEN = ("a", 2)


class Level(enum.IntEnum):
    LOW = 3


class Bits(enum.Flag):
    A = enum.auto()
    B = enum.auto()


Point = namedtuple("Point", "x y")


class Opaque:
    """A client's class: it can only be restored by running code."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opaque) and other.value == self.value

    __hash__ = None  # type: ignore[assignment]


def same(a: Any, b: Any) -> bool:
    """Equal, of the same types all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray | np.generic):
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    if isinstance(a, dict):
        factories = getattr(a, "default_factory", None) is getattr(b, "default_factory", None)
        pairs = zip(a.items(), b.items(), strict=True) if len(a) == len(b) else [((0, 0), (1, 1))]
        return factories and all(same(k, m) and same(v, w) for (k, v), (m, w) in pairs)
    if isinstance(a, list | tuple | deque):
        bounds = getattr(a, "maxlen", None) == getattr(b, "maxlen", None)
        return bounds and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, set | frozenset):
        return bool(a == b) and sorted(str(type(v)) for v in a) == sorted(str(type(v)) for v in b)
    if isinstance(a, torch.Generator):
        return torch.equal(a.get_state(), b.get_state()) and a.device == b.device
    if isinstance(a, random.Random):
        return a.getstate() == b.getstate()
    if isinstance(a, np.random.Generator):
        return str(a.bit_generator.state) == str(b.bit_generator.state)
    if isinstance(a, np.random.RandomState):
        return str(a.get_state()) == str(b.get_state())
    if isinstance(a, SimpleNamespace):
        return same(vars(a), vars(b))
    return bool(a == b or (a != a and b != b))


def through_a_file(words: Any) -> Any:
    file = io.BytesIO()
    torch.save(words, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


atoms = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=True), st.complex_numbers(allow_nan=False),
    st.text(max_size=4), st.binary(max_size=4), st.fractions(), st.decimals(allow_nan=False), st.uuids(),
    st.datetimes(timezones=st.none() | st.just(datetime.UTC)), st.dates(), st.times(), st.timedeltas(),
    st.sampled_from([*Colour, *Level, Bits.A, Bits.A | Bits.B, torch.float16, torch.Size([2, 3]), ...,
                     torch.device("cpu"), torch.strided, torch.channels_last, np.dtype(">f4"), MARK]),
    st.builds(range, st.integers(-9, 9)), st.builds(pathlib.PurePosixPath, st.text("ab/", max_size=4)),
    st.sampled_from([np.float64(0.1), np.int8(3), np.bool_(True), np.datetime64("2026-11-30"), np.str_("x")]),
)  # fmt: skip
loose = st.one_of(
    st.builds(bytearray, st.binary(max_size=4)),
    st.builds(lambda n: torch.arange(n), st.integers(0, 3)),
    st.builds(lambda n: np.arange(n).reshape(1, n), st.integers(0, 3)),
    st.builds(random.Random, st.integers()),
    st.builds(slice, st.integers(), st.none()),
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(atoms, inner, max_size=3),
        st.dictionaries(atoms, inner, max_size=3).map(OrderedDict),
        st.dictionaries(atoms, inner, max_size=3).map(lambda d: defaultdict(list, d)),
        st.dictionaries(atoms, st.integers(), max_size=3).map(Counter),
        st.builds(deque, st.lists(inner, max_size=3), st.none() | st.integers(3, 5)),
        st.sets(atoms, max_size=3),
        st.frozensets(atoms, max_size=3),
        st.builds(Point, inner, inner),
        st.dictionaries(st.text("ab", min_size=1), inner, max_size=2).map(lambda d: SimpleNamespace(**d)),
    )


@given(st.recursive(atoms | loose, containers, max_leaves=8))
def test_what_was_encoded_comes_back_with_its_types(value: Any) -> None:
    code: dict[str, Any] = {}
    words = encode(value, "state", code)
    assert code == {}
    assert same(decode(through_a_file(words)), value)


@pytest.mark.parametrize(
    "value",
    [
        np.array(["a", "bcd"]), np.array([(1, 2.5)], dtype=[("n", "<i4"), ("x", ">f8")]), np.array(3.0),
        np.asfortranarray(np.arange(6).reshape(2, 3)), np.empty((0, 3)), np.random.default_rng(3),
        np.random.RandomState(4), torch.Generator().manual_seed(5), pathlib.Path("a/b"),
        datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=2), "here")),
        decimal.Decimal("NaN"), fractions.Fraction(1, 3), uuid.UUID(int=7), {MARK: "code", "path": "x"},
        {1: {MARK: {MARK: "deque"}}}, defaultdict(None, {1: 2}), torch.eye(3).to_sparse(),
    ],
    ids=str,
)  # fmt: skip
def test_single_values_come_back(value: Any) -> None:
    code: dict[str, Any] = {}
    back = decode(through_a_file(encode(value, "", code)))
    assert code == {} and type(back) is type(value)
    if isinstance(value, torch.Tensor):
        assert torch.equal(back.to_dense(), value.to_dense())
    elif isinstance(value, decimal.Decimal):
        assert back.is_nan()
    else:
        assert same(back, value)


def test_what_needs_code_is_named_alone() -> None:
    """One object of a client's class took the whole schedule with it: all of it started anew on resume."""
    state = {
        "last_epoch": 7,
        "lr_lambdas": [{"table": Opaque(1), "scale": 0.5}, None],
        "counts": Counter([3, 3]),
    }
    code: dict[str, Any] = {}
    words = through_a_file(encode(state, "lr_scheduler", code))
    assert list(code) == ["lr_scheduler.lr_lambdas[0].table"]
    assert same(decode(words, "lr_scheduler", code), state)
    now = {"last_epoch": 0, "lr_lambdas": [{"table": Opaque(9), "scale": 0.1}, None]}
    value, lost = settle(decode(words, "lr_scheduler"), now)
    kind = f"{__name__}.Opaque"
    assert lost == [Absent("lr_scheduler.lr_lambdas[0].table", kind)]
    assert same(value, state | {"lr_lambdas": [{"table": Opaque(9), "scale": 0.5}, None]})


@pytest.mark.parametrize(
    ("state", "rest"),
    [
        ({"a": 1, "b": Opaque()}, {"a": 1}),
        ({"a": 1, "b": [1, Opaque()]}, {"a": 1}),
        ({"a": 1, "b": {"c": Opaque(), "d": 2}}, {"a": 1, "b": {"d": 2}}),
        ({"a": 1, "b": (Opaque(), 2)}, {"a": 1}),
        ({"a": 1, "b": deque([Opaque()])}, {"a": 1}),
        ({"a": 1, "b": lambda: 0}, {"a": 1}),
        ({"a": 1, "b": Opaque}, {"a": 1}),
        ({"a": 1, "b": np.array([Opaque()])}, {"a": 1}),
    ],
)
def test_without_the_code_the_rest_is_there(state: Any, rest: Any) -> None:
    code: dict[str, Any] = {}
    value, lost = settle(decode(through_a_file(encode(state, "client_state", code))))
    assert same(value, rest) and len(code) == len(lost) == 1
    assert lost[0].path in code


def test_a_cycle_needs_code_and_ends() -> None:
    value: dict[str, Any] = {"a": 1}
    value["self"] = [value]
    code: dict[str, Any] = {}
    words = encode(value, "", code)
    assert list(code) == ["self[0]"] and words["a"] == 1


def test_a_class_that_is_not_imported_is_not_imported_for_a_file() -> None:
    words = {"a": {MARK: "enum", "of": ["antigravity", "Colour"], "name": "RED", "value": 1}, "b": 2}
    value, lost = settle(decode(words))
    assert value == {"b": 2} and lost == [Absent("a", "antigravity.Colour")]


@given(st.recursive(atoms | loose, containers, max_leaves=8))
def test_a_copy_keeps_the_types(value: Any) -> None:
    assert same(mapped(value, lambda leaf: leaf), value)


@given(st.recursive(atoms | loose, containers, max_leaves=8))
def test_the_lowered_form_loads_without_code(value: Any) -> None:
    through_a_file(lowered({"x": value}))
