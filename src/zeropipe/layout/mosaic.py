"""Where the elements of one tensor lie in others: what stacking, joining and cutting make of them, as integers.

    stored     gate_0 |......|   up_0 |......|   gate_1 |......|   up_1 |......|
    mosaic     |gate_0| up_0 |gate_1| up_1 |          experts x 2 rows x columns
    rank 1 of 2              |#############|          two runs, each read once

So a rank that wants elements [start, stop) of what is made of many reads these and no others, and makes nothing whole.
All figures are elements, not bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product
from math import prod
from operator import mul


@dataclass(frozen=True, slots=True)
class Box:
    """A box of the mosaic, filled from a box of one source."""

    source: Hashable
    first: int  # its first element, counted in the source
    strides: tuple[int, ...]  # in the source
    at: tuple[int, ...]  # its first index in the mosaic
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """Elements that lie end to end in a source and in the flattened mosaic."""

    source: Hashable
    start: int  # first element, counted in the source
    at: int  # first element, counted in the flattened mosaic
    numel: int


@dataclass(frozen=True, slots=True)
class Mosaic:
    """A tensor whose elements lie in others; its boxes cover each element once."""

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]

    @classmethod
    def of(cls, source: Hashable, shape: Sequence[int], strides: Sequence[int] | None = None) -> Mosaic:
        """One source, whole; ``strides``: as it lies there, None where it is contiguous."""
        sizes = tuple(shape)
        lies = steps(sizes) if strides is None else tuple(strides)
        return cls(sizes, (Box(source, 0, lies, (0,) * len(sizes), sizes),) if prod(sizes) else ())

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def over(self, change: Callable[[Hashable], Hashable]) -> Mosaic:
        """The same places in other sources."""
        return Mosaic(self.shape, tuple(replace(box, source=change(box.source)) for box in self.boxes))

    def cut(self, dim: int, start: int, stop: int) -> Mosaic:
        """Indices [start, stop) of one dimension."""
        boxes = []
        for box in self.boxes:
            low, high = max(start, box.at[dim]), min(stop, box.at[dim] + box.sizes[dim])
            if low < high:
                first = box.first + (low - box.at[dim]) * box.strides[dim]
                at, sizes = _put(box.at, dim, low - start), _put(box.sizes, dim, high - low)
                boxes.append(Box(box.source, first, box.strides, at, sizes))
        return Mosaic(_put(self.shape, dim, stop - start), tuple(boxes))

    def with_dim(self, dim: int) -> Mosaic:
        """A dimension of one index more, before ``dim``."""
        boxes = (
            Box(b.source, b.first, _in(b.strides, dim, 0), _in(b.at, dim, 0), _in(b.sizes, dim, 1))
            for b in self.boxes
        )
        return Mosaic(_in(self.shape, dim, 1), tuple(boxes))

    def without_dim(self, dim: int) -> Mosaic:
        """Without a dimension of one index."""
        boxes = (
            Box(b.source, b.first, _out(b.strides, dim), _out(b.at, dim), _out(b.sizes, dim))
            for b in self.boxes
        )
        return Mosaic(_out(self.shape, dim), tuple(boxes))

    def viewed(self, shape: Sequence[int]) -> Mosaic | None:
        """The same elements in another shape; None where they do not lie end to end in one source."""
        (box, *more) = self.boxes or (None,)
        if box is None or more or box.sizes != self.shape or box.strides != steps(self.shape):
            return None
        return Mosaic(
            tuple(shape), (Box(box.source, box.first, steps(shape), (0,) * len(shape), tuple(shape)),)
        )

    def runs(self, start: int, stop: int) -> Iterator[Run]:
        """What fills elements [start, stop) of the flattened mosaic."""
        here = steps(self.shape)
        for box in self.boxes:
            yield from _clipped(_runs(box, here), start, stop)


def joined(parts: Sequence[Mosaic], dim: int) -> Mosaic:
    """``parts`` end to end along ``dim``; their other dimensions are equal."""
    boxes = []
    ends = list(accumulate((part.shape[dim] for part in parts), initial=0))
    for part, begin in zip(parts, ends, strict=False):
        boxes += [replace(box, at=_put(box.at, dim, box.at[dim] + begin)) for box in part.boxes]
    return Mosaic(_put(parts[0].shape, dim, ends[-1]), tuple(boxes))


def steps(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(reversed(list(accumulate(reversed(shape), mul, initial=1))[:-1]))


def _runs(box: Box, here: tuple[int, ...]) -> Iterator[Run]:
    """``here``: the strides of the mosaic, flattened."""
    # The last dimensions that the box fills in the order of the source are one run:
    #
    #     mosaic 4 x 6    . . . . . .        box 2 x 6 at (1, 0): one run of 12
    #                     # # # # # #        box 2 x 3 at (1, 0): two runs of 3
    #                     # # # # # #
    #                     . . . . . .
    numel, dim = 1, len(box.sizes)
    while dim and here[dim - 1] == numel and (box.sizes[dim - 1] == 1 or box.strides[dim - 1] == numel):
        dim -= 1
        numel *= box.sizes[dim]
    first = sum(map(mul, box.at, here))
    for index in product(*map(range, box.sizes[:dim])):
        start = box.first + sum(map(mul, index, box.strides))
        yield Run(box.source, start, first + sum(map(mul, index, here)), numel)


def _clipped(runs: Iterator[Run], start: int, stop: int) -> Iterator[Run]:
    for run in runs:
        low, high = max(run.at, start), min(run.at + run.numel, stop)
        if low < high:
            yield Run(run.source, run.start + low - run.at, low, high - low)


def _put(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim + 1 :])


def _in(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim:])


def _out(values: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return (*values[:dim], *values[dim + 1 :])
