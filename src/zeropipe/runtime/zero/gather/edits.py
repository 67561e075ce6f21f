"""Was it written to? Fingerprints of values, what a module's forward wrote into its own parameters (``Embedding(
max_norm=)``, clipping), and how ranks join what they wrote.

    use begins    the parameter's version is noted; where it was written to before, a fingerprint too
    .data         has no version of its own: who takes it makes the fingerprint be taken first
    use ends      another version or other bytes: what was written is kept, and the writer goes on with it
    next meeting  the writer's word carries "somebody wrote": all exchange what they have and cut it into shards anew

An element that some ranks changed gets their value, which must be one; so rows that each rank shortened for its own
batch end as in one process that saw all batches.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Protocol

import torch

from zeropipe.comm.collectives import all_gather
from zeropipe.comm.group import Group
from zeropipe.errors import UsageError
from zeropipe.runtime.zero.param import GATHER, Cut

SMALL = 2**15  # bytes; up to here a copy is as cheap as sums
_AT_ONCE = 2**22  # elements of each rank that are exchanged at a time
# By element size; larger ones are cut into 64-bit words.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, slots=True, eq=False)
class Fingerprint:
    """``parts``: sums and plain bytes of a value on its device, about the square root of its size."""

    parts: tuple[torch.Tensor, ...]

    def matches(self, value: torch.Tensor) -> bool:
        """Whether ``value`` (any shape, contiguous) has the bytes that the fingerprint was taken of."""
        other = fingerprint(value).parts
        return len(other) == len(self.parts) and all(map(torch.equal, self.parts, other))


def fingerprint(value: torch.Tensor) -> Fingerprint:
    """Of ``value`` (any shape and dtype, contiguous, at the start of its storage): it is read, not copied."""
    flat = value.detach().reshape(-1).view(torch.uint8)
    if flat.numel() <= SMALL:
        return Fingerprint((flat.clone(),))
    # A square of 64-bit words, whose row sums and column sums (modulo 2**64) are exact: a change of any one element
    # shows in both, and moving rows or columns about shows in one of them.
    side = isqrt(flat.numel() // 8)
    square = flat[: side * side * 8].view(torch.int64).view(side, side)
    return Fingerprint((square.sum(0), square.sum(1), flat[side * side * 8 :].clone()))


class Value(Cut, Protocol):
    """A parameter that may be whole here, as far as its edits go."""

    own_writes: OwnWrites

    @property
    def param(self) -> torch.nn.Parameter: ...
    @property
    def gathered(self) -> bool: ...
    @property
    def in_use(self) -> bool:
        """Whether a write now would be one of a module's forward."""

    def present(self) -> None:
        """Let the parameter be the gathered value."""

    def settled(self) -> torch.Tensor:
        """The value as the shards have it; collective."""

    def write(self, value: torch.Tensor) -> None:
        """Take the shards from ``value``."""


def is_moved(value: Value) -> bool:
    """Whether a gathered parameter's ``.data`` was set to other memory (also by ``set_``, as parametrizations do)."""
    here = value.param.detach()
    full = value.full
    return (here.shape, here.dtype, here.data_ptr()) != (value.shape, full.dtype, full.data_ptr())


def take_moved(value: Value) -> bool:
    """Take the value over from the memory that ``.data`` was set to, if it was; False where its shape does not fit."""
    here = value.param.detach()
    if not is_moved(value):
        return True
    if here.shape != value.shape:
        return False
    value.full[: value.numel].copy_(here.reshape(-1))
    value.present()
    return True


class OwnWrites:
    """What forwards on this rank wrote to one parameter. ``edits``: its value, until ranks have joined theirs."""

    def __init__(self) -> None:
        self.edits: torch.Tensor | None = None

        # Of the use that is going on.
        self._before: Fingerprint | None = None
        self._moved = False

        # Written to before: versions also count writes that change nothing, so from then on bytes are compared.
        self._suspect = False

        # Whether there is more to see to than the parameter's version, which is the price where nothing is written.
        self.alert = False

    def begin(self, value: Value) -> None:
        """A use begins; need not be called unless ``alert``."""
        self._before = fingerprint(value.full) if self._suspect and value.in_use and value.numel else None
        self._moved, self.alert = False, self._suspect

    def look(self, value: Value) -> None:
        """Somebody takes ``.data``."""
        if self._before is None and value.in_use and value.numel:
            self._before, self.alert = fingerprint(value.full), True

    def move(self, value: Value) -> None:
        """Somebody sets ``.data``; a forward that puts it back before it ends has written nothing."""
        self._moved = value.in_use
        self.alert = self.alert or self._moved

    def end(self, value: Value, counted: bool) -> bool:
        """A use ends: whether the value was written to since it began. ``counted``: its version has changed."""
        if not counted and not self._moved and self._before is None:
            return False
        if not value.in_use:
            return False
        if self._moved:
            self._take_moved(value)
        # A version counts what was written even where the bytes stayed; without a fingerprint it is believed once.
        if self._before is not None and self._before.matches(value.full):
            return False
        self.edits = value.full[: value.numel].clone().view(value.shape)
        self._suspect = True
        self.begin(value)
        return True

    def drop(self) -> torch.Tensor | None:
        """What was written, which is forgotten here."""
        edits, self.edits = self.edits, None
        return edits

    def _take_moved(self, value: Value) -> None:
        set_to = value.param.detach()
        if set_to.data_ptr() == value.full.data_ptr():
            return
        self.look(value)  # the gathered memory still has what it had before
        if not take_moved(value):
            value.present()
            raise UsageError(
                f"forward set .data of parameter '{value.name}'",
                expected=f"shape {tuple(value.shape)}",
                found=tuple(set_to.shape),
                fix="keep a value of another shape in a buffer",
            )


def join(written: Collection[Value], known: Sequence[Value], everyone: Group) -> None:
    """Make what any rank wrote (here: to ``written``) the value of every rank. Collective.

    ``known``: all values of the model, in the same order on every rank. Raises UsageError on every rank, and drops what
    was written, where ranks wrote different values to the same element.
    """
    # [1] Which were written anywhere: one byte each.
    mine = torch.tensor([value in written for value in known], dtype=torch.uint8)
    marks = mine.new_empty((everyone.size, len(known)))
    all_gather(
        marks.view(-1), mine, everyone, label="which parameters were written", channel=GATHER, guarded=True
    )
    some = [value for value, mark in zip(known, marks.amax(0).tolist(), strict=True) if mark]
    # [2] Those are joined, all of them before anybody raises: every rank takes part in each.
    parted = [value for value in some if not _join_one(value, everyone)]
    if parted:
        names = ", ".join(f"'{value.name}'" for value in parted)
        raise UsageError(
            f"forward wrote into parameter {names}, and ranks wrote different values to the same elements; what "
            "was written is dropped",
            rank=everyone.ranks[everyone.rank],
            fix="write what is the same on every rank (all_reduce what it is made from), keep the value in a "
            "buffer, or write between steps inside zero.GatheredParameters(param, modifier_rank=0)",
        )


def _join_one(value: Value, everyone: Group) -> bool:
    """Whether the ranks agreed; if not, the value is what it was before they wrote."""
    before = value.settled()
    after = value.own_writes.drop()
    if after is None:  # a gathered value has also the edits between steps, which every rank has made
        after = value.full[: value.numel] if value.gathered else before
    kind = _BITS.get(before.element_size(), torch.int64)
    old, new = before.reshape(-1).view(kind), after.reshape(-1).view(kind)
    joined, agreed = torch.empty_like(old), True
    # As bits: a NaN that all have written is one value, and -0.0 is another than 0.0.
    runs = zip(old.split(_AT_ONCE), new.split(_AT_ONCE), joined.split(_AT_ONCE), strict=True)
    for old_run, new_run, run in runs:
        every = new_run.new_empty((everyone.size, new_run.numel()))
        said = f"{value.name} as written"
        all_gather(every.view(-1), new_run.contiguous(), everyone, label=said, channel=GATHER, guarded=True)
        changed = every != old_run
        run.copy_(every.gather(0, changed.byte().argmax(0, keepdim=True))[0])  # of the first who changed it
        agreed = agreed and not bool((changed & (every != run)).any())
    value.write(joined.view(before.dtype).view(before.shape) if agreed else before)
    return agreed
