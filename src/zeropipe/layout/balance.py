"""Cuts a row of weights into contiguous parts whose heaviest is as light as it can be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, combinations, pairwise
from math import comb

_ALL = 3000  # cuts that are all looked at


def cut_balanced(weights: Sequence[int], parts: int) -> tuple[int, ...]:
    """Bounds of ``parts`` non-empty runs of ``weights``: part i is ``[bounds[i], bounds[i + 1])``.

    The heaviest part is minimal; among the cuts that reach that minimum, the sum of squares is, so that the other
    parts are even too. Raises ValueError if there are fewer weights than parts, or a negative weight.
    """
    count = len(weights)
    if not 1 <= parts <= count:
        raise ValueError(f"cannot cut {count} weights into {parts} non-empty parts")
    if min(weights) < 0:
        raise ValueError(f"weights must not be negative, found {min(weights)}")
    sums = list(accumulate(weights, initial=0))
    limit = _lightest_maximum(weights, parts)

    # best[k][i]: least sum of squares for the first i weights in k parts, none heavier than the limit.
    unreachable = None
    best: list[list[int | None]] = [[unreachable] * (count + 1) for _ in range(parts + 1)]
    origin = [[0] * (count + 1) for _ in range(parts + 1)]
    best[0][0] = 0
    for k in range(1, parts + 1):
        for i in range(k, count - (parts - k) + 1):
            for j in range(i - 1, k - 2, -1):
                # The further a part reaches back the heavier it is: before the first that is too heavy, none fits.
                weight = sums[i] - sums[j]
                if weight > limit:
                    break
                before = best[k - 1][j]
                if before is None:
                    continue
                total = before + weight * weight
                known = best[k][i]
                if known is None or total < known:
                    best[k][i], origin[k][i] = total, j
    bounds = [count]
    for k in range(parts, 0, -1):
        bounds.append(origin[k][bounds[-1]])
    return tuple(reversed(bounds))


def cut_for_owners(weights: Sequence[int], owners: Sequence[int]) -> tuple[int, ...]:
    """Bounds of ``len(owners)`` non-empty runs of ``weights``, part i for ``owners[i]``, who may have several.

    The heaviest owner is as light as can be found, then the heaviest part, then the sums of squares of both: exact for
    up to 3000 possible cuts; beyond, none of the moves below makes it better, and it is at least as light as
    `cut_balanced`, where they begin. Raises ValueError as that does.

    ::

        weights  0 1 1 1 1 1 1 1 1 1.4      a move: from one part to another, with all bounds between them
        owners   [0  |1  |1    |0      ]    0 1 1|1 1|1 1|1 1 1.4   owner 0: 5.4    owner 1: 4
                                            0 1 1|1 1 1|1 1|1 1.4   owner 0: 4.4    owner 1: 5
    """
    best, count, parts = cut_balanced(weights, len(owners)), len(weights), len(owners)
    if len(set(owners)) == parts:
        return best
    sums = list(accumulate(weights, initial=0))

    def price(bounds: Sequence[int]) -> tuple[int, int, int, int]:
        loads = dict.fromkeys(owners, 0)
        sizes = [sums[b] - sums[a] for a, b in pairwise(bounds)]
        for owner, size in zip(owners, sizes, strict=True):
            loads[owner] += size
        return max(loads.values()), max(sizes), sum(x * x for x in loads.values()), sum(x * x for x in sizes)

    if comb(count - 1, parts - 1) <= _ALL:
        return min(((0, *inner, count) for inner in combinations(range(1, count), parts - 1)), key=price)
    paid = price(best)
    while better := next((moved for moved in _moved(best) if price(moved) < paid), None):
        best, paid = better, price(better)
    return best


def _moved(bounds: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The cuts in which one weight more is in one part, and one less in another."""
    parts = len(bounds) - 1
    for first in range(1, parts):
        for last in range(first, parts):
            for step in (-1, 1):
                moved = (*bounds[:first], *(b + step for b in bounds[first : last + 1]), *bounds[last + 1 :])
                if moved[first - 1] < moved[first] and moved[last] < moved[last + 1]:
                    yield moved


def cut_evenly(count: int, parts: int) -> tuple[int, ...]:
    """Bounds of ``parts`` runs of ``count`` items whose lengths differ by at most one, the longer ones first."""
    if not 1 <= parts <= count:
        raise ValueError(f"cannot cut {count} items into {parts} non-empty parts")
    size, more = divmod(count, parts)
    return tuple(i * size + min(i, more) for i in range(parts + 1))


def _lightest_maximum(weights: Sequence[int], parts: int) -> int:
    """The least possible weight of the heaviest part, by bisection; a greedy filling tests each guess."""
    low, high = max(weights), sum(weights)
    while low < high:
        guess = (low + high) // 2
        if _fits(weights, parts, guess):
            high = guess
        else:
            low = guess + 1
    return low


def _fits(weights: Sequence[int], parts: int, limit: int) -> bool:
    """Whether ``parts`` parts of at most ``limit`` hold all weights.

    Fewer parts than asked also do: a part of two weights or more splits without growing, and there are enough
    weights for all parts.
    """
    used, load = 1, 0
    for weight in weights:
        if load + weight > limit:
            used, load = used + 1, 0
        load += weight
    return used <= parts
