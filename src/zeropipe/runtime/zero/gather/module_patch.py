"""Lets zero.Init see every module being built: the only file that changes ``torch.nn.Module``, and it changes it back.

Python offers no hook for "the outermost constructor has returned", so each class's own ``__init__`` is wrapped;
the first wrapper that a new object meets is its outermost. Classes made meanwhile are wrapped as they are made.
Patches nest: the last one in is the first one out, and one whose time is over does nothing even where somebody
kept a reference to it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

CONSTRUCTORS = ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "tensor", "zeros")


class Observer(Protocol):
    """Who is told. ``begin`` says whether this is the outermost constructor of ``module``."""

    def begin(self, module: torch.nn.Module) -> bool: ...
    def end(self, module: torch.nn.Module) -> None: ...
    def abort(self, module: torch.nn.Module) -> None: ...
    def frame(self) -> AbstractContextManager[None]: ...


@dataclass(frozen=True, slots=True)
class _Undo:
    owner: Any  # a class or module
    name: str
    had: bool  # whether the owner itself had the attribute
    before: Any
    ours: Any


class Framed:
    """A function for ``Module.apply`` that runs in a frame of its own for each module."""

    def __init__(self, function: Callable[[torch.nn.Module], Any], observer: Observer) -> None:
        self.function = function
        self.observer = observer

    def __call__(self, module: torch.nn.Module) -> Any:
        with self.observer.frame():
            return self.function(module)


class ModulePatch:
    """``install`` and ``remove``; ``constructor``: what replaces each of torch's functions that make a tensor."""

    def __init__(
        self,
        observer: Observer,
        constructor: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
    ) -> None:
        self.observer = observer
        self.active = False
        self._constructor = constructor
        self._undo: list[_Undo] = []

    def install(self) -> None:
        """Patch; where that fails midway, everything is as it was."""
        self.active = True
        try:
            for cls in list(_family(torch.nn.Module)):
                self.wrap(cls)
            self._patch_subclassing()
            self._patch_apply()
            for name in CONSTRUCTORS:
                self._replace(torch, name, self._constructor(getattr(torch, name)))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Put everything back; what somebody else has replaced meanwhile stays theirs."""
        self.active = False
        while self._undo:
            undo = self._undo.pop()
            if vars(undo.owner).get(undo.name) is not undo.ours:
                continue
            if undo.had:
                setattr(undo.owner, undo.name, undo.before)
            else:
                delattr(undo.owner, undo.name)

    def wrap(self, cls: type) -> None:
        """Wrap the constructor of ``cls``, if it is its own or comes from a class that is not a module."""
        if issubclass(cls, torch.jit.ScriptModule):
            return
        original = vars(cls).get("__init__")
        if original is None:
            owner = next(base for base in cls.__mro__ if "__init__" in vars(base))
            if issubclass(owner, torch.nn.Module):
                return  # wrapped there
            original = vars(owner)["__init__"]
        patch = self

        @functools.wraps(original)
        def __init__(module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
            bound = original.__get__(module, type(module))
            if not patch.active or not patch.observer.begin(module):
                bound(*args, **kwargs)
                return
            try:
                bound(*args, **kwargs)
            except BaseException:
                patch.observer.abort(module)
                raise
            patch.observer.end(module)

        self._replace(cls, "__init__", __init__)

    def _patch_subclassing(self) -> None:
        patch = self
        before = vars(torch.nn.Module).get("__init_subclass__")

        def __init_subclass__(cls: Any, /, **kwargs: Any) -> None:
            if before is None:
                super(torch.nn.Module, cls).__init_subclass__(**kwargs)  # type: ignore[misc]
            else:
                before.__func__(cls, **kwargs)
            if patch.active:
                patch.wrap(cls)

        torch.nn.Module.__init_subclass__ = self._note("__init_subclass__", classmethod(__init_subclass__))  # type: ignore[assignment]

    def _patch_apply(self) -> None:
        patch = self
        before = torch.nn.Module.apply

        @functools.wraps(before)
        def apply(module: torch.nn.Module, fn: Any) -> Any:
            framed = not patch.active or isinstance(fn, Framed)
            return before(module, fn if framed else Framed(fn, patch.observer))

        torch.nn.Module.apply = self._note("apply", apply)  # type: ignore[method-assign]

    def _note(self, name: str, ours: Any) -> Any:
        """Remember what ``nn.Module`` has under ``name``; returns ``ours``."""
        own = vars(torch.nn.Module)
        self._undo.append(_Undo(torch.nn.Module, name, name in own, own.get(name), ours))
        return ours

    def _replace(self, owner: Any, name: str, ours: Any) -> None:
        own = vars(owner)
        if ours is own.get(name):
            return
        self._undo.append(_Undo(owner, name, name in own, own.get(name), ours))
        setattr(owner, name, ours)


def _family(cls: type) -> Iterator[type]:
    """``cls`` and every class below it, each once."""
    seen: set[type] = set()
    waiting = [cls]
    while waiting:
        one = waiting.pop()
        if one not in seen:
            seen.add(one)
            yield one
            waiting.extend(type.__subclasses__(one))
