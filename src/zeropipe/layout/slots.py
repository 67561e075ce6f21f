"""Sums over a fixed number of slots along one fixed tree, whoever computes which slot.

A slot is one micro-batch of a step. Floating-point sums depend on how they are bracketed, so the brackets follow from
the number of slots alone::

    12 slots            0  1  2    3  4  5    6  7  8    9 10 11
    quarters            (( 0 1)2)  ( 3(4 5))  ((6 7)8)   (9(10 11))
    halves              (         +        )  (         +         )
    all                 (                  +                      )

A rank adds what it has of the tree and sends the rest: of 1, 2, 4 or 12 ranks each has one node, of 3 or 6 at most two
({0 1 2} and 3, {4 5} and {6 7}, 8 and {9 10 11}). To add commutes, so that siblings may come in either order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Generic, TypeVar

Node = tuple[int, int]  # its slots: [first, one past last)
Value = TypeVar("Value")


class Tree:
    """The brackets of a sum over ``slots``, which are at least 1."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.root: Node = (0, slots)
        self._kin: dict[Node, tuple[Node, Node]] = {}  # node -> (sibling, parent)
        self._halves: dict[Node, int] = {}  # node -> where it is cut
        waiting = [self.root]
        while waiting:
            node = first, last = waiting.pop()
            if last - first < 2:
                continue
            at = self._halves[node] = self._cut(first, last)
            left, right = (first, at), (at, last)
            self._kin[left], self._kin[right] = (right, node), (left, node)
            waiting += [left, right]

    def _cut(self, first: int, last: int) -> int:
        # Halves and quarters in their middles, so that 2 and 4 ranks have one node each. The rest where most shares
        # begin: those of n slots begin at multiples of n, so where the common divisor with all slots is largest; of
        # several such places at the middle one. Below 60 slots no share of a whole number of them is of three nodes.
        size = last - first

        def worth(at: int) -> tuple[bool, int, int, int]:
            halves = size % 2 == 0 and size * 4 > self.slots and 2 * at == first + last
            return halves, gcd(at, self.slots), -abs(2 * at - first - last), at

        return max(range(first + 1, last), key=worth)

    def kin(self, node: Node) -> tuple[Node, Node] | None:
        """(its sibling, their parent); None for the root."""
        return self._kin.get(node)

    def halves(self, node: Node) -> tuple[Node, Node] | None:
        """The two that ``node`` is the sum of; None for a slot."""
        at = self._halves.get(node)
        return None if at is None else ((node[0], at), (at, node[1]))

    def cover(self, first: int, last: int) -> tuple[Node, ...]:
        """The fewest nodes that are the slots [first, last), in order."""
        found: list[Node] = []
        waiting = [self.root]
        while waiting:
            node = waiting.pop()
            if node[1] <= first or last <= node[0]:
                continue
            halves = self.halves(node)
            if halves is None or (first <= node[0] and node[1] <= last):
                found.append(node)
            else:
                waiting += reversed(halves)
        return tuple(found)


class Fold(Generic[Value]):
    """A sum under way: values of nodes, added as soon as both of two siblings are there.

    ``add`` is given the left and the right one, and may change either. What has no value is absent: not zero, nothing
    is added for it, and so the sum is the same whether its place is left out or filled with -0.0, to which
    everything adds up to itself.
    """

    def __init__(self, tree: Tree, add: Callable[[Value, Value], Value]) -> None:
        self._tree, self._add = tree, add
        self.values: dict[Node, Value | None] = {}

    def put(self, node: Node, value: Value | None) -> None:
        """``node`` has this value; None: it has none. It has been given none before."""
        while (kin := self._tree.kin(node)) is not None and kin[0] in self.values:
            sibling, parent = kin
            other = self.values.pop(sibling)
            value = self._sum(other, value) if sibling < node else self._sum(value, other)
            node = parent
        self.values[node] = value

    def has(self, slot: int) -> bool:
        """Whether ``slot`` was put, by itself or in a node."""
        return any(first <= slot < last for first, last in self.values)

    def take(self, node: Node) -> Value | None:
        """The value of ``node``, of which slots that were not put have none; they are taken out of the sum."""
        if node in self.values:
            return self.values.pop(node)
        halves = self._tree.halves(node)
        if halves is None:
            return None
        return self._sum(*map(self.take, halves))

    def _sum(self, left: Value | None, right: Value | None) -> Value | None:
        if left is None or right is None:
            return right if left is None else left
        return self._add(left, right)


@dataclass(frozen=True, slots=True)
class Sharing:
    """Which rank computes which slot in which pass of a step; every rank makes as many passes.

    ``in_turn``: neighbouring slots go to neighbouring ranks, so that each pass gives their owners a run of the tree;
    else a rank has neighbouring slots, so that it adds most of them itself. Where ranks do not divide the slots, some
    have one less: their last pass counts for nothing::

        7 slots, 3 ranks     in turn   0 1 2 | 3 4 5 | 6 - -        else   0 3 5 | 1 4 6 | 2 - -
                                       pass 0  pass 1  pass 2
    """

    slots: int
    ranks: int
    in_turn: bool

    @property
    def passes(self) -> int:
        return len(self.run(0))

    def slot(self, rank: int, number: int) -> int | None:
        """The slot of ``rank`` in pass ``number``; None where it has none."""
        if self.in_turn:
            slot = number * self.ranks + rank
            return slot if slot < self.slots else None
        run = self.run(rank)
        return run[number] if number < len(run) else None

    def run(self, rank: int) -> range:
        """The neighbouring slots of ``rank``, where they are not dealt out in turn."""
        share, more = divmod(self.slots, self.ranks)
        first = rank * share + min(rank, more)
        return range(first, first + share + (rank < more))

    def of(self, rank: int) -> tuple[int, ...]:
        """The slots of ``rank`` in a step, in the order of its passes."""
        found = (self.slot(rank, number) for number in range(self.passes))
        return tuple(slot for slot in found if slot is not None)
