"""What this process has sent, and how long it took: by operation and size, where the configuration asks for it."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from zeropipe.given import Anything

# Of the bytes of a whole tensor, how many pass through each link of n ranks.
_TRAVELS = {"all_reduce": 2.0}
# How configurations name operations -> what carries them here, where that has another name.
_MEANS = {
    "all_gather_into_tensor": ("all_gather", "gather_from_owners"),
    "all_to_all_single": ("all_to_all",),
    "reduce_scatter": ("reduce_scatter", "reduce_to_owners"),
    "reduce_scatter_tensor": ("reduce_scatter", "reduce_to_owners"),
    "isend": ("send", "messages"),
    "irecv": ("recv", "messages"),
}


def carriers(ops: Collection[str]) -> frozenset[str]:
    """The operations of this library that do what ``ops`` say, in its own words or DeepSpeed's."""
    return frozenset(one for op in ops for one in _MEANS.get(op, (op,)))


@dataclass(slots=True)
class Tally:
    """One operation at one size. ``seconds``: from the call to the end of its wait, with what ran meanwhile."""

    op: str
    bytes: int
    ranks: int
    count: int = 0
    seconds: float = 0.0

    @property
    def bus_bytes(self) -> float:
        """What one link carries in one call."""
        return self.bytes * _TRAVELS.get(self.op, 1.0) * (self.ranks - 1) / self.ranks


class CommsLog:
    """Tallies of a process; off until ``start``."""

    def __init__(self) -> None:
        self.on = False
        self.only: frozenset[str] | None = None
        self._tallies: dict[tuple[str, int, int], Tally] = {}
        self._begun: dict[int, tuple[Anything, Tally, float]] = {}  # by identity, the call kept with it

    def start(self, only: Collection[str] | None = None) -> None:
        """Count from now on. ``only``: these operations; None: all."""
        self.on, self.only = True, None if only is None else carriers(only)

    def stop(self) -> None:
        self.on = False
        self._begun.clear()

    def reset(self) -> None:
        """Forget what was counted."""
        self._tallies.clear()
        self._begun.clear()

    def began(self, call: Anything, op: str, nbytes: int, ranks: int) -> None:
        if self.only is not None and op not in self.only:
            return
        tally = self._tallies.setdefault((op, nbytes, ranks), Tally(op, nbytes, ranks))
        tally.count += 1
        self._begun[id(call)] = (call, tally, time.perf_counter())

    def ended(self, call: Anything) -> None:
        """The call's result has arrived; what did not begin here is passed over."""
        found = self._begun.pop(id(call), None)
        if found is not None:
            found[1].seconds += time.perf_counter() - found[2]

    def tallies(self) -> list[Tally]:
        """By operation, the largest first."""
        return sorted(self._tallies.values(), key=lambda one: (one.op, -one.bytes))

    def lines(self) -> Iterator[str]:
        head = f"{'operation':18} {'bytes':>14} {'count':>8} {'total ms':>12} {'mean ms':>10}"
        yield f"{head} {'GB/s':>8} {'bus GB/s':>9}"
        for one in self.tallies():
            mean = one.seconds / one.count
            speed = one.bytes / mean / 1e9 if mean else 0.0
            bus = one.bus_bytes / mean / 1e9 if mean else 0.0
            yield (
                f"{one.op:18} {one.bytes:14,} {one.count:8} {one.seconds * 1e3:12.2f} {mean * 1e3:10.3f} "
                f"{speed:8.2f} {bus:9.2f}"
            )
