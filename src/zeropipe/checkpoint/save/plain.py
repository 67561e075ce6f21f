"""Writes any state in words that load without running code, and gives it back with its types: one encoder, one decoder.

``torch.load(weights_only=True)`` reads numbers, strings, tensors and the plain containers. Everything else is said in
those words (``{MARK: kind, ...}``): counters, deques, paths, enums, numpy's values, generators, dates. What only code
can restore becomes a leaf that names it, alone, so that whatever stands around it comes back all the same.

    encode(tree, where, code) -> words; code[path] = object        decode(words, where, code) -> tree with ``Absent``
    settle(tree, current)     -> the tree with the current value in place of each Absent, or without its entry
"""

from __future__ import annotations

import pathlib
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from functools import partial
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import torch

from zeropipe.given import Anything, Json

MARK = "__zeropipe__"
_CODE = "code"
_NOTHING: Any = object()
_SMALL = 64  # elements of an array that stands as a list

# What torch's unpickler reads as it stands.
_SCALARS = (type(None), bool, int, float, complex, str, bytes)
_NATIVE = (torch.Tensor, torch.nn.Parameter, torch.Size, torch.dtype, torch.device)

# What words may name. Nothing else of a file's names is looked up.
_PAIRS: dict[str, Any] = {t.__name__: t for t in (dict, OrderedDict, Counter, defaultdict)}
_GROUPS: dict[str, Any] = {t.__name__: t for t in (set, frozenset, deque)}
_FACTORIES: dict[str, Any] = {t.__name__: t for t in (int, float, complex, bool, str, list, dict, set, tuple)}
_FACTORIES |= {"Counter": Counter, "OrderedDict": OrderedDict, "deque": deque, "None": None}
_PATHS: dict[str, Any] = {name: getattr(pathlib, name) for name in dir(pathlib) if name.endswith("Path")}
_BIT_GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
_LAYOUTS = {str(v): v for v in vars(torch).values() if isinstance(v, torch.layout | torch.memory_format)}


@dataclass(frozen=True, slots=True)
class Absent:
    """What a checkpoint names and does not hold in words: ``kind`` is its class."""

    path: str
    kind: str


class _NeedsCodeError(Exception):
    """Something inside of a container that cannot stand there by itself."""


def encode(value: Anything, where: str, code: dict[str, Any]) -> Any:
    """``value`` in words, new containers around the same tensors; what needs code goes to ``code`` by its path."""
    return _Encoder(code).words(value, where)


def decode(words: Json, where: str = "", code: Mapping[str, Any] | None = None) -> Any:
    """What ``encode`` was given; ``Absent`` where ``code`` lacks an object or a class is not imported."""
    if type(words) in (dict, OrderedDict):
        kind = words.get(MARK)
        if kind is not None:
            return _decode_kind(kind, words, where, code or {})
        return type(words)((k, decode(v, below(where, k), code)) for k, v in words.items())
    if type(words) in (list, tuple):
        return type(words)(decode(v, below(where, i), code) for i, v in enumerate(words))
    return set(words) if type(words) is set else words


def settle(value: Anything, current: Anything = None) -> tuple[Any, list[Absent]]:
    """``value`` without its ``Absent`` leaves, and those.

    Where ``current`` (the same state as it is now) has something at that place, it stands in; else the entry is
    left out of its dict, and a list that lacks one is left out whole. None where nothing is left.
    """
    lost: list[Absent] = []
    settled = _settle(value, _NOTHING if current is None else current, lost)
    return (None if settled is _NOTHING else settled), lost


def lowered(value: Anything, otherwise: Anything = None) -> Any:
    """``value`` for readers that know torch's plain words alone: what has no likeness there, or is a large array, is
    left out of its dict, and ``otherwise`` elsewhere."""
    if _native(value):
        return value
    if isinstance(value, Mapping):
        pairs = ((lowered(k, _NOTHING), lowered(v, _NOTHING)) for k, v in value.items())
        return {k: v for k, v in pairs if k is not _NOTHING and v is not _NOTHING}
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        values = [lowered(v) for v in value]
        return tuple(values) if isinstance(value, tuple) else values
    if isinstance(value, Enum):
        return lowered(value.value, otherwise)
    if isinstance(value, pathlib.PurePath):
        return str(value)
    if type(value).__module__ == "numpy" and hasattr(value, "tolist") and value.size <= _SMALL:
        return otherwise if value.dtype.hasobject else lowered(value.tolist(), otherwise)
    return otherwise


def below(where: str, key: Anything) -> str:
    """The path of an entry: ``lr_scheduler.lr_lambdas[0]``."""
    if isinstance(key, str) and key.isidentifier():
        return f"{where}.{key}" if where else key
    return f"{where}[{key!r}]"


class _Encoder:
    def __init__(self, code: dict[str, Any]) -> None:
        self._code: dict[str, Any] | None = code  # None inside of what must not miss a part
        self._open: set[int] = set()  # containers that are being written: a cycle needs code

    def words(self, value: Any, where: str) -> Any:
        if _native(value):
            return value
        # Read from a checkpoint and not restored: said again, so that it is not lost by loading and saving.
        if isinstance(value, Absent):
            return {MARK: _CODE, "path": where, "type": value.kind}
        if id(value) in self._open:
            return self._leave_out(value, where)
        self._open.add(id(value))
        try:
            return self._container(value, where)
        except _NeedsCodeError:
            return self._leave_out(value, where)
        finally:
            self._open.discard(id(value))

    def _container(self, value: Any, where: str) -> Any:
        kind = type(value)
        # [1] What torch's unpickler knows stays what it is, with words inside.
        if kind in (list, tuple):
            return kind(self.words(v, below(where, i)) for i, v in enumerate(value))
        # A dict of somebody's that has our mark as a key would be read as words: it goes the long way.
        if kind in (dict, OrderedDict) and MARK not in value and all(map(_native_key, value)):
            return kind((k, self.words(v, below(where, k))) for k, v in value.items())
        if kind is set and all(map(_native_key, value)):
            return set(value)
        # [2] Other containers: keys and members of sets must be whole, or they would be others; values may miss parts.
        if kind is Counter:
            return {MARK: "Counter", "items": [[self._closed(k), self._closed(v)] for k, v in value.items()]}
        if kind in _PAIRS.values():
            words: dict[str, Any] = {MARK: kind.__name__}
            if kind is defaultdict:
                found = [name for name, made in _FACTORIES.items() if made is value.default_factory]
                if not found:
                    raise _NeedsCodeError
                words["factory"] = found[0]
            items = [[self._closed(k), self.words(v, below(where, k))] for k, v in value.items()]
            return words | {"items": items}
        if kind in _GROUPS.values():
            words = {MARK: kind.__name__, "items": [self._closed(v) for v in value]}
            return words | {"maxlen": value.maxlen} if kind is deque else words
        # [3] Classes by name: a decoder that has not imported one could not make it, and this one must be the class.
        if known_class(*name_of(kind)) is kind:
            of = list(name_of(kind))
            if isinstance(value, Enum):
                return {MARK: "enum", "of": of, "name": value.name, "value": self._closed(value.value)}
            if isinstance(value, tuple) and hasattr(value, "_fields"):
                return {MARK: "namedtuple", "of": of, "items": [self._closed(v) for v in value]}
        # [4] A row of the table.
        name = _kind_of(value)
        if name is None:
            raise _NeedsCodeError
        return {MARK: name, "is": self._closed(_KINDS[name].words(value))}

    def _closed(self, value: Any) -> Any:
        """Words for something that must not miss a part: what needs code inside makes the whole need it."""
        outer, self._code = self._code, None
        try:
            return self.words(value, "")
        finally:
            self._code = outer

    def _leave_out(self, value: Any, where: str) -> Any:
        if self._code is None:
            raise _NeedsCodeError
        self._code[where] = value
        return {MARK: _CODE, "path": where, "type": ".".join(name_of(type(value)))}


def _native(value: Any) -> bool:
    """Whether torch's unpickler knows ``value``; empty bytes it does not."""
    return type(value) in _NATIVE or (type(value) in _SCALARS and value != b"")


def is_plain(value: Anything) -> bool:
    """Whether ``value`` can be read back as it stands: native values and plain containers of them."""
    if type(value) in (dict, OrderedDict):
        return all(is_plain(k) and is_plain(v) for k, v in value.items())
    return all(map(is_plain, value)) if type(value) in (list, tuple, set) else _native(value)


def _native_key(key: Any) -> bool:
    whole = all(map(_native_key, key)) if type(key) is tuple else _native(key)
    return whole and not isinstance(key, torch.Tensor)


def _decode_kind(kind: str, words: dict[str, Any], where: str, code: Mapping[str, Any]) -> Any:
    if kind == _CODE:
        path = words["path"]
        return code[path] if path in code else Absent(path, words["type"])
    if kind in _KINDS:
        return _KINDS[kind].back(decode(words["is"], where, code))
    if kind in _PAIRS:
        made = _PAIRS[kind](*([_FACTORIES[words["factory"]]] if kind == "defaultdict" else []))
        for key, value in words["items"]:
            key = decode(key, where, code)
            made[key] = decode(value, below(where, key), code)
        return made
    items = [decode(value, where, code) for value in words.get("items", ())]
    if kind in _GROUPS:
        return _GROUPS[kind](items, *([words["maxlen"]] if kind == "deque" else []))
    # Classes that the program has; of another version of it they may have lost a member, or gained a field.
    if kind not in ("enum", "namedtuple"):
        return Absent(where, f"{kind}, which a newer zeropipe wrote")
    cls = known_class(*words["of"])
    if cls is None or not issubclass(cls, Enum if kind == "enum" else tuple):
        return Absent(where, ".".join(words["of"]))
    if kind == "namedtuple":
        return (
            tuple.__new__(cls, items) if len(items) == len(cls._fields) else Absent(where, cls.__qualname__)
        )
    if words["name"] in cls.__members__:
        return cls.__members__[words["name"]]
    try:
        return cls(decode(words["value"], where, code))
    except ValueError:
        return Absent(where, cls.__qualname__)


def _settle(value: Any, current: Any, lost: list[Absent]) -> Any:
    # A leaf that was not restored keeps what the program has there now.
    if isinstance(value, Absent):
        lost.append(value)
        return current
    if isinstance(value, dict):
        now = current if isinstance(current, Mapping) else {}
        for key, entry in list(value.items()):
            value[key] = _settle(entry, now.get(key, _NOTHING), lost)
            if value[key] is _NOTHING:
                del value[key]
        return value
    if type(value) in (list, tuple):
        alike = type(current) is type(value) and len(current) == len(value)
        known = current if alike else [_NOTHING] * len(value)
        members = [_settle(v, c, lost) for v, c in zip(value, known, strict=True)]
        return current if any(m is _NOTHING for m in members) else type(value)(members)
    return value


# Values that are no containers: one row each, for exactly that class; a subclass may hold what the row does not know.


@dataclass(frozen=True, slots=True)
class _Kind:
    """How a value is said in words, which may hold other rows' values, and made again."""

    words: Callable[[Any], Any]
    back: Callable[[Any], Any]
    of: type | None = None  # None: found by ``_kind_of``'s own rules


def _span(value: range | slice) -> Any:
    return value.start, value.stop, value.step


def _zoned(value: datetime | time) -> Any:
    return value.isoformat(), value.fold


def _timezone_words(value: timezone) -> Any:
    # With its name where it was given one, or it would not be equal in print.
    name, offset = value.tzname(None), value.utcoffset(None)
    return (offset, name) if name != timezone(offset).tzname(None) else (offset,)


def _numpy() -> Any:
    """Imported only for a value of its own, or a file that holds one."""
    import numpy

    return numpy


def _array_words(value: Any) -> Any:
    """(dtype, shape, bytes)."""
    numpy = _numpy()
    # As a tensor: the array's own memory where that can be, so that it is not copied before it is written.
    array = numpy.require(value, requirements=["C", "W"])
    data = array.reshape(-1).view(numpy.uint8) if array.nbytes else numpy.empty(0, numpy.uint8)
    return _dtype_words(array.dtype), list(value.shape), torch.from_numpy(data)


def _array_back(words: Any) -> Any:
    dtype, shape, data = words
    made = _numpy().zeros(tuple(shape), _dtype_back(dtype))
    if made.nbytes:
        made.reshape(-1).view("uint8")[:] = data.numpy()
    return made


def _dtype_words(dtype: Any) -> Any:
    return _numpy().lib.format.dtype_to_descr(dtype)


def _dtype_back(words: Any) -> Any:
    return _numpy().lib.format.descr_to_dtype(words)


def _with(made: Any, state: Any) -> Any:
    """``made`` with ``state``, under the name that its class has for that."""
    getattr(made, "setstate", getattr(made, "set_state", partial(setattr, made, "state")))(state)
    return made


def _numpy_generator(words: Any) -> Any:
    random = _numpy().random
    return random.Generator(_with(getattr(random, words["bit_generator"])(), words))


_KINDS: dict[str, _Kind] = {
    "no bytes": _Kind(lambda v: None, lambda w: b"", bytes),
    "bytearray": _Kind(bytes, bytearray, bytearray),
    "range": _Kind(_span, lambda w: range(*w), range),
    "slice": _Kind(_span, lambda w: slice(*w), slice),
    "ellipsis": _Kind(lambda v: None, lambda w: ..., type(...)),
    "fraction": _Kind(lambda v: (v.numerator, v.denominator), lambda w: Fraction(*w), Fraction),
    "decimal": _Kind(str, Decimal, Decimal),
    "uuid": _Kind(lambda v: v.int, lambda w: UUID(int=w), UUID),
    "namespace": _Kind(lambda v: dict(vars(v)), lambda w: SimpleNamespace(**w), SimpleNamespace),
    "date": _Kind(lambda v: v.isoformat(), date.fromisoformat, date),
    "datetime": _Kind(_zoned, lambda w: datetime.fromisoformat(w[0]).replace(fold=w[1]), datetime),
    "time": _Kind(_zoned, lambda w: time.fromisoformat(w[0]).replace(fold=w[1]), time),
    "timedelta": _Kind(lambda v: (v.days, v.seconds, v.microseconds), lambda w: timedelta(*w), timedelta),
    "timezone": _Kind(_timezone_words, lambda w: timezone(*w), timezone),
    "random": _Kind(lambda v: v.getstate(), lambda w: _with(random.Random(), w), random.Random),
    "generator": _Kind(
        lambda v: (str(v.device), v.get_state()),
        lambda w: _with(torch.Generator(w[0]), w[1].clone()),
        torch.Generator,
    ),
    "layout": _Kind(str, _LAYOUTS.__getitem__),
    "path": _Kind(lambda v: (type(v).__name__, str(v)), lambda w: _PATHS.get(w[0], pathlib.Path)(w[1])),
    "numpy.array": _Kind(_array_words, _array_back),
    "numpy.scalar": _Kind(_array_words, lambda w: _array_back(w)[()]),
    "numpy.dtype": _Kind(_dtype_words, _dtype_back),
    "numpy.generator": _Kind(lambda v: v.bit_generator.state, _numpy_generator),
    "numpy.random_state": _Kind(lambda v: v.get_state(), lambda w: _with(_numpy().random.RandomState(), w)),
}
_BY_CLASS = {kind.of: name for name, kind in _KINDS.items() if kind.of is not None}


def _kind_of(value: Any) -> str | None:
    """The row for ``value``; None where there is none, so that only code can restore it."""
    cls = type(value)
    name = _BY_CLASS.get(cls)
    # Other zones than a fixed offset know rules that are not in the value.
    if name in ("datetime", "time"):
        return name if value.tzinfo is None or type(value.tzinfo) is timezone else None
    if name is not None:
        return name
    if isinstance(value, torch.layout | torch.memory_format):
        return "layout"
    if cls in _PATHS.values():
        return "path"
    numpy = sys.modules.get("numpy")
    if numpy is None or not cls.__module__.startswith("numpy"):
        return None
    if cls is numpy.ndarray or isinstance(value, numpy.generic):
        # Some dtypes have no description that leads back to them, and objects are only addresses.
        known = not value.dtype.hasobject and _dtype_back(_dtype_words(value.dtype)) == value.dtype
        return ("numpy.array" if cls is numpy.ndarray else "numpy.scalar") if known else None
    if isinstance(value, numpy.dtype):
        return None if value.hasobject else "numpy.dtype"
    if cls is numpy.random.Generator:
        return "numpy.generator" if type(value.bit_generator).__name__ in _BIT_GENERATORS else None
    return "numpy.random_state" if cls is numpy.random.RandomState else None


def name_of(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def known_class(module: str, name: str) -> Any:
    """The class of that name in a module that the program has imported itself."""
    # Nothing is imported for a file: importing runs code, and who wrote the file chose the name.
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) else None
