"""A sum over slots has the same brackets whoever adds which part of it."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeropipe.layout.slots import Fold, Node, Sharing, Tree

SLOTS = st.integers(1, 40)


def brackets(left: str, right: str) -> str:
    """An addition that is not associative; siblings may be given in either order, so it is told which is left."""
    return f"({left} {right})"


def whole(slots: int) -> str | None:
    fold = Fold(Tree(slots), brackets)
    for slot in range(slots):
        fold.put((slot, slot + 1), str(slot))
    return fold.take((0, slots))


def test_the_picture_of_the_module():
    assert whole(12) == "((((0 1) 2) (3 (4 5))) (((6 7) 8) (9 (10 11))))"
    tree = Tree(12)
    assert [tree.cover(at, at + 4) for at in (0, 4, 8)] == [
        ((0, 3), (3, 4)),
        ((4, 6), (6, 8)),
        ((8, 9), (9, 12)),
    ]
    assert all(len(tree.cover(at, at + size)) == 1 for size in (3, 6, 12) for at in range(0, 12, size))


@given(SLOTS)
def test_a_tree_halves_runs_down_to_slots(slots):
    tree = Tree(slots)
    waiting: list[Node] = [tree.root]
    leaves = []
    while waiting:
        node = waiting.pop()
        halves = tree.halves(node)
        if halves is None:
            leaves.append(node)
            continue
        left, right = halves
        assert (left[0], right[1]) == node
        assert left[1] == right[0]
        assert tree.kin(left) == (right, node)
        assert tree.kin(right) == (left, node)
        waiting += halves
    assert sorted(leaves) == [(at, at + 1) for at in range(slots)]
    assert tree.kin(tree.root) is None


@pytest.mark.parametrize("slots", range(1, 60))
def test_a_share_of_whole_slots_is_at_most_two_nodes(slots):
    tree = Tree(slots)
    for ranks in range(1, slots + 1):
        if slots % ranks == 0:
            shares = [Sharing(slots, ranks, in_turn=False).run(rank) for rank in range(ranks)]
            sizes = [len(tree.cover(share[0], share[-1] + 1)) for share in shares]
            assert max(sizes) <= (1 if ranks in (1, slots) or (ranks in (2, 4) and slots % 4 == 0) else 2)


@given(SLOTS, st.randoms(use_true_random=False), st.data())
def test_absent_slots_and_any_order_give_the_same_brackets(slots, random: Random, data):
    """Left out, or put as absent; in order or not; by slots, or by the nodes that ranks have: one sum."""
    tree = Tree(slots)
    absent = data.draw(st.sets(st.integers(0, slots - 1)))
    expected = _reference(tree, tree.root, absent)
    order = list(range(slots))
    random.shuffle(order)
    told, left_out = Fold(tree, brackets), Fold(tree, brackets)
    for slot in order:
        told.put((slot, slot + 1), None if slot in absent else str(slot))
        if slot not in absent:
            left_out.put((slot, slot + 1), str(slot))
    assert told.take(tree.root) == expected
    assert left_out.take(tree.root) == expected

    ranks = data.draw(st.integers(1, slots))
    owner = Fold(tree, brackets)
    for rank in range(ranks):
        run = Sharing(slots, ranks, in_turn=False).run(rank)
        mine = Fold(tree, brackets)
        for slot in run:
            if slot not in absent:
                mine.put((slot, slot + 1), str(slot))
        for node in tree.cover(run[0], run[-1] + 1):
            owner.put(node, mine.take(node))
    assert owner.take(tree.root) == expected


def _reference(tree: Tree, node: Node, absent: set[int]) -> str | None:
    halves = tree.halves(node)
    if halves is None:
        return None if node[0] in absent else str(node[0])
    left, right = (_reference(tree, half, absent) for half in halves)
    return left or right if left is None or right is None else brackets(left, right)


@given(SLOTS, st.booleans(), st.data())
def test_each_slot_is_one_rank_s_in_one_pass(slots, in_turn, data):
    ranks = data.draw(st.integers(1, slots))
    sharing = Sharing(slots, ranks, in_turn)
    dealt = [sharing.slot(rank, number) for number in range(sharing.passes) for rank in range(ranks)]
    assert sorted(slot for slot in dealt if slot is not None) == list(range(slots))
    assert sharing.passes * ranks - slots < ranks
    for rank in range(ranks):
        own = sharing.of(rank)
        assert all(a < b for a, b in pairwise(own))
        if not in_turn:
            assert own == tuple(sharing.run(rank))
    if in_turn:
        for number in range(sharing.passes):
            row = [sharing.slot(rank, number) for rank in range(ranks)]
            known = [slot for slot in row if slot is not None]
            assert known == list(range(number * ranks, number * ranks + len(known)))


def test_nodes_are_kept_as_long_as_their_sibling_is_missing():
    fold = Fold(Tree(12), brackets)
    depth = []
    for slot in range(12):
        fold.put((slot, slot + 1), str(slot))
        depth.append(len(fold.values))
        assert fold.has(slot)
        assert not fold.has(slot + 1)
    assert depth == [1, 1, 1, 2, 3, 1, 2, 2, 2, 3, 4, 1]
