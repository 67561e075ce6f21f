"""Random numbers that follow a place in the run and nobody's generator: what forward draws in a slot of a step."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from hashlib import blake2b
from typing import Any

import torch


@contextmanager
def drawing(device: torch.device, *place: int) -> Iterator[None]:
    """Inside, torch's generators (of the CPU and of ``device``), numpy's and Python's begin at ``place``; afterwards
    they are as they were."""
    seed = int.from_bytes(blake2b(repr(place).encode(), digest_size=8).digest(), "little") >> 1
    numpy: Any = sys.modules.get("numpy")  # who has not imported it does not draw from it
    before, python = torch.get_rng_state(), random.getstate()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    in_numpy = None if numpy is None else numpy.random.get_state()
    try:
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        if on_device is not None:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        if numpy is not None:
            numpy.random.seed(seed % 2**32)
        yield
    finally:
        torch.set_rng_state(before)
        random.setstate(python)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)
        if numpy is not None:
            numpy.random.set_state(in_numpy)


class Draws:
    """Of one engine: each forward of a slot has a place of its own. ``now``: the step, and the slot in it."""

    def __init__(self, seed: int, device: torch.device, now: Callable[[], tuple[int, int]]) -> None:
        self._seed, self._device, self._now = seed, device, now
        self._last = (-1, -1)
        self._counts = {
            True: 0,
            False: 0,
        }  # forwards of the slot so far: those with gradients, and those without

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around the next forward; one that raises is to be run again, and draws the same then."""
        now = self._now()
        if now != self._last:
            self.restart()
            self._last = now
        # How often a program only looks may follow the number of ranks, and must not show in what it trains on.
        trains = torch.is_grad_enabled()
        with drawing(self._device, self._seed, *now, *(() if trains else (-1,)), self._counts[trains]):
            yield
        self._counts[trains] += 1

    def layers(self) -> Callable[[int], AbstractContextManager[None]]:
        """Of the slot that is computed now: what each layer of a pipeline, by its number, runs in, now or later."""
        now = self._now()
        return lambda layer: drawing(self._device, self._seed, *now, layer)

    def restart(self) -> None:
        """The slot is computed anew."""
        self._counts = dict.fromkeys(self._counts, 0)
