"""What torch's profiler has seen of memory, for any system that runs on torch."""

from typing import Any

from torch.profiler import profile


def allocated_peak(made: profile) -> int:
    """The most bytes that torch's CPU allocator had given out at once."""
    results: Any = made.profiler.kineto_results  # type: ignore[union-attr]
    found, left = [], list(results.experimental_event_tree())
    while left:
        event = left.pop()
        left += event.children
        if hasattr(event.extra_fields, "alloc_size"):
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    # The profiler's own total knows nothing of what threads free that it does not watch; where memory is given out
    # again, it had been freed.
    most, now, alive = 0, 0, dict[int, int]()
    for _, where, size in sorted(found):
        now -= alive.pop(where, 0)
        if size > 0:
            alive[where] = size
            now += size
        most = max(most, now)
    return most
