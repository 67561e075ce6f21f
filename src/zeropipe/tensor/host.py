"""Where host and device meet: whether the host may look at a tensor's values without waiting for a device.

A host that reads a value of a device stops until all that was queued there is done, and the device then has nothing to
do until the host has queued more. On a CPU there is nobody to wait for, and a look saves work. So whoever has two ways
asks here; tests take the device's way on a CPU (``HOST.afar``) and count who still looks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

Number = float | torch.Tensor  # of the host, or 0-d and still on its way on the device


class Host:
    """What this process sees of tensors' values for nothing."""

    def __init__(self) -> None:
        self._afar = False

    def sees(self, what: torch.Tensor | torch.device) -> bool:
        """Whether reading a value of ``what`` waits for nobody."""
        device = what.device if isinstance(what, torch.Tensor) else what
        return device.type == "cpu" and not self._afar

    @contextmanager
    def afar(self) -> Iterator[None]:
        """Inside, every tensor counts as one of a device."""
        before, self._afar = self._afar, True
        try:
            yield
        finally:
            self._afar = before


HOST = Host()


def sent(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:  # 1D
    """Numbers of the host as a tensor on ``device``; returns while they are on their way."""
    here = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    # From memory that may be paged the copy would wait for all that is queued.
    return here if HOST.sees(device) else here.to(device, non_blocking=True, copy=True)


def changes(factor: Number) -> bool:
    """Whether to multiply by ``factor``: one that only the device knows may be any."""
    return isinstance(factor, torch.Tensor) or factor != 1.0
