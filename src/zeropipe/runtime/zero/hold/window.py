"""The window between two steps: what may be done with its gradients, and which of their reductions are under way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from zeropipe.comm.collectives import Work
from zeropipe.streams import Inline, Moment, Side, Tell

_MAX_IN_FLIGHT = 2  # buckets: one travels while the next one fills
_BYTES_IN_FLIGHT = 2**28


class Phase(Enum):
    """What may be done with the window's gradients now.

    IDLE --a backward begins--> ADDING or REDUCING --it ends--> IDLE --a step begins--> IN_USE --it is over--> IDLE
    """

    IDLE = "between backwards"
    ADDING = "a pass, whose gradients stay on their rank"
    REDUCING = "a pass, whose buckets leave as they are complete"
    IN_USE = "a step has begun to use them: none may be added"


NEXT_PHASES = {
    Phase.IDLE: {Phase.ADDING, Phase.REDUCING, Phase.IN_USE},
    Phase.ADDING: {Phase.IDLE},
    Phase.REDUCING: {Phase.IDLE},
    Phase.IN_USE: {Phase.IDLE},
}


def most_in_flight(streams: Inline, nbytes: int) -> int:
    """How many buckets of ``nbytes`` may be under way at once."""
    # What a device waits for by itself costs memory and nobody's time, so small ones may be many. Past that the stream
    # that computes waits for the oldest, whose memory it then has again.
    return max(_MAX_IN_FLIGHT, _BYTES_IN_FLIGHT // max(nbytes, 1) if streams.apart else 0)


@dataclass(frozen=True, slots=True)
class Begun:
    """A reduction under way, and the memory that it uses."""

    work: Work
    memory: list[torch.Tensor]


def stored(
    streams: Inline,
    work: Work,
    places: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    fresh: bool,
    wires: Sequence[torch.Tensor],
    done: Tell,
) -> Begun:
    """``work``, after which the averages in ``outputs`` are in their places, or (not ``fresh``) added to them."""

    def store() -> None:
        for place, reduced in zip(places, outputs, strict=True):
            if not fresh:
                streams.add(place, reduced, done)
            elif reduced is not place:
                streams.copy(place, reduced, done)
            else:
                done(place)

    return Begun(work.then(store), [*wires, *outputs])


class AtMasters:
    """Stages 1 and 2 with masters in host memory: this rank's shard of the averages as those lie, which each bucket of
    the last pass is sent to as it is reduced."""

    def __init__(self, streams: Inline, numel: int, dtype: torch.dtype, pin: bool) -> None:
        self._streams = streams
        self._copy = streams.zeros(numel, dtype, pin)  # 1D
        self._sent: set[int] = set()  # buckets, by their first parameter

    def send(self, bucket: int, own: slice, shard: torch.Tensor) -> None:
        """Its part of ``shard`` is the average, as far as the current stream has come."""
        self._streams.copy(self._copy[own], shard[own])
        self._sent.add(bucket)

    def stale(self) -> None:
        """The shard is about to change."""
        self._sent.clear()

    def arrived(self, shard: torch.Tensor, buckets: int) -> torch.Tensor:
        """The copy of ``shard``, which has so many buckets, to be changed in place; the host waits."""
        if len(self._sent) < buckets:
            self._streams.copy(self._copy, shard)
        self._streams.host_turn()
        self._sent.clear()
        return self._copy


class Stored:
    """The handle of a reduction that the device stores beside the stream that computes, which waits where it is waited
    for. What it uses is kept until then: it is that stream's memory."""

    def __init__(self, streams: Inline, begun: Begun, then: Callable[[], None]) -> None:
        self._streams, self._begun = streams, begun
        with streams.beside(Side.OUT):
            begun.work.wait()
            then()
            self._moment: Moment | None = streams.mark()

    def wait(self) -> None:
        self._streams.wait(self._moment)

    def is_completed(self) -> bool:
        return self._streams.passed(self._moment)
