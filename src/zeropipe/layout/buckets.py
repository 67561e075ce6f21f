"""Cuts a flat layout into buckets: tensors whose gradients are communicated together, last ones first.

Backward produces gradients roughly from the last parameter to the first, so the first bucket is the end of
the buffer. A bucket holds whole tensors; one larger than the limit is a bucket of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from zeropipe.layout.flat import FlatShards, Piece


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a bucket that one shard owns and that travels as one message."""

    shard: int
    offset: int  # first element, counted in the shard
    start: int  # first element, counted in the bucket
    numel: int
    pieces: tuple[Piece, ...]  # the runs of tensors that fill it, in buffer order


@dataclass(frozen=True, slots=True)
class Bucket:
    tensors: tuple[int, ...]  # indices into the layout, in buffer order
    start: int  # first element, counted in the flat buffer
    numel: int
    spans: tuple[Span, ...]  # in buffer order; they cover the bucket once


def cut_buckets(layout: FlatShards, max_numel: int, alone_numel: int | None = None) -> tuple[Bucket, ...]:
    """Buckets of at most ``max_numel`` elements (at least one tensor each), from the end of the buffer.

    A run of at least ``alone_numel`` elements of one tensor is a span of its own, so that it can be sent from where
    it lies; None: one span per shard.
    """
    groups: list[list[int]] = []
    size = 0
    for tensor in reversed(range(len(layout.tensors))):
        numel = layout.tensors[tensor].numel
        if not groups or size + numel > max_numel:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += numel
    return tuple(_bucket(layout, tuple(reversed(group)), alone_numel) for group in groups)


def _bucket(layout: FlatShards, tensors: tuple[int, ...], alone_numel: int | None) -> Bucket:
    start, stop = layout.offsets[tensors[0]], layout.offsets[tensors[-1] + 1]
    runs: list[list[Piece]] = []
    open_to_more = False
    for piece in layout.cut(start, stop):
        small = alone_numel is None or piece.numel < alone_numel
        if open_to_more and small and runs[-1][-1].shard == piece.shard:
            runs[-1].append(piece)
        else:
            runs.append([piece])
        open_to_more = small
    return Bucket(tensors, start, stop - start, tuple(_span(layout, run, start) for run in runs))


def _span(layout: FlatShards, run: list[Piece], bucket_start: int) -> Span:
    first = run[0]
    start = layout.offsets[first.tensor] + first.start - bucket_start
    return Span(first.shard, first.offset, start, sum(piece.numel for piece in run), tuple(run))


Key = tuple[int, int]  # (store, bucket of the store)


def launch_order(
    buckets: Sequence[int], late: Collection[Key] = (), learned: Sequence[Key] = ()
) -> tuple[Key, ...]:
    """The order in which a pass launches its buckets: the same on all ranks, and close to the order of backward.

    A bucket that is complete early but launched late holds its gradients until then. Models register their modules in
    the order of forward more often than not, so the first pass launches from the last parameter to the first, here of
    stores with ``buckets[s]`` buckets each.

    ``learned``: the buckets that a backward completed, in its order; they come first, the others as they were.
    ``late``: buckets that many a backward does not complete (experts that got no token); they come last, so that
    none of the others waits for them.
    """
    default = [(store, bucket) for store in reversed(range(len(buckets))) for bucket in range(buckets[store])]
    place = {key: at for at, key in enumerate(learned)}
    return tuple(sorted(default, key=lambda key: (key in late, place.get(key, len(place)))))
