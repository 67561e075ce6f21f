"""The values that are not torch's plain words and need no code either: how each is said in words, and made again.

Each kind is a table row: its classes, what it is made of, and the way back. A row's words may hold other rows' values.
"""

from __future__ import annotations

import datetime
import decimal
import fractions
import pathlib
import random
import sys
import types
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Kind:
    words: Callable[[Any], Any]
    back: Callable[[Any], Any]
    of: type | None = None  # None: found by ``words_kind``'s own rules


def _path_back(words: Any) -> pathlib.PurePath:
    name, text = words
    return getattr(pathlib, name)(text) if name in _PATHS else pathlib.Path(text)


def _generator_back(words: Any) -> torch.Generator:
    device, state = words
    generator = torch.Generator(device)
    generator.set_state(state.clone())
    return generator


def _random_back(words: Any) -> random.Random:
    made = random.Random()
    made.setstate(words)
    return made


def _array_words(value: Any) -> Any:
    """(dtype, shape, bytes): the bytes are the array's own memory where that can be."""
    import numpy

    array = numpy.require(value, requirements=["C", "W"])
    data = array.reshape(-1).view(numpy.uint8) if array.nbytes else numpy.empty(0, numpy.uint8)
    return _dtype_words(array.dtype), list(value.shape), torch.from_numpy(data)


def _array_back(words: Any) -> Any:
    import numpy

    dtype, shape, data = words
    made = numpy.zeros(tuple(shape), _dtype_back(dtype))
    if made.nbytes:
        made.reshape(-1).view(numpy.uint8)[:] = data.numpy()
    return made


def _dtype_words(dtype: Any) -> Any:
    import numpy

    return numpy.lib.format.dtype_to_descr(dtype)


def _dtype_back(words: Any) -> Any:
    import numpy

    return numpy.lib.format.descr_to_dtype(words)


def _numpy_generator_back(words: Any) -> Any:
    import numpy

    bits = getattr(numpy.random, words["bit_generator"])()
    bits.state = words
    return numpy.random.Generator(bits)


def _random_state_back(words: Any) -> Any:
    import numpy

    made = numpy.random.RandomState()
    made.set_state(words)
    return made


def _zone_words(value: datetime.datetime | datetime.time) -> Any:
    return value.isoformat(), value.fold


def _timezone_words(value: datetime.timezone) -> Any:
    name = value.tzname(None)
    offset = value.utcoffset(None)
    return (offset, name) if name != datetime.timezone(offset).tzname(None) else (offset,)


_PATHS = ("PurePosixPath", "PureWindowsPath", "PosixPath", "WindowsPath")
_BIT_GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
_LAYOUTS = {str(v): v for v in vars(torch).values() if isinstance(v, torch.layout | torch.memory_format)}

KINDS: dict[str, Kind] = {
    "no bytes": Kind(lambda v: None, lambda w: b"", bytes),
    "bytearray": Kind(bytes, bytearray, bytearray),
    "range": Kind(lambda v: (v.start, v.stop, v.step), lambda w: range(*w), range),
    "slice": Kind(lambda v: (v.start, v.stop, v.step), lambda w: slice(*w), slice),
    "ellipsis": Kind(lambda v: None, lambda w: ..., type(...)),
    "fraction": Kind(
        lambda v: (v.numerator, v.denominator), lambda w: fractions.Fraction(*w), fractions.Fraction
    ),
    "decimal": Kind(str, decimal.Decimal, decimal.Decimal),
    "uuid": Kind(lambda v: v.int, lambda w: uuid.UUID(int=w), uuid.UUID),
    "namespace": Kind(lambda v: dict(vars(v)), lambda w: types.SimpleNamespace(**w), types.SimpleNamespace),
    "date": Kind(lambda v: v.isoformat(), datetime.date.fromisoformat, datetime.date),
    "datetime": Kind(
        _zone_words, lambda w: datetime.datetime.fromisoformat(w[0]).replace(fold=w[1]), datetime.datetime
    ),
    "time": Kind(_zone_words, lambda w: datetime.time.fromisoformat(w[0]).replace(fold=w[1]), datetime.time),
    "timedelta": Kind(
        lambda v: (v.days, v.seconds, v.microseconds), lambda w: datetime.timedelta(*w), datetime.timedelta
    ),
    "timezone": Kind(_timezone_words, lambda w: datetime.timezone(*w), datetime.timezone),
    "random": Kind(lambda v: v.getstate(), _random_back, random.Random),
    "generator": Kind(lambda v: (str(v.device), v.get_state()), _generator_back, torch.Generator),
    "layout": Kind(str, lambda w: _LAYOUTS[w]),
    "path": Kind(lambda v: (type(v).__name__, str(v)), _path_back),
    "numpy.array": Kind(_array_words, _array_back),
    "numpy.scalar": Kind(_array_words, lambda w: _array_back(w)[()]),
    "numpy.dtype": Kind(_dtype_words, _dtype_back),
    "numpy.generator": Kind(lambda v: v.bit_generator.state, _numpy_generator_back),
    "numpy.random_state": Kind(lambda v: v.get_state(), _random_state_back),
}
_BY_CLASS = {kind.of: name for name, kind in KINDS.items() if kind.of is not None}


def words_kind(value: Any) -> str | None:
    """The row for ``value``; None where there is none, so that only code can restore it."""
    cls = type(value)
    name = _BY_CLASS.get(cls)
    if name in ("datetime", "time"):  # other zones than a fixed offset know rules that are not in the value
        return name if value.tzinfo is None or type(value.tzinfo) is datetime.timezone else None
    if name is not None:
        return name
    if isinstance(value, torch.layout | torch.memory_format):
        return "layout"
    if cls.__module__.startswith("pathlib") and cls.__name__ in _PATHS:
        return "path"
    return _numpy_kind(value)


def _numpy_kind(value: Any) -> str | None:
    numpy = sys.modules.get("numpy")
    if numpy is None or not type(value).__module__.startswith("numpy"):
        return None
    if type(value) is numpy.ndarray or isinstance(value, numpy.generic):
        known = not value.dtype.hasobject and _dtype_back(_dtype_words(value.dtype)) == value.dtype
        return ("numpy.array" if type(value) is numpy.ndarray else "numpy.scalar") if known else None
    if isinstance(value, numpy.dtype):
        return None if value.hasobject else "numpy.dtype"
    if type(value) is numpy.random.Generator:
        return "numpy.generator" if type(value.bit_generator).__name__ in _BIT_GENERATORS else None
    return "numpy.random_state" if type(value) is numpy.random.RandomState else None


def as_words(kind: str, value: Any) -> Any:
    """What ``value`` is made of; may hold values of other rows."""
    return KINDS[kind].words(value)


def name_of(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def known_class(module: str, name: str) -> Any:
    """The class of that name in a module that the program has imported itself: nothing is imported for a file."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) else None
