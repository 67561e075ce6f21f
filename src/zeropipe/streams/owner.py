"""Who works beside the computation on a device: its streams, events and pinned host memory have one owner.

A device does what it is given on one stream in order, and on two streams at once. So whoever hands work to another
stream says what that begins after, and whoever reads the result, or gives the memory back, what it waits for::

    host      launches          |forward a    |forward b   ...                   |step
    IN        | a's shard |     | b's shard |                                    |new values|
    backend             |gather a |   |gather b |          |reduce 2 |  |reduce 1 |
    compute                       |forward a |forward b |backward b   |backward a |        |step
    OUT                                                              |store 2 |   |store 1 |

    IN begins after what its caller's stream was given before; OUT after one reduction and nothing else. The compute
    stream waits for a ``Moment`` of either, never for all of it, and the host for neither until it reads or writes
    pinned memory itself (``host_turn``).

Memory belongs to the stream that it was made on, which is the compute stream for all of ours: it may be given back once
that stream has waited for every other one that uses it, or the host knows that they are done.

On a CPU a call returns when its work is done, and there is nothing to order (``Inline``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum

import torch

from zeropipe.streams.driver import Cuda, Driver, Moment
from zeropipe.streams.ring import Arrival, Ring, Tell, home, in_parts, tell

Tensors = list[torch.Tensor] | tuple[torch.Tensor, ...]


class Side(Enum):
    """A stream beside the one that computes."""

    IN = "shards into gathers, and what comes from host memory"
    OUT = "reduced gradients into their shards, and what goes to host memory"
    HOP = "the second hop of a gather, which waits for the first"


class Inline:
    """A device whose calls return when their work is done: a CPU."""

    apart = False  # whether host memory is another memory than the device's
    _now: AbstractContextManager[None] = nullcontext()

    def beside(self, side: Side, after: Moment | None = None) -> AbstractContextManager[None]:
        """Inside, work is given to ``side``, which begins after the moment (None: what was given here before)."""
        return self._now

    def mark(self) -> Moment | None:
        """Now, on the current stream; None where every moment has passed when it is made."""
        return None

    def wait(self, moment: Moment | None) -> None:
        """The current stream goes on when ``moment`` has passed; the host at once."""

    def passed(self, moment: Moment | None) -> bool:
        """Whether it has; does not wait."""
        return True

    def on_host(self, tensor: torch.Tensor) -> bool:
        """Whether the device must have it copied to work on it."""
        return False

    def copy(self, target: torch.Tensor, source: torch.Tensor, done: Tell | None = None) -> None:
        """``target.copy_(source)`` (any dtypes, contiguous) on the current stream, for which the host does not wait.

        Either may be in host memory, which is the host's again after ``host_turn``; other memory of ``source`` stays
        its caller's to keep until the copy's moment has passed. ``done`` is told of memory that the host itself has
        gone through, part by part.
        """
        target.copy_(source)
        tell(done, target, source)

    def copy_each(self, targets: Tensors, sources: Tensors) -> None:
        """As ``copy`` of each; host memory that may be paged has been read when it returns."""
        torch._foreach_copy_(targets, sources)

    def add(self, target: torch.Tensor, source: torch.Tensor, done: Tell | None = None) -> None:
        """``target.add_(source)``, else as ``copy``; a sum in host memory is the host's work, done at the latest in
        ``host_turn``."""
        target.add_(source)
        tell(done, target, source)

    def bring(self, target: torch.Tensor, source: torch.Tensor, done: Tell | None = None) -> None:
        """As ``copy``, beside the current stream, which goes on when it is done."""
        with self.beside(Side.IN):
            self.copy(target, source, done)
            moment = self.mark()
        self.wait(moment)

    def host_turn(self) -> None:
        """Wait for every copy between host and device so far: the host may read, write and free what they used."""

    def zeros(self, numel: int, dtype: torch.dtype, pin: bool = True) -> torch.Tensor:
        """1-D zeros in host memory; ``pin``: such that copies run beside the computation."""
        return torch.zeros(numel, dtype=dtype)


class Streams(Inline):
    """A device with streams."""

    apart = True

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._sides = {side: driver.new_stream() for side in Side}
        self._in, self._out = Ring(driver), Ring(driver)
        # Since the host's last turn: of each stream the last copy from or to host memory, what of that they use (kept
        # until then), and what of it they write.
        self._copies: dict[object, Moment] = {}
        self._used: dict[int, torch.Tensor] = {}
        self._arriving: set[int] = set()

    @contextmanager
    def _beside(self, side: Side, after: Moment | None) -> Iterator[None]:
        moment = self._driver.mark() if after is None else after
        with self._driver.on(self._sides[side]):
            self._driver.wait(moment)
            yield

    def beside(self, side: Side, after: Moment | None = None) -> AbstractContextManager[None]:
        return self._beside(side, after)

    def mark(self) -> Moment | None:
        return self._driver.mark()

    def wait(self, moment: Moment | None) -> None:
        if moment is not None:
            self._driver.wait(moment)

    def passed(self, moment: Moment | None) -> bool:
        return moment is None or self._driver.passed(moment)

    def on_host(self, tensor: torch.Tensor) -> bool:
        return self._driver.on_host(tensor)

    def copy(self, target: torch.Tensor, source: torch.Tensor, done: Tell | None = None) -> None:
        here, there = self._driver.on_host(target), self._driver.on_host(source)
        if there and self._out.owes(source):
            self.host_turn()
        if here and there:
            self.host_turn()
            super().copy(target, source, done)
        elif not here and not there:
            target.copy_(source)
        elif target.dtype == source.dtype and self._driver.is_pinned(target if here else source):
            # [1] What the device can do alone. A sum into the same memory that waits in the ring comes before it.
            if here and self._out.owes(target):
                self.host_turn()
            target.copy_(source, non_blocking=True)
            self._copies[self._driver.current()] = self._driver.mark()
            memory = target if here else source
            self._used[home(memory)] = memory
            if here:
                self._arriving.add(home(target))
        elif here:
            self._leave(target, source, False, done)
        else:
            # [2] Rounding, and memory that may be paged, are the host's work: it fills one slot while others travel.
            if home(source) in self._arriving:
                self.host_turn()
            for into, part in in_parts(target, source):
                slot = self._in.turn(part.numel() * target.element_size()).view(target.dtype)
                slot.copy_(part)
                tell(done, part)
                into.copy_(slot, non_blocking=True)
                self._in.sent(self._driver.mark())

    def copy_each(self, targets: Tensors, sources: Tensors) -> None:
        if not any(map(self._driver.on_host, (*targets, *sources))):
            torch._foreach_copy_(targets, sources)
            return
        for target, source in zip(targets, sources, strict=True):
            self.copy(target, source)

    def add(self, target: torch.Tensor, source: torch.Tensor, done: Tell | None = None) -> None:
        if self._driver.on_host(target):
            self._leave(target, source, True, done)
        else:
            target.add_(source)

    def _leave(self, target: torch.Tensor, source: torch.Tensor, add: bool, done: Tell | None) -> None:
        for into, part in in_parts(target, source):
            slot = self._out.turn(part.numel() * part.element_size()).view(part.dtype)
            slot.copy_(part, non_blocking=True)
            self._out.sent(self._driver.mark(), Arrival(into, slot, add, done))

    def host_turn(self) -> None:
        while self._copies:
            self._driver.finish(self._copies.popitem()[1])
        self._used.clear()
        self._arriving.clear()
        # After them: a straight copy may have brought what is now added to.
        self._out.empty()

    def zeros(self, numel: int, dtype: torch.dtype, pin: bool = True) -> torch.Tensor:
        if not pin or numel == 0:
            return torch.zeros(numel, dtype=dtype)
        return self._driver.pinned(numel * dtype.itemsize).view(dtype)


class Owners:
    """The streams of each device. Devices belong to the process, and so does this."""

    def __init__(self) -> None:
        self._inline = Inline()
        self._of: dict[torch.device, Streams] = {}
        self._stand_in: Streams | None = None

    def of(self, device: torch.device) -> Inline:
        """The one owner for ``device``."""
        if self._stand_in is not None:
            return self._stand_in
        if device.type != "cuda":
            return self._inline
        if device.index is None:  # else one device would have two owners, and each half of its copies
            device = torch.device("cuda", torch.cuda.current_device())
        if device not in self._of:
            self._of[device] = Streams(Cuda(device))
        return self._of[device]

    @contextmanager
    def driven_by(self, driver: Driver) -> Iterator[Streams]:
        """Inside the block every device is one with streams, which ``driver`` stands in for: tests without a GPU."""
        before, self._stand_in = self._stand_in, Streams(driver)
        try:
            yield self._stand_in
        finally:
            self._stand_in = before


STREAMS = Owners()
