"""Constructs modules on another device, ``meta`` for instance, and in another dtype."""

from __future__ import annotations

import contextlib
from types import TracebackType

import torch


class OnDevice(contextlib.AbstractContextManager[None]):
    """Inside, new tensors are made on ``device``, floating-point ones of ``dtype`` unless they name their own.

    ``device``: ``"meta"`` makes a module that has shapes and no memory. ``enabled=False`` does nothing.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device | str = "meta", enabled: bool = True) -> None:
        self.dtype, self.device, self.enabled = dtype, device, enabled
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> None:
        if self.enabled:
            self._stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(self.dtype)
            self._stack.enter_context(torch.device(self.device))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
