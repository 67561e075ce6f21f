"""The one owner of sharding: whatever the tensors, every element lives in exactly one place."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.layout.strategies import layouts
from zeropipe.layout.flat import FlatShards, Piece, TensorSpec, flat_shards


def fill(layout: FlatShards) -> list[list[tuple[int, int] | None]]:
    """Each shard as a list of (tensor, element), written piece by piece; None is padding."""
    shards: list[list[tuple[int, int] | None]] = []
    for shard in range(layout.num_shards):
        row: list[tuple[int, int] | None] = [None] * layout.shard_numel
        for piece in layout.pieces(shard):
            assert piece.shard == shard
            assert piece.numel > 0
            for i in range(piece.numel):
                assert row[piece.offset + i] is None, "two pieces overlap"
                row[piece.offset + i] = (piece.tensor, piece.start + i)
        shards.append(row)
    return shards


def plain(layout: FlatShards) -> list[tuple[int, int] | None]:
    """The definition: all elements end to end, then the padding."""
    elements: list[tuple[int, int] | None] = [
        (t, i) for t, spec in enumerate(layout.tensors) for i in range(prod(spec.shape))
    ]
    return elements + [None] * (layout.padded_numel - len(elements))


@given(layouts())
def test_the_shards_end_to_end_are_the_tensors_end_to_end_and_then_padding(layout: FlatShards) -> None:
    assert [element for row in fill(layout) for element in row] == plain(layout)


@given(layouts())
def test_shards_are_equal_aligned_and_as_small_as_can_be(layout: FlatShards) -> None:
    assert layout.numel == sum(prod(t.shape) for t in layout.tensors)
    assert layout.padded_numel == layout.shard_numel * layout.num_shards
    assert layout.padding == layout.padded_numel - layout.numel
    assert layout.shard_numel % layout.align == 0
    assert 0 <= layout.padding < layout.num_shards * layout.align or layout.numel == layout.padding == 0


@given(layouts())
def test_ranges_tile_the_buffer(layout: FlatShards) -> None:
    shards = [layout.shard_range(s) for s in range(layout.num_shards)]
    assert shards[0][0] == 0
    assert shards[-1][1] == layout.padded_numel
    assert all(a[1] == b[0] for a, b in pairwise(shards))
    tensors = [layout.tensor_range(i) for i in range(len(layout.tensors))]
    assert all(a[1] == b[0] for a, b in pairwise(tensors))
    assert all(
        stop - start == spec.numel for (start, stop), spec in zip(tensors, layout.tensors, strict=True)
    )


@given(layouts())
def test_pieces_by_tensor_are_the_pieces_by_shard(layout: FlatShards) -> None:
    by_shard = [piece for s in range(layout.num_shards) for piece in layout.pieces(s)]
    by_tensor = [piece for t in range(len(layout.tensors)) for piece in layout.tensor_pieces(t)]
    assert by_tensor == by_shard  # both are in buffer order
    for t, spec in enumerate(layout.tensors):
        assert sum(piece.numel for piece in layout.tensor_pieces(t)) == spec.numel


@given(layouts(), st.data())
def test_a_cut_is_the_part_of_the_whole(layout: FlatShards, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, layout.padded_numel))
    stop = data.draw(st.integers(0, layout.padded_numel))
    found: list[tuple[int, int]] = []
    for piece in layout.cut(start, stop):
        at = piece.shard * layout.shard_numel + piece.offset
        assert start <= at
        assert at + piece.numel <= stop
        found += [(piece.tensor, piece.start + i) for i in range(piece.numel)]
    assert found == [element for element in plain(layout)[start:stop] if element is not None]


@given(layouts())
def test_there_are_no_more_pieces_than_needed(layout: FlatShards) -> None:
    """Each piece but the last of a tensor ends at a shard's end: one copy each, no more."""
    for t in range(len(layout.tensors)):
        pieces = layout.tensor_pieces(t)
        assert all(piece.offset + piece.numel == layout.shard_numel for piece in pieces[:-1])


@given(layouts())
def test_json_and_back_is_the_same_layout(layout: FlatShards) -> None:
    text = json.dumps(layout.to_json())
    again = FlatShards.from_json(json.loads(text))
    assert again == layout
    assert again.offsets == layout.offsets
    assert hash(again) == hash(layout)


@given(layouts(), st.integers(1, 12), st.integers(1, 12))
def test_resharding_depends_on_the_goal_alone(layout: FlatShards, between: int, goal: int) -> None:
    there = layout.reshard(goal)
    assert there.tensors == layout.tensors
    assert (there.num_shards, there.align) == (goal, layout.align)
    assert layout.reshard(between).reshard(goal) == there
    assert there.reshard(layout.num_shards) == layout
    assert layout.reshard(goal, align=1).align == 1


@given(layouts())
def test_one_shard_without_alignment_is_the_universal_form(layout: FlatShards) -> None:
    universal = layout.reshard(1, align=1)
    assert universal.padding == 0
    assert [(p.start, p.offset) for p in universal.pieces(0)] == [
        (0, start)
        for start, stop in (universal.tensor_range(t) for t in range(len(layout.tensors)))
        if stop > start
    ]


def test_the_picture_in_the_docstring() -> None:
    layout = flat_shards([("a", (3, 3), "float32"), ("b", (7,), "float32"), ("c", (17,), "float32")], 2)
    assert (layout.shard_numel, layout.padding) == (17, 1)
    assert layout.pieces(0) == (Piece(0, 0, 0, 0, 9), Piece(1, 0, 0, 9, 7), Piece(2, 0, 0, 16, 1))
    assert layout.pieces(1) == (Piece(2, 1, 1, 0, 16),)


@pytest.mark.parametrize("tensors", [[], [("e", (0,), "float32")], [("e", (3, 0), "float32")] * 2])
def test_nothing_to_shard_is_a_layout_without_pieces(tensors: list[tuple[str, tuple[int, ...], str]]) -> None:
    layout = flat_shards(tensors, 4)
    assert layout.shard_numel == layout.padded_numel == 0
    assert all(layout.pieces(shard) == () for shard in range(4))
    assert all(layout.shard_range(shard) == (0, 0) for shard in range(4))


def test_a_scalar_on_many_shards_lives_on_the_first() -> None:
    layout = flat_shards([("s", (), "float32")], 4)
    assert layout.pieces(0) == (Piece(0, 0, 0, 0, 1),)
    assert [layout.pieces(s) for s in (1, 2, 3)] == [(), (), ()]


@pytest.mark.parametrize(("shards", "align"), [(0, 1), (-1, 1), (1, 0), (2, -3)])
def test_impossible_numbers_are_refused(shards: int, align: int) -> None:
    with pytest.raises(ValueError, match=f"found {shards} and {align}"):
        FlatShards((), shards, align)


def test_shards_outside_are_refused() -> None:
    layout = flat_shards([("a", (4,), "float32")], 2)
    for shard in (-1, 2):
        with pytest.raises(IndexError, match=f"shard {shard} of 2"):
            layout.pieces(shard)


def test_index_finds_names() -> None:
    layout = flat_shards([("a", (4,), "float32"), ("b", (), "bfloat16")], 2)
    assert layout.index("b") == 1
    with pytest.raises(KeyError, match="c"):
        layout.index("c")


def test_layouts_are_frozen_values() -> None:
    spec = TensorSpec("a", (4,), "float32")
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.name = "b"  # type: ignore[misc]
    assert FlatShards((spec,), 2) == FlatShards((TensorSpec("a", (4,), "float32"),), 2)
    assert FlatShards((spec,), 2) != FlatShards((spec,), 3)


def test_a_billion_elements_cost_no_loop_over_elements() -> None:
    layout = flat_shards([(f"t{i}", (1_000_003, 997), "bfloat16") for i in range(4)], 1024, 128)
    assert sum(piece.numel for piece in layout.pieces(1023)) == layout.shard_numel - layout.padding
