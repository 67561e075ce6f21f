"""The one way from any layout to any other: which runs of elements to copy, decided before any is copied.

A plan matches tensors by name, so two layouts may differ in order, padding, number of shards and in which
tensors they hold. The inverse of a plan is the plan of the swapped layouts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from zeropipe.layout.flat import FlatShards, Piece


@dataclass(frozen=True, slots=True)
class Copy:
    """``dst[dst_shard][dst_offset:+numel] = src[src_shard][src_offset:+numel]``, in elements."""

    src_shard: int
    src_offset: int
    dst_shard: int
    dst_offset: int
    numel: int


@dataclass(frozen=True, slots=True)
class CopyPlan:
    copies: tuple[Copy, ...]  # ordered by destination, adjacent runs merged
    missing: tuple[str, ...]  # in the destination only: nothing is copied there
    extra: tuple[str, ...]  # in the source only

    def into(self, dst_shard: int) -> tuple[Copy, ...]:
        return tuple(c for c in self.copies if c.dst_shard == dst_shard)

    @property
    def numel(self) -> int:
        return sum(c.numel for c in self.copies)


def copy_plan(src: FlatShards, dst: FlatShards, dst_shards: Iterable[int] | None = None) -> CopyPlan:
    """Plan the copies that fill ``dst`` (only ``dst_shards`` where given) from ``src``.

    Raises ValueError where a tensor of the same name has another number of elements, or a name comes twice.
    Shapes may differ (a reshaped tensor has the same elements in the same order).
    """
    index = _index(src, "source")
    wanted = _index(dst, "destination")
    for name, i in wanted.items():
        if name in index and src.tensors[index[name]].numel != dst.tensors[i].numel:
            raise ValueError(
                f"tensor {name!r} has shape {src.tensors[index[name]].shape} in the source "
                f"and {dst.tensors[i].shape} in the destination"
            )
    shards = range(dst.num_shards) if dst_shards is None else dst_shards
    copies = copies_of(
        (
            (piece, index[dst.tensors[piece.tensor].name])
            for shard in shards
            for piece in dst.pieces(shard)
            if dst.tensors[piece.tensor].name in index
        ),
        src,
    )
    return CopyPlan(
        tuple(copies),
        tuple(t.name for t in dst.tensors if t.name not in index),
        tuple(t.name for t in src.tensors if t.name not in wanted),
    )


def copies_of(pieces: Iterable[tuple[Piece, int]], src: FlatShards) -> Iterator[Copy]:
    """The copies that fill the given pieces of a destination, each from the tensor of ``src`` named by its index."""
    return _merge(copy for piece, tensor in pieces for copy in _fill(piece, src, tensor))


def _index(layout: FlatShards, role: str) -> dict[str, int]:
    index = {spec.name: i for i, spec in enumerate(layout.tensors)}
    if len(index) != len(layout.tensors):
        names = [t.name for t in layout.tensors]
        twice = sorted({n for n in names if names.count(n) > 1})
        raise ValueError(f"the {role} layout holds {', '.join(twice)} more than once")
    return index


# A piece of the destination may come from several shards of the source, and pieces that lie end to end on both sides
# are one copy: most tensors of a checkpoint that is cut anew stay together, and many small copies cost more than bytes.


def _fill(piece: Piece, src: FlatShards, tensor: int) -> Iterator[Copy]:
    """The runs of ``src`` that hold the elements of one destination piece."""
    first = src.offsets[tensor] + piece.start
    done = 0
    for part in src.cut(first, first + piece.numel):
        yield Copy(part.shard, part.offset, piece.shard, piece.offset + done, part.numel)
        done += part.numel
    assert done == piece.numel, "a source layout does not cover its own tensor"


def _merge(copies: Iterable[Copy]) -> Iterator[Copy]:
    last: Copy | None = None
    for copy in copies:
        if last is None:
            last = copy
        elif (
            last.src_shard == copy.src_shard
            and last.dst_shard == copy.dst_shard
            and last.src_offset + last.numel == copy.src_offset
            and last.dst_offset + last.numel == copy.dst_offset
        ):
            last = Copy(
                last.src_shard, last.src_offset, last.dst_shard, last.dst_offset, last.numel + copy.numel
            )
        else:
            yield last
            last = copy
    if last is not None:
        yield last
