"""``log_summary``: what the section ``comms_logger`` has counted, as a table."""

from __future__ import annotations

from rich.console import Console

from zeropipe.comm.collectives import all_gather_object
from zeropipe.comm.group import world
from zeropipe.comm.record import SEAM


def log_summary(show_straggler: bool = False) -> None:
    """Print, on rank 0, how often each operation ran at each size, how long it took and how fast it was.

    ``show_straggler``: also how long this rank waited beyond the rank that waited least, by operation; collective.
    Nothing was counted unless ``comms_logger.enabled`` is true, or ``SEAM.log.start()`` was called.
    """
    lines = list(SEAM.log.lines())
    if show_straggler:
        totals: dict[str, float] = {}
        for tally in SEAM.log.tallies():
            totals[tally.op] = totals.get(tally.op, 0.0) + tally.seconds
        everyone = all_gather_object(totals, world(), label="log_summary")
        for op, seconds in totals.items():
            least = min(ranks.get(op, 0.0) for ranks in everyone)
            lines.append(f"{op:18} waited {(seconds - least) * 1e3:.2f} ms more than the fastest rank")
    if world().rank == 0:
        Console(soft_wrap=True, markup=False, highlight=False).print("\n".join(lines))
