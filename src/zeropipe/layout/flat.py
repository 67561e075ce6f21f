"""The one owner of sharding: named tensors laid end to end, padded once at the end, cut into equal shards.

    tensors   |--- a ---|-- b --|-------- c --------|pad|
    shards    |     shard 0     |     shard 1           |      num_shards = 2

Nothing else in zeropipe computes padding or a shard's offset. All figures are elements, not bytes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from typing import Any

from zeropipe.frozen import from_json, to_json


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a layout knows of one tensor. ``dtype`` is torch's name without the prefix, e.g. ``float32``."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of elements of one tensor inside one shard."""

    tensor: int  # index into FlatShards.tensors
    start: int  # first element of the run, counted in the flattened tensor
    shard: int
    offset: int  # first element of the run, counted in the shard
    numel: int


@dataclass(frozen=True, slots=True)
class FlatShards:
    """Named tensors laid end to end, padded once at the end, cut into equal shards.

    ``align``: each shard holds a multiple of this many elements.
    """

    tensors: tuple[TensorSpec, ...]  # in buffer order
    num_shards: int
    align: int = 1
    offsets: tuple[int, ...] = field(init=False, repr=False, compare=False)  # len(tensors) + 1
    # Name -> index, filled by the first ``index``: a search for each of many tensors would take quadratic time.
    _numbers: dict[str, int] = field(init=False, repr=False, compare=False, default_factory=dict)
    # Asked for tens of thousands of times in a step of a large model, so computed once.
    shard_numel: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.num_shards < 1 or self.align < 1:
            raise ValueError(
                f"num_shards and align must be at least 1, found {self.num_shards} and {self.align}"
            )
        # Frozen, so that a layout may be shared, hashed and compared; these follow from the other fields.
        sizes = accumulate((t.numel for t in self.tensors), initial=0)
        object.__setattr__(self, "offsets", tuple(sizes))
        shard_numel = in_lines(self.numel, self.num_shards * self.align) // self.num_shards
        object.__setattr__(self, "shard_numel", shard_numel)

    @property
    def numel(self) -> int:
        """Elements of all tensors, without padding."""
        return self.offsets[-1]

    @property
    def padded_numel(self) -> int:
        return self.shard_numel * self.num_shards

    @property
    def padding(self) -> int:
        return self.padded_numel - self.numel

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First and one-past-last element of ``shard`` in the padded buffer."""
        if not 0 <= shard < self.num_shards:
            raise IndexError(f"shard {shard} of {self.num_shards}")
        return shard * self.shard_numel, (shard + 1) * self.shard_numel

    def held(self, shard: int) -> int:
        """Elements of tensors in ``shard``, without padding."""
        start, stop = self.shard_range(shard)
        return max(0, min(stop, self.numel) - start)

    def tensor_range(self, tensor: int) -> tuple[int, int]:
        """First and one-past-last element of ``tensor`` in the padded buffer."""
        return self.offsets[tensor], self.offsets[tensor + 1]

    def index(self, name: str) -> int:
        """The place of the (first) tensor of that name; KeyError where there is none."""
        if not self._numbers:
            self._numbers.update({spec.name: i for i, spec in reversed(list(enumerate(self.tensors)))})
        return self._numbers[name]

    def pieces(self, shard: int) -> tuple[Piece, ...]:
        """The runs that fill ``shard``, in buffer order; padding and empty tensors have none."""
        start, stop = self.shard_range(shard)
        return tuple(self.cut(start, stop))

    def tensor_pieces(self, tensor: int) -> tuple[Piece, ...]:
        """The runs that ``tensor`` is cut into, in order; none for an empty tensor."""
        return tuple(self.cut(*self.tensor_range(tensor)))

    def cut(self, start: int, stop: int) -> Iterator[Piece]:
        """The runs of the buffer's elements [start, stop), cut at tensor and at shard edges."""
        stop = min(stop, self.numel)
        if start >= stop:
            return
        # A search for the first tensor only: the others follow it, and a layout may hold tens of thousands.
        size = self.shard_numel
        tensor = bisect_right(self.offsets, start) - 1
        at = start
        while at < stop:
            # Empty tensors have no element at which a piece could begin.
            while self.offsets[tensor + 1] <= at:
                tensor += 1
            shard = at // size
            end = min(stop, self.offsets[tensor + 1], (shard + 1) * size)
            yield Piece(tensor, at - self.offsets[tensor], shard, at - shard * size, end - at)
            at = end

    def reshard(self, num_shards: int, align: int | None = None) -> FlatShards:
        """The same tensors cut for another number of shards."""
        return FlatShards(self.tensors, num_shards, self.align if align is None else align)

    def to_json(self) -> dict[str, Any]:
        return to_json(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> FlatShards:
        return from_json(cls, data)


def flat_shards(
    tensors: Iterable[tuple[str, tuple[int, ...], str]], num_shards: int, align: int = 1
) -> FlatShards:
    """Build a layout from (name, shape, dtype) triples in buffer order."""
    return FlatShards(tuple(TensorSpec(n, tuple(s), d) for n, s, d in tensors), num_shards, align)


def in_lines(numel: int, line: int) -> int:
    """The elements that as many lines hold as ``numel`` elements need."""
    return -(-numel // line) * line


def whole_lines(start: int, stop: int, line: int) -> tuple[int, int] | None:
    """[first, last): the whole lines within [start, stop); None where there is none."""
    first, last = in_lines(start, line), stop // line * line
    return (first, last) if first < last else None
