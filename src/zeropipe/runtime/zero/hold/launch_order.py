"""The order in which a pass launches its buckets: the same on all ranks, and close to the order of backward.

A bucket that is complete early but launched late holds its gradients until then. Models register their modules
in the order of forward more often than not, so the first pass launches from the last parameter to the first.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

Key = tuple[int, int]  # (store, bucket of the store)


def launch_order(
    buckets: Sequence[int], late: Collection[Key] = (), learned: Sequence[Key] = ()
) -> tuple[Key, ...]:
    """The launch order of stores with ``buckets[s]`` buckets each.

    ``learned``: the buckets that a backward completed, in its order; they come first, the others as they were.
    ``late``: buckets that many a backward does not complete (experts that got no token); they come last, so that
    none of the others waits for them.
    """
    default = [(store, bucket) for store in reversed(range(len(buckets))) for bucket in range(buckets[store])]
    place = {key: at for at, key in enumerate(learned)}
    return tuple(sorted(default, key=lambda key: (key in late, place.get(key, len(place)))))
