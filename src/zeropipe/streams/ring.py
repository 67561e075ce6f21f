"""Pinned memory that is used again and again: what cannot travel straight between host and device goes through it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from zeropipe.streams.driver import Driver, Moment

Tell = Callable[[torch.Tensor], None]

_SLOTS = 3  # of a ring: one is filled, one travels, one is emptied
_SLOT_BYTES = 2**26  # what goes through a ring at a time


def tell(done: Tell | None, *memory: torch.Tensor) -> None:
    if done is not None:
        for one in memory:
            done(one)


def home(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def in_parts(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Parts of equal length of 1-D tensors, small enough for a slot."""
    widest = max(tensor.element_size() for tensor in tensors)
    return zip(*(tensor.view(-1).split(_SLOT_BYTES // widest) for tensor in tensors), strict=True)


@dataclass(slots=True)
class Arrival:
    """What the host does with a slot that came from the device."""

    target: torch.Tensor  # in host memory
    slot: torch.Tensor
    add: bool
    done: Tell | None

    def store(self) -> None:
        if self.add:
            self.target.add_(self.slot)
        else:
            self.target.copy_(self.slot)
        tell(self.done, self.target)


@dataclass(slots=True)
class Slot:
    """Pinned memory of a ring; ``moment``: when the device is done with it."""

    memory: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    moment: Moment | None = None
    arrival: Arrival | None = None


class Ring:
    """Pinned memory that is used again and again, so that its size does not grow with what goes through it::

        slot 0    | filled | travels       | emptied |          | filled | ...
        slot 1             | filled | travels       | emptied |
        slot 2                      | filled | travels       | emptied |

    A slot is as large as the largest piece that it carried, at most ``_SLOT_BYTES``. The host waits where all travel.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._slots = deque(Slot() for _ in range(_SLOTS))  # the one that was used longest ago first

    def turn(self, nbytes: int) -> torch.Tensor:
        """The next slot's memory (uint8, ``nbytes``), which nobody uses any more; ``sent`` follows."""
        self._free(self._slots[0])
        slot = self._slots[0]
        if slot.memory.numel() < nbytes:
            slot.memory = self._driver.pinned(nbytes)
        return slot.memory[:nbytes]

    def sent(self, moment: Moment, arrival: Arrival | None = None) -> None:
        """The slot of the last turn is in use until ``moment``; then the host has ``arrival`` to store."""
        slot = self._slots[0]
        slot.moment, slot.arrival = moment, arrival
        self._slots.rotate(-1)

    def owes(self, target: torch.Tensor) -> bool:
        """Whether something of the memory that ``target`` lies in is still to be stored."""
        waiting = (slot.arrival for slot in self._slots if slot.arrival is not None)
        return any(home(arrival.target) == home(target) for arrival in waiting)

    def empty(self) -> None:
        """Wait for all slots and store what arrived, in order."""
        for slot in self._slots:
            self._free(slot)

    def _free(self, slot: Slot) -> None:
        if slot.moment is not None:
            self._driver.finish(slot.moment)
            slot.moment = None
        if slot.arrival is not None:
            arrival, slot.arrival = slot.arrival, None
            arrival.store()
