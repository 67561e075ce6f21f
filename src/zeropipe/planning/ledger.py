"""What is alive when: every piece of memory that a program asks for, what for, and when it was given back."""

from __future__ import annotations

import sys
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from types import FrameType
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

import zeropipe.comm as comm
import zeropipe.runtime.zero.gather as gather
import zeropipe.runtime.zero.hold as hold
from zeropipe.given import Tree
from zeropipe.runtime.pipe import p2p, wire
from zeropipe.runtime.zero.hold import autograd, grads, reducer, values

_POINTS = 400  # of a curve
HEAP = (
    32 * 2**20
)  # bytes: glibc gives larger blocks back when they are freed, whatever else it has learned to keep
ELSEWHERE = "elsewhere: "  # what other ranks hold, made here to learn its shapes
HOST, DISK = "host: ", "disk: "  # before the kind of what offload has placed there
# Which module asks for memory says what for: the first from the inside that is one of these, or in one of these.
_KINDS = tuple(
    (module.__name__, kind)
    for module, kind in (
        (comm, "communication"),
        (p2p, "communication"),
        (wire, "communication"),
        (gather, "gathered units"),
        (grads, "gradients"),
        (reducer, "gradients"),
        (autograd, "gradients"),
        (values, "parameters"),
        (hold, "the engine itself"),
        (torch.optim, "moments"),
    )
)
BUILDING, ACTIVATIONS = "the model before initialize", "activations"


@dataclass(slots=True)
class Piece:
    """One storage while it had one size; ``born`` and ``died`` are ticks."""

    nbytes: int
    kind: str
    born: int
    died: int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """The most bytes that were alive at once, when, and of what kinds; and how it came there and went on.

    ``curve``: (tick, bytes, moment), the highest point of each of at most some hundred stretches. ``passing``: the most
    at once of blocks that come and go and are small enough for a heap to keep them, and the largest of these.
    """

    peak: int
    moment: str
    kinds: dict[str, int]
    curve: list[tuple[int, int, str]]
    passing: tuple[int, int] = (0, 0)


class Ledger:
    """Told of each allocation and of what the program is doing; time is counted in allocations (ticks)."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.tick = 0
        self.purpose: str | None = None  # of what is made now; None: whoever asks for it says
        self._moments: list[tuple[int, str]] = [(0, "")]

        # By address of the storage, as long as it is alive: it, its piece, and whether its values are known.
        self._alive: dict[int, tuple[weakref.ref[Any], Piece, bool]] = {}
        self._resize: Any = None  # torch's own, while this watches

    @contextmanager
    def holding(self, purpose: str) -> Iterator[None]:
        """What is made inside is for ``purpose``."""
        before, self.purpose = self.purpose, purpose
        try:
            yield
        finally:
            self.purpose = before

    def say(self, moment: str) -> None:
        """What the program does from now on."""
        self._moments.append((self.tick + 1, moment))

    def made(self, result: Tree, unknown: bool = False) -> None:
        """Tensors that an operator has returned; of storages that are known already nothing is noted."""
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self._enter(tensor.untyped_storage(), unknown)

    def overwritten(self, tensor: torch.Tensor) -> None:
        """Nobody knows the values of ``tensor`` any more."""
        storage = tensor.untyped_storage()
        found = self._alive.get(storage._cdata)
        if found is None:
            self._enter(storage, True)
        else:
            self._alive[storage._cdata] = (found[0], found[1], True)

    def is_unknown(self, tensor: torch.Tensor) -> bool:
        if tensor.layout != torch.strided:
            return True
        found = self._alive.get(tensor.untyped_storage()._cdata)
        return found is not None and found[2]

    def _enter(self, storage: Any, unknown: bool) -> None:
        key = storage._cdata
        if key not in self._alive:
            gone = partial(self._left, key)
            self._alive[key] = (
                weakref.ref(storage, lambda _: gone()),
                self._begin(storage.nbytes()),
                unknown,
            )

    def _begin(self, nbytes: int) -> Piece:
        self.tick += 1
        self.pieces.append(Piece(nbytes, self.purpose or _purpose(), self.tick))
        return self.pieces[-1]

    def _end(self, piece: Piece) -> None:
        self.tick += 1
        piece.died = self.tick

    def _left(self, key: int) -> None:
        self._end(self._alive.pop(key)[1])

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage has another size now: one piece ended and another began."""
        found = self._alive.get(storage._cdata)
        if found is None:
            self._enter(storage, True)
        elif found[1].nbytes != storage.nbytes():
            self._end(found[1])
            self._alive[storage._cdata] = (found[0], self._begin(storage.nbytes()), found[2])

    def watch(self) -> None:
        """``resize_`` of a storage is no operator of torch's, so nobody would say."""
        resize = self._resize = torch.UntypedStorage.resize_

        def resize_(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            self.resized(storage)
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]

    def unwatch(self) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    # What is known in the end.

    def name_all(self, owned: Mapping[str, Iterable[torch.Tensor]]) -> None:
        """What is known to be of a kind is that, whoever asked for its memory, and lies where it was put."""
        for kind, tensors in owned.items():
            for tensor in tensors:
                if tensor.layout == torch.strided:
                    found = self._alive.get(tensor.untyped_storage()._cdata)
                    if found is not None:
                        place = next((one for one in (HOST, DISK) if found[1].kind.startswith(one)), "")
                        found[1].kind = place + kind.removeprefix(place)

    def rename(self, kind: str, to: str) -> None:
        """All that was asked for until now as ``kind`` was for ``to``."""
        for piece in self.pieces:
            if piece.kind == kind:
                piece.kind = to

    def usage(self, since: int = 0, until: int | None = None) -> Usage:
        """From tick ``since`` to ``until``; what lies in host memory or files beside the device is no part of it."""
        until = self.tick if until is None else until
        pieces = [p for p in self.pieces if not p.kind.startswith((HOST, DISK, ELSEWHERE)) and p.nbytes]
        changes: Counter[int] = Counter()
        for piece in pieces:
            if piece.born <= until and (piece.died is None or piece.died > since):
                changes[max(piece.born, since)] += piece.nbytes
                if piece.died is not None and piece.died <= until:
                    changes[piece.died] -= piece.nbytes
        now, curve = 0, []
        for tick in sorted(changes):
            now += changes[tick]
            curve.append((tick, now))
        peak_tick, peak = max(curve, key=lambda point: point[1], default=(since, 0))
        kinds: Counter[str] = Counter()
        for piece in pieces:
            if piece.born <= peak_tick and (piece.died is None or piece.died > peak_tick):
                kinds[piece.kind] += piece.nbytes
        every = max(1, len(curve) // _POINTS)
        stretches = (curve[at : at + every] for at in range(0, len(curve), every))
        highest = [max(one, key=lambda point: point[1]) for one in stretches]
        return Usage(
            peak,
            self._moment_at(peak_tick),
            dict(kinds),
            [(tick, size, self._moment_at(tick)) for tick, size in highest],
            self._passing(since, until),
        )

    def _passing(self, since: int, until: int) -> tuple[int, int]:
        """What a heap may keep of is what came and went between two ticks; of other sizes the system takes care."""
        changes: list[tuple[int, int]] = []
        largest = 0
        for piece in self.pieces:
            if (
                piece.died is not None
                and since <= piece.born
                and piece.died <= until
                and piece.nbytes <= HEAP
            ):
                changes += [(piece.born, piece.nbytes), (piece.died, -piece.nbytes)]
                largest = max(largest, piece.nbytes)
        return max(accumulate((size for _, size in sorted(changes)), initial=0), default=0), largest

    def _moment_at(self, tick: int) -> str:
        return self._moments[bisect_right(self._moments, (tick, "\U0010ffff")) - 1][1]

    def resting(self) -> dict[str, int]:
        """Bytes alive now, by kind."""
        kinds: Counter[str] = Counter()
        for _, piece, _ in self._alive.values():
            kinds[piece.kind] += piece.nbytes
        return {kind: size for kind, size in kinds.items() if size}


_OURS = (comm.__name__.partition(".")[0], torch.optim.__name__)


def _purpose() -> str:
    frame: FrameType | None = sys._getframe(3)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(_OURS):
            for prefix, kind in _KINDS:
                if module.startswith(prefix):
                    return kind
        frame = frame.f_back
    return "temporary" if torch._C._current_graph_task_id() != -1 else ACTIVATIONS
