"""Notices what a module's forward writes into a parameter, at the price of one comparison where it writes nothing.

use begins   the parameter's version is noted; where it was written to before, a fingerprint too, as versions count
             writes that change nothing
.data        has no version of its own: who takes it makes the fingerprint be taken first
use ends     another version or other bytes: what was written is kept, until all ranks have joined theirs
"""

from __future__ import annotations

from typing import Protocol

import torch

from zeropipe.errors import UsageError
from zeropipe.runtime.zero.fingerprint import Fingerprint, fingerprint
from zeropipe.runtime.zero.gather.sharded_parameter import mark_available


class Gathered(Protocol):
    """A parameter that may be whole here."""

    name: str
    shape: torch.Size
    full: torch.Tensor  # 1D, padded

    @property
    def numel(self) -> int: ...
    @property
    def param(self) -> torch.nn.Parameter: ...
    @property
    def in_use(self) -> bool:
        """Whether a write now would be one of a module's forward."""


class OwnWrites:
    """What forwards on this rank wrote to one parameter. ``edits``: its value, until ranks have joined theirs."""

    def __init__(self) -> None:
        self.edits: torch.Tensor | None = None
        self._version = 0
        self._before: Fingerprint | None = None
        self._moved = False
        self._suspect = False

    def begin(self, value: Gathered) -> None:
        """A use begins."""
        self._version = value.param._version
        self._before = fingerprint(value.full) if self._suspect and value.in_use and value.numel else None
        self._moved = False

    def look(self, value: Gathered) -> None:
        """Somebody takes ``.data``."""
        if self._before is None and value.in_use and value.numel:
            self._before = fingerprint(value.full)

    def move(self, value: Gathered) -> None:
        """Somebody sets ``.data``; a forward that puts it back before it ends has written nothing."""
        self._moved = value.in_use

    def end(self, value: Gathered) -> bool:
        """A use ends: whether the value was written to since it began."""
        if not self._moved and self._before is None and self._version == value.param._version:
            return False
        if not value.in_use:
            return False
        if self._moved:
            self._take_moved(value)
        if self._before is not None and self._before.matches(value.full):
            return False
        self.edits = value.full[: value.numel].clone().view(value.shape)
        self._suspect = True
        self.begin(value)
        return True

    def _take_moved(self, value: Gathered) -> None:
        here, set_to = value.full[: value.numel].view(value.shape), value.param.detach()
        if set_to.data_ptr() == here.data_ptr():
            return
        if set_to.shape != value.shape:
            mark_available(value.param, here)
            raise UsageError(
                f"forward set .data of parameter '{value.name}'",
                expected=f"shape {tuple(value.shape)}",
                found=tuple(set_to.shape),
                fix="keep a value of another shape in a buffer",
            )
        self.look(value)
        here.copy_(set_to)
        mark_available(value.param, here)
