"""Buckets cut a layout's tensors into what is communicated together, and lose nothing on the way."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.layout.strategies import layouts
from zeropipe.layout.buckets import Bucket, Span, cut_buckets
from zeropipe.layout.flat import FlatShards, Piece, flat_shards

limits = st.one_of(st.integers(0, 60), st.just(10**12))


@given(layouts(), limits)
def test_each_tensor_is_in_one_bucket_last_ones_first(layout: FlatShards, limit: int) -> None:
    buckets = cut_buckets(layout, limit)
    order = [tensor for bucket in reversed(buckets) for tensor in bucket.tensors]
    assert order == list(range(len(layout.tensors)))


@given(layouts(), limits)
def test_a_bucket_is_within_the_limit_or_holds_one_tensor(layout: FlatShards, limit: int) -> None:
    for bucket in cut_buckets(layout, limit):
        assert bucket.tensors
        assert bucket.numel == sum(layout.tensors[t].numel for t in bucket.tensors)
        assert bucket.start == layout.offsets[bucket.tensors[0]]
        full = [t for t in bucket.tensors if layout.tensors[t].numel]
        assert bucket.numel <= limit or len(full) == 1


@given(layouts(), limits)
def test_no_bucket_could_have_taken_the_next_tensor(layout: FlatShards, limit: int) -> None:
    buckets = cut_buckets(layout, limit)
    for bucket, following in pairwise(buckets):
        next_tensor = layout.tensors[following.tensors[-1]]
        assert bucket.numel + next_tensor.numel > limit


@given(layouts(), limits)
def test_spans_cover_each_bucket_once_and_point_into_the_shards(layout: FlatShards, limit: int) -> None:
    for bucket in cut_buckets(layout, limit):
        at = 0
        for span in bucket.spans:
            assert span.start == at
            assert span.numel > 0
            flat = span.shard * layout.shard_numel + span.offset
            assert flat == bucket.start + span.start
            assert span.offset + span.numel <= layout.shard_numel
            at += span.numel
        assert at == bucket.numel
        shards = [span.shard for span in bucket.spans]
        assert shards == sorted(set(shards)), "one span for each shard that the bucket touches"


@given(layouts(), limits)
def test_all_buckets_together_fill_each_shard_once(layout: FlatShards, limit: int) -> None:
    counts = [[0] * layout.shard_numel for _ in range(layout.num_shards)]
    for bucket in cut_buckets(layout, limit):
        for span in bucket.spans:
            for i in range(span.offset, span.offset + span.numel):
                counts[span.shard][i] += 1
    flat = [count for row in counts for count in row]
    assert flat == [1] * layout.numel + [0] * layout.padding


@given(layouts())
def test_a_huge_limit_makes_one_bucket_and_a_tiny_one_a_bucket_each(layout: FlatShards) -> None:
    full = [t for t, spec in enumerate(layout.tensors) if spec.numel]
    assert len(cut_buckets(layout, 10**12)) == (1 if layout.tensors else 0)
    holders = [b for b in cut_buckets(layout, 1) if b.numel > 1]
    assert len(holders) == sum(layout.tensors[t].numel > 1 for t in full)


def test_an_example() -> None:
    layout = flat_shards([("a", (6,), "float32"), ("b", (2,), "float32"), ("c", (3,), "float32")], 2)
    assert layout.shard_numel == 6
    a, b, c = Piece(0, 0, 0, 0, 6), Piece(1, 0, 1, 0, 2), Piece(2, 0, 1, 2, 3)
    assert cut_buckets(layout, 5) == (
        Bucket((1, 2), 6, 5, (Span(1, 0, 0, 5, (b, c)),)),
        Bucket((0,), 0, 6, (Span(0, 0, 0, 6, (a,)),)),
    )
    assert cut_buckets(layout, 100) == (
        Bucket((0, 1, 2), 0, 11, (Span(0, 0, 0, 6, (a,)), Span(1, 0, 6, 5, (b, c)))),
    )
    assert cut_buckets(layout, 100, alone_numel=3) == (
        Bucket((0, 1, 2), 0, 11, (Span(0, 0, 0, 6, (a,)), Span(1, 0, 6, 2, (b,)), Span(1, 2, 8, 3, (c,)))),
    )


@given(layouts(), limits, st.integers(1, 30))
def test_large_runs_travel_alone_and_small_ones_together(layout: FlatShards, limit: int, alone: int) -> None:
    for bucket in cut_buckets(layout, limit, alone):
        pieces = [piece for span in bucket.spans for piece in span.pieces]
        assert pieces == list(layout.cut(bucket.start, bucket.start + bucket.numel))
        for span in bucket.spans:
            assert span.numel == sum(piece.numel for piece in span.pieces)
            assert len(span.pieces) == 1 or all(piece.numel < alone for piece in span.pieces)
        for one, following in pairwise(bucket.spans):
            small = all(piece.numel < alone for span in (one, following) for piece in span.pieces)
            assert one.shard != following.shard or not small, "these two could be one message"
