"""The balanced cut against brute force."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeropipe.layout.balance import cut_balanced, cut_evenly, cut_for_owners


def _loads(weights, bounds):
    return [sum(weights[a:b]) for a, b in pairwise(bounds)]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.integers(1, 9))
def test_the_heaviest_part_is_as_light_as_brute_force_finds(weights, parts):
    parts = min(parts, len(weights))
    bounds = cut_balanced(weights, parts)
    assert bounds[0] == 0
    assert bounds[-1] == len(weights)
    assert all(a < b for a, b in pairwise(bounds))
    every = [(0, *inner, len(weights)) for inner in combinations(range(1, len(weights)), parts - 1)]
    lightest = min(max(_loads(weights, one)) for one in every)
    assert max(_loads(weights, bounds)) == lightest
    squares = [
        sum(x * x for x in _loads(weights, one)) for one in every if max(_loads(weights, one)) == lightest
    ]
    assert sum(x * x for x in _loads(weights, bounds)) == min(squares)


def _heaviest(weights, bounds, owners):
    loads = dict.fromkeys(owners, 0)
    for owner, load in zip(owners, _loads(weights, bounds), strict=True):
        loads[owner] += load
    return max(loads.values())


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=9), st.lists(st.integers(0, 2), min_size=1, max_size=6)
)
def test_the_heaviest_owner_is_as_light_as_brute_force_finds(weights, owners):
    owners = owners[: len(weights)]
    bounds = cut_for_owners(weights, owners)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, len(weights), len(owners) + 1)
    assert all(a < b for a, b in pairwise(bounds))
    every = [(0, *inner, len(weights)) for inner in combinations(range(1, len(weights)), len(owners) - 1)]
    assert _heaviest(weights, bounds, owners) == min(_heaviest(weights, one, owners) for one in every)


@given(st.lists(st.integers(0, 50), min_size=40, max_size=48), st.integers(2, 4), st.booleans())
def test_of_more_cuts_than_can_be_looked_at_a_better_one_is_found(weights, ranks, folded):
    """And near the best there is: no owner has less than its share, so the heaviest has at least the mean."""
    owners = [*range(ranks), *(reversed(range(ranks)) if folded else range(ranks))]
    bounds = cut_for_owners(weights, owners)
    assert all(a < b for a, b in pairwise(bounds))
    found = _heaviest(weights, bounds, owners)
    assert found <= _heaviest(weights, cut_balanced(weights, len(owners)), owners)
    assert found <= sum(weights) / ranks + max(weights)


@given(st.integers(1, 100), st.integers(1, 100))
def test_even_cuts_differ_by_one_at_most(count, parts):
    parts = min(parts, count)
    sizes = [b - a for a, b in pairwise(cut_evenly(count, parts))]
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("cut", [cut_balanced, lambda w, p: cut_evenly(len(w), p)])
def test_more_parts_than_items_are_refused(cut):
    with pytest.raises(ValueError, match="non-empty"):
        cut([1, 2], 3)


def test_negative_weights_are_refused():
    with pytest.raises(ValueError, match="negative"):
        cut_balanced([1, -1], 1)


def test_a_large_model_is_cut_quickly():
    weights = [1 + i % 7 for i in range(1000)]
    assert max(_loads(weights, cut_balanced(weights, 16))) <= sum(weights) / 16 + 7
