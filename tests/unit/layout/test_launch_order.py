"""The order in which buckets are launched."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from zeropipe.layout.buckets import launch_order


def test_at_first_the_last_store_and_each_stores_buckets_in_turn() -> None:
    assert launch_order([2, 1]) == ((1, 0), (0, 0), (0, 1))


def test_what_was_learned_comes_first_in_its_order() -> None:
    assert launch_order([3], learned=[(0, 2), (0, 0)]) == ((0, 2), (0, 0), (0, 1))


def test_buckets_of_leaf_modules_come_last() -> None:
    assert launch_order([3], late={(0, 0)}, learned=[(0, 0), (0, 2)]) == ((0, 2), (0, 1), (0, 0))


@given(st.lists(st.integers(0, 4), max_size=4), st.data())
def test_each_bucket_is_launched_once(buckets: list[int], data: st.DataObject) -> None:
    every = [(store, bucket) for store, count in enumerate(buckets) for bucket in range(count)]
    learned = data.draw(st.permutations(every))[: data.draw(st.integers(0, len(every)))]
    late = set(data.draw(st.permutations(every))[: data.draw(st.integers(0, len(every)))])
    order = launch_order(buckets, late, learned)
    assert sorted(order) == every
    assert [key in late for key in order] == sorted(key in late for key in order)
