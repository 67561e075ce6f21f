"""Cuts a flat layout into buckets: tensors whose gradients are communicated together, last ones first.

Backward produces gradients roughly from the last parameter to the first, so the first bucket is the end of
the buffer. A bucket holds whole tensors; one larger than the limit is a bucket of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from zeropipe.layout.flat import FlatShards


@dataclass(frozen=True, slots=True)
class Span:
    """The part of a bucket that one shard owns."""

    shard: int
    offset: int  # first element, counted in the shard
    start: int  # first element, counted in the bucket
    numel: int


@dataclass(frozen=True, slots=True)
class Bucket:
    tensors: tuple[int, ...]  # indices into the layout, in buffer order
    start: int  # first element, counted in the flat buffer
    numel: int
    spans: tuple[Span, ...]  # in buffer order; they cover the bucket once


def cut_buckets(layout: FlatShards, max_numel: int) -> tuple[Bucket, ...]:
    """Buckets of at most ``max_numel`` elements (at least one tensor each), from the end of the buffer."""
    groups: list[list[int]] = []
    size = 0
    for tensor in reversed(range(len(layout.tensors))):
        numel = layout.tensors[tensor].numel
        if not groups or size + numel > max_numel:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += numel
    return tuple(_bucket(layout, tuple(reversed(group))) for group in groups)


def _bucket(layout: FlatShards, tensors: tuple[int, ...]) -> Bucket:
    start, stop = layout.offsets[tensors[0]], layout.offsets[tensors[-1] + 1]
    spans: list[Span] = []
    for piece in layout.cut(start, stop):
        at = layout.offsets[piece.tensor] + piece.start - start
        if spans and spans[-1].shard == piece.shard:
            last = spans[-1]
            spans[-1] = Span(last.shard, last.offset, last.start, last.numel + piece.numel)
        else:
            spans.append(Span(piece.shard, piece.offset, at, piece.numel))
    return Bucket(tensors, start, stop - start, tuple(spans))
