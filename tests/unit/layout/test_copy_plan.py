"""A copy plan moves each shared element exactly once, and its inverse brings every element back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeropipe.layout.copy_plan import Copy, copy_plan
from zeropipe.layout.flat import FlatShards, flat_shards

shapes = st.lists(st.integers(0, 4), min_size=0, max_size=3).map(tuple)
PAD = -1


@st.composite
def layout_pairs(draw: st.DrawFn) -> tuple[FlatShards, FlatShards]:
    """Two layouts over overlapping sets of tensors: other order, padding, shard count and members."""
    tensors = [(f"t{i}", shape, "float32") for i, shape in enumerate(draw(st.lists(shapes, max_size=7)))]
    first = draw(st.permutations(tensors))[: draw(st.integers(0, len(tensors)))]
    second = draw(st.permutations(tensors))[: draw(st.integers(0, len(tensors)))]
    sizes = st.integers(1, 6)
    return (
        flat_shards(first, draw(sizes), draw(st.integers(1, 4))),
        flat_shards(second, draw(sizes), draw(st.integers(1, 4))),
    )


def fill(layout: FlatShards) -> list[list[object]]:
    """Shards whose elements say which element of which tensor they are."""
    flat: list[object] = [(t.name, i) for t in layout.tensors for i in range(t.numel)]
    flat += [PAD] * layout.padding
    n = layout.shard_numel
    return [flat[s * n : (s + 1) * n] for s in range(layout.num_shards)]


def run(copies: tuple[Copy, ...], src: list[list[object]], dst: list[list[object]]) -> None:
    for c in copies:
        run = src[c.src_shard][c.src_offset : c.src_offset + c.numel]
        assert len(run) == c.numel and PAD not in run
        assert all(x is None for x in dst[c.dst_shard][c.dst_offset : c.dst_offset + c.numel])
        dst[c.dst_shard][c.dst_offset : c.dst_offset + c.numel] = run


def empty(layout: FlatShards) -> list[list[object]]:
    return [[None] * layout.shard_numel for _ in range(layout.num_shards)]


@given(layout_pairs())
def test_each_shared_element_is_copied_once_to_its_place(pair: tuple[FlatShards, FlatShards]) -> None:
    src, dst = pair
    plan = copy_plan(src, dst)
    got = empty(dst)
    run(plan.copies, fill(src), got)
    shared = {t.name for t in src.tensors} & {t.name for t in dst.tensors}
    expected = [
        [x if x != PAD and x[0] in shared else None for x in shard]  # type: ignore[index]
        for shard in fill(dst)
    ]
    assert got == expected
    assert plan.missing == tuple(t.name for t in dst.tensors if t.name not in shared)
    assert plan.extra == tuple(t.name for t in src.tensors if t.name not in shared)


@given(layout_pairs())
def test_there_and_back_is_identity(pair: tuple[FlatShards, FlatShards]) -> None:
    src, other = pair
    # The way back is over the same tensors, laid out as the second layout cuts them.
    dst = FlatShards(tuple(reversed(src.tensors)), other.num_shards, other.align)
    there, back = copy_plan(src, dst), copy_plan(dst, src)
    middle, got = empty(dst), empty(src)
    run(there.copies, fill(src), middle)
    run(back.copies, middle, got)
    assert [[PAD if x is None else x for x in shard] for shard in got] == fill(src)
    assert there.numel == back.numel == src.numel


@given(layout_pairs(), st.data())
def test_one_destination_shard_alone_gives_its_part_of_the_plan(
    pair: tuple[FlatShards, FlatShards], data: st.DataObject
) -> None:
    src, dst = pair
    shard = data.draw(st.integers(0, dst.num_shards - 1))
    assert copy_plan(src, dst, [shard]).copies == copy_plan(src, dst).into(shard)


def test_equal_layouts_need_one_copy_per_shard() -> None:
    layout = flat_shards([("a", (3,), "float32"), ("b", (5,), "float32"), ("c", (4,), "float32")], 3)
    assert copy_plan(layout, layout).copies == tuple(Copy(s, 0, s, 0, 4) for s in range(3))


def test_another_size_under_one_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'a'.*\(3,\).*\(4,\)"):
        copy_plan(flat_shards([("a", (3,), "f")], 1), flat_shards([("a", (4,), "f")], 1))


def test_a_name_that_comes_twice_is_refused() -> None:
    twice = flat_shards([("a", (3,), "f"), ("a", (3,), "f")], 1)
    with pytest.raises(ValueError, match="more than once"):
        copy_plan(twice, twice)
