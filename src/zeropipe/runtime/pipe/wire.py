"""What one stage hands to the next: taken apart into tensors and the containers around them, packed into one message.

The tensors of a value, of any dtype, go end to end into one byte buffer. All else is the *form*, which the other side
is told once, or with every message where shapes may change::

    form     | containers as JSON | shape, dtype, wants a gradient? of each tensor
    payload  | state, 64 bytes | tensor 0 | pad | tensor 1 | pad | ...      each tensor starts on 64 bytes

Containers keep their class, however they are cut: what a layer behind a cut gets is what it would get in one process.
"""

from __future__ import annotations

import copyreg
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from importlib import import_module
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import torch

from zeropipe.errors import UsageError
from zeropipe.given import Tree

ALIGN = 64  # bytes; enough for any vector load
HEAD = 64  # bytes before the first tensor; the first byte says whether this is a value or a farewell
FAILED = 1  # in the first byte; 0 is a value

_PLAIN = (bool, int, float, str)
_NEW_OBJECT = copyreg.__newobj__  # type: ignore[attr-defined]


class Value(NamedTuple):
    """A value taken apart: `rebuild` puts ``tree`` and ``tensors`` together again."""

    tree: str  # its containers as JSON
    tensors: list[torch.Tensor]  # each once
    wanted: list[bool]  # whether the stage that made it wants the gradient of each

    def detached(self) -> Value:
        """As it travels: without a graph."""
        return self._replace(tensors=[t.detach() for t in self.tensors])


def flatten(value: Tree, where: str) -> Value:
    """``value`` taken apart, its tensors still in their graph. ``where`` names it in errors."""
    parts = _Parts(where, lambda kind: _name_of(kind, where))
    tree = json.dumps(parts.take(value))
    return Value(tree, parts.tensors, [t.requires_grad for t in parts.tensors])


def rebuild(tree: str, tensors: Sequence[Any]) -> Any:
    """The value with the containers of ``tree`` around ``tensors``."""
    return _put_together(json.loads(tree), tensors, _class_of)


def map_tensors(value: Tree, change: Callable[[torch.Tensor], Any], where: str) -> Any:
    """``value`` with ``change`` applied to each tensor; nothing leaves the process, so any class will do."""
    kinds: list[type] = []

    def keep(kind: type) -> Any:
        kinds.append(kind)
        return len(kinds) - 1

    parts = _Parts(where, keep)
    tree = parts.take(value)
    return _put_together(tree, [change(tensor) for tensor in parts.tensors], kinds.__getitem__)


class _Parts:
    """``tensors``: those of all values taken so far. ``name(kind)``: what stands for a class in the tree."""

    def __init__(self, where: str, name: Callable[[type], Any]) -> None:
        self._where, self._name = where, name
        self.tensors: list[torch.Tensor] = []
        self._places: dict[int, int] = {}  # by id of a tensor, which is alive as long as the list
        self._around: list[int] = []  # ids of the containers that are being taken apart

    def take(self, node: Any) -> dict[str, Any]:
        """``node`` as one word for its kind, and its parts."""
        kind = type(node)
        # Each tensor once: what is one tensor in two places is one behind the cut too, and its gradients add up.
        if isinstance(node, torch.Tensor):
            place = self._places.setdefault(id(node), len(self.tensors))
            if place == len(self.tensors):
                self.tensors.append(node)
            return {"tensor": place}
        if node is None or kind in _PLAIN:
            return {"plain": node}
        if isinstance(node, _PLAIN):  # such as an enum
            return {
                "value": [self._name(kind), next(base(node) for base in _PLAIN[1:] if isinstance(node, base))]
            }
        # Containers are taken apart from here on; one inside of itself would never end.
        if id(node) in self._around:
            raise self._refusal(node, "no container that contains itself")
        self._around.append(id(node))
        try:
            if kind in (tuple, list):
                return {kind.__name__: [self.take(child) for child in node]}
            if isinstance(node, dict) and not all(isinstance(key, str) for key in node):
                raise self._refusal(node, "dicts with str keys")
            if kind is dict:
                return {"dict": [[key, self.take(child)] for key, child in node.items()]}
            if isinstance(node, (tuple, list, dict)) or is_dataclass(node):
                return {"object": self._object(node)}
        finally:
            self._around.pop()
        raise self._refusal(
            node,
            "tensors in tuples, lists, dicts with str keys and dataclasses, beside None, bool, int, float or str",
        )

    def _object(self, node: Any) -> list[Any]:
        # Named tuples, ordered and other dicts with attributes, dataclasses, ``ModelOutput``: taken apart by the
        # protocol of ``copy`` and ``pickle``, but written in words. The class is found by its name on the other side,
        # and nothing else is ever called there.
        try:
            made = node.__reduce_ex__(2)
        except TypeError as error:
            raise self._refusal(node, "what copy.copy can copy") from error
        function, args, state, items, pairs = (*made, None, None, None)[:5]
        if isinstance(made, str) or function not in (_NEW_OBJECT, type(node)):
            raise self._refusal(node, "a container that is copied by means of its own class")
        if function is _NEW_OBJECT:
            args = args[1:]
        return [
            self._name(type(node)),
            function is _NEW_OBJECT,
            self.take(tuple(args)),
            self.take(state),
            self.take(list(items or ())),
            self.take([tuple(pair) for pair in pairs or ()]),
        ]

    def _refusal(self, node: Any, expected: str) -> UsageError:
        return UsageError(
            f"{self._where} cannot be sent to the next stage",
            expected=expected,
            found=type(node).__name__,
            fix="return only these from the last layer of a stage",
        )


def _put_together(node: dict[str, Any], tensors: Sequence[Any], find: Callable[[Any], type]) -> Any:
    ((word, inner),) = node.items()
    if word == "tensor":
        return tensors[inner]
    if word == "plain":
        return inner
    if word == "value":
        return find(inner[0])(inner[1])
    if word == "dict":
        return {key: _put_together(child, tensors, find) for key, child in inner}
    if word == "object":
        # The order of ``copy``: made, given its state, then its items.
        kind = find(inner[0])
        args, state, items, pairs = (_put_together(part, tensors, find) for part in inner[2:])
        made: Any = kind.__new__(kind, *args) if inner[1] else kind(*args)
        if hasattr(made, "__setstate__") and state is not None:
            made.__setstate__(state)
        elif state is not None:
            # Attributes, or a pair of those and what stands in slots.
            attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
            if attributes:
                made.__dict__.update(attributes)
            for name, value in (slots or {}).items():
                object.__setattr__(made, name, value)
        if items:
            made.extend(items)
        for key, value in pairs:
            made[key] = value
        return made
    return (tuple if word == "tuple" else list)(_put_together(child, tensors, find) for child in inner)


def _name_of(kind: type, where: str) -> str:
    # Found here by its name, it is found there too: all ranks run the same program.
    name = f"{kind.__module__}:{kind.__qualname__}"
    try:
        found: Any = _class_of(name)
    except (ImportError, AttributeError):
        found = None
    if found is not kind:
        raise UsageError(
            f"{where} cannot be sent to the next stage: its class would not be found there",
            expected="a class at the top of a module",
            found=f"{kind.__module__}.{kind.__qualname__}",
            fix="define the class at the top of a module, or return tensors in tuples, lists and dicts",
        )
    return name


def _class_of(name: str) -> Any:
    module, _, way = name.partition(":")
    found: Any = sys.modules.get(module) or import_module(module)
    for part in way.split("."):
        found = getattr(found, part)
    return found


class TensorForm(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: str  # torch's name without the prefix
    needs_grad: bool

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Form:
    """The shape of a message: the containers as JSON, and its tensors in order."""

    tree: str
    tensors: tuple[TensorForm, ...]

    @classmethod
    def of(cls, value: Value) -> Form:
        flags = zip(value.tensors, value.wanted, strict=True)
        forms = (TensorForm(tuple(t.shape), str(t.dtype).removeprefix("torch."), w) for t, w in flags)
        return cls(value.tree, tuple(forms))

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor starts, then where the message ends; bytes."""
        sizes = (-(-tensor.nbytes // ALIGN) * ALIGN for tensor in self.tensors)
        return tuple(accumulate(sizes, initial=HEAD))

    @property
    def nbytes(self) -> int:
        return self.offsets[-1]

    def pack(self, tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
        """One byte buffer (1D, nbytes) with all values."""
        buffer = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        buffer[:HEAD].zero_()
        for tensor, view in zip(tensors, self.unpack(buffer).tensors, strict=True):
            view.copy_(tensor)
        return buffer

    def unpack(self, buffer: torch.Tensor) -> Value:
        """The value of a message; its tensors are views of the buffer."""
        views = [
            buffer[start : start + t.nbytes].view(getattr(torch, t.dtype)).view(t.shape)
            for start, t in zip(self.offsets, self.tensors, strict=False)
        ]
        return Value(self.tree, views, [t.needs_grad for t in self.tensors])

    def farewell(self, device: torch.device) -> torch.Tensor:
        """In the place of a message of this form: the sender has failed."""
        buffer = torch.zeros(self.nbytes, dtype=torch.uint8, device=device)
        buffer[0] = FAILED
        return buffer

    def to_bytes(self) -> bytes:
        return json.dumps([self.tree, self.tensors]).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Form:
        tree, rows = json.loads(data.decode())
        return cls(tree, tuple(TensorForm(tuple(shape), *rest) for shape, *rest in rows))

    def __str__(self) -> str:
        return ", ".join(f"{t.dtype}{list(t.shape)}" for t in self.tensors) or "no tensors"
