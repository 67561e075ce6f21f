"""Writes any state in words that load without running code, and gives it back with its types: one encoder, one decoder.

``torch.load(weights_only=True)`` reads numbers, strings, tensors and the plain containers. Everything else is said in
those words (``{MARK: kind, ...}``): counters, deques, paths, enums, numpy's values, generators, dates. What only code
can restore becomes a leaf that names it, alone, so that whatever stands around it comes back all the same.

    encode(tree, where, code) -> words; code[path] = object        decode(words, where, code) -> tree with ``Absent``
    settle(tree, current)     -> the tree with the current value in place of each Absent, or without its entry
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any

import torch

from zeropipe.checkpoint.plain_kinds import KINDS, as_words, known_class, name_of, words_kind

MARK = "__zeropipe__"
_SCALARS = (type(None), bool, int, float, complex, str, bytes)
_NATIVE = (torch.Tensor, torch.nn.Parameter, torch.Size, torch.dtype, torch.device)
_CODE = "code"
_SMALL = 64  # elements of an array that stands as a list
_FACTORIES: dict[str, Any] = {t.__name__: t for t in (int, float, complex, bool, str, list, dict, set, tuple)}
_FACTORIES |= {"Counter": Counter, "OrderedDict": OrderedDict, "deque": deque, "None": None}


@dataclass(frozen=True, slots=True)
class Absent:
    """What a checkpoint names and does not hold in words: ``kind`` is its class."""

    path: str
    kind: str


class _NeedsCodeError(Exception):
    """Something inside of a container that cannot stand there by itself."""


def encode(value: Any, where: str, code: dict[str, Any]) -> Any:
    """``value`` in words, new containers around the same tensors; what needs code goes to ``code`` by its path."""
    return _Encoder(code).words(value, where)


def decode(words: Any, where: str = "", code: Mapping[str, Any] | None = None) -> Any:
    """What ``encode`` was given; ``Absent`` where ``code`` lacks an object or a class is not imported."""
    if type(words) in (dict, OrderedDict):
        kind = words.get(MARK)
        if kind is not None:
            return _decode_kind(kind, words, where, code or {})
        return type(words)((k, decode(v, below(where, k), code)) for k, v in words.items())
    if type(words) in (list, tuple):
        return type(words)(decode(v, below(where, i), code) for i, v in enumerate(words))
    return set(words) if type(words) is set else words


def settle(value: Any, current: Any = None) -> tuple[Any, list[Absent]]:
    """``value`` without its ``Absent`` leaves, and those.

    Where ``current`` (the same state as it is now) has something at that place, it stands in; else the entry is
    left out of its dict, and a list that lacks one is left out whole. None where nothing is left.
    """
    lost: list[Absent] = []
    settled = _settle(value, _NOTHING if current is None else current, lost)
    return (None if settled is _NOTHING else settled), lost


def mapped(tree: Any, leaf: Callable[[Any], Any]) -> Any:
    """A copy of ``tree`` with new containers of the same types and ``leaf`` of everything in them but sets' members."""
    kind = type(tree)
    if isinstance(tree, dict):
        items = {key: mapped(value, leaf) for key, value in tree.items()}
        if kind is dict:
            return items
        if isinstance(tree, defaultdict):
            return kind(tree.default_factory, items)
        try:
            return kind(items)
        except TypeError:
            return items
    if kind is torch.Size:
        return tree
    if isinstance(tree, (list, tuple)):
        values = [mapped(value, leaf) for value in tree]
        if hasattr(tree, "_fields"):
            return kind(*values)
        return values if kind is list else kind(values)
    if isinstance(tree, deque):
        return kind((mapped(value, leaf) for value in tree), tree.maxlen)
    return tree.copy() if kind is set else leaf(tree)


def lowered(value: Any) -> Any:
    """``value`` for readers that know torch's plain words alone: what has no likeness there, or is a large array, is
    left out of its dict, and None elsewhere."""
    low = _lowered(value)
    return None if low is _NOTHING else low


def _lowered(value: Any) -> Any:
    if _native(value):
        return value
    if isinstance(value, Mapping):
        pairs = ((_lowered(k), _lowered(v)) for k, v in value.items())
        return {k: v for k, v in pairs if k is not _NOTHING and v is not _NOTHING}
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        values = [lowered(v) for v in value]
        return tuple(values) if isinstance(value, tuple) else values
    if isinstance(value, Enum):
        return _lowered(value.value)
    if isinstance(value, PurePath):
        return str(value)
    if type(value).__module__ == "numpy" and hasattr(value, "tolist") and value.size <= _SMALL:
        return _lowered(value.tolist()) if not value.dtype.hasobject else _NOTHING
    return _NOTHING


def below(where: str, key: Any) -> str:
    """The path of an entry: ``lr_scheduler.lr_lambdas[0]``."""
    if isinstance(key, str) and key.isidentifier():
        return f"{where}.{key}" if where else key
    return f"{where}[{key!r}]"


class _Encoder:
    def __init__(self, code: dict[str, Any]) -> None:
        self._code = code
        self._open: set[int] = set()  # containers that are being written: a cycle needs code

    def words(self, value: Any, where: str) -> Any:
        if _native(value):
            return value
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
        if kind in (list, tuple):
            return kind(self.words(v, below(where, i)) for i, v in enumerate(value))
        if kind in (dict, OrderedDict):
            if MARK not in value and all(map(_native_key, value)):
                return kind((k, self.words(v, below(where, k))) for k, v in value.items())
            items = [[self._closed(k), self.words(v, below(where, k))] for k, v in value.items()]
            return {MARK: kind.__name__, "items": items}
        if kind is defaultdict:
            factory = next((n for n, f in _FACTORIES.items() if f is value.default_factory), None)
            if factory is None:
                raise _NeedsCodeError
            items = [[self._closed(k), self.words(v, below(where, k))] for k, v in value.items()]
            return {MARK: "defaultdict", "factory": factory, "items": items}
        if kind is set and all(map(_native_key, value)):
            return set(value)
        if kind in (set, frozenset):
            return {MARK: kind.__name__, "items": [self._closed(v) for v in value]}
        if kind is Counter:
            return {MARK: "Counter", "items": [[self._closed(k), self._closed(v)] for k, v in value.items()]}
        if kind is deque:
            return {MARK: "deque", "items": [self._closed(v) for v in value], "maxlen": value.maxlen}
        if isinstance(value, Enum) and known_class(*name_of(kind)) is kind:
            of = list(name_of(kind))
            return {MARK: "enum", "of": of, "name": value.name, "value": self._closed(value.value)}
        if isinstance(value, tuple) and hasattr(value, "_fields") and known_class(*name_of(kind)) is kind:
            return {MARK: "namedtuple", "of": list(name_of(kind)), "items": [self._closed(v) for v in value]}
        name = words_kind(value)
        if name is None:
            raise _NeedsCodeError
        return {MARK: name, "is": self._closed(as_words(name, value))}

    def _closed(self, value: Any) -> Any:
        """Words for something that must not miss a part: what needs code inside makes the whole need it."""
        inside: dict[str, Any] = {}
        outer, self._code = self._code, inside
        try:
            words = self.words(value, "")
        finally:
            self._code = outer
        if inside:
            raise _NeedsCodeError
        return words

    def _leave_out(self, value: Any, where: str) -> Any:
        self._code[where] = value
        return {MARK: _CODE, "path": where, "type": ".".join(name_of(type(value)))}


def _native(value: Any) -> bool:
    """Whether torch's unpickler knows ``value``; empty bytes it does not."""
    return type(value) in _NATIVE or (type(value) in _SCALARS and value != b"")


def _native_key(key: Any) -> bool:
    if type(key) is tuple:
        return all(map(_native_key, key))
    return _native(key) and not isinstance(key, torch.Tensor)


def _decode_kind(kind: str, words: dict[str, Any], where: str, code: Mapping[str, Any]) -> Any:
    if kind == _CODE:
        return code[words["path"]] if words["path"] in code else Absent(words["path"], words["type"])
    if kind in KINDS:
        return KINDS[kind].back(decode(words["is"], where, code))
    if kind in ("dict", "OrderedDict", "defaultdict", "Counter"):
        made: Any = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}.get(kind, dict)()
        if kind == "defaultdict":
            made = defaultdict(_FACTORIES[words["factory"]])
        for key, value in words["items"]:
            key = decode(key, where, code)
            made[key] = decode(value, below(where, key), code)
        return made
    items = [decode(value, where, code) for value in words.get("items", ())]
    if kind in ("set", "frozenset"):
        return set(items) if kind == "set" else frozenset(items)
    if kind == "deque":
        return deque(items, words["maxlen"])
    if kind not in ("enum", "namedtuple"):
        return Absent(where, f"{kind}, which a newer zeropipe wrote")
    cls = known_class(*words["of"])
    if cls is None or not issubclass(cls, Enum if kind == "enum" else tuple):
        return Absent(where, ".".join(words["of"]))
    if kind == "namedtuple":
        return (
            tuple.__new__(cls, items) if len(items) == len(cls._fields) else Absent(where, cls.__qualname__)
        )
    members = cls.__members__
    if words["name"] in members:
        return members[words["name"]]
    try:
        return cls(decode(words["value"], where, code))
    except ValueError:
        return Absent(where, cls.__qualname__)


_NOTHING: Any = object()


def _settle(value: Any, current: Any, lost: list[Absent]) -> Any:
    if isinstance(value, Absent):
        lost.append(value)
        return current
    if isinstance(value, dict):
        now = current if isinstance(current, Mapping) else {}
        settled = {k: _settle(v, now.get(k, _NOTHING), lost) for k, v in value.items()}
        for key, entry in settled.items():
            if entry is _NOTHING:
                del value[key]
            else:
                value[key] = entry
        return value
    if type(value) in (list, tuple):
        entries: Iterable[Any] = (
            current if type(current) is type(value) and len(current) == len(value) else ()
        )
        known = list(entries) or [_NOTHING] * len(value)
        members = [_settle(v, c, lost) for v, c in zip(value, known, strict=True)]
        return current if any(m is _NOTHING for m in members) else type(value)(members)
    return value
