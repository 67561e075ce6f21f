"""Shows a run of the pipeline as text and as a trace that browsers open; simulated and measured runs alike."""

from __future__ import annotations

import json
from collections.abc import Sequence

from zeropipe.runtime.pipe.instructions import COMPUTE, Op
from zeropipe.runtime.pipe.simulate import Event

MARKS = {Op.FORWARD: "F", Op.BACKWARD: "B", Op.BACKWARD_INPUT: "I", Op.BACKWARD_WEIGHT: "W"}
NAMES = {
    Op.FORWARD: "forward",
    Op.BACKWARD: "full backward",
    Op.BACKWARD_INPUT: "input gradient",
    Op.BACKWARD_WEIGHT: "weight gradient",
}


def text_grid(events: Sequence[Event], ranks: int, unit: float = 1.0, columns: int | None = None) -> str:
    """One line for each rank, one cell for each ``unit`` of time: ``F3`` is a forward of micro-batch 3.

    A step longer than one cell goes on as dashes; a later chunk of the rank is marked by an apostrophe for each
    chunk before it; dots are idle. A run that is wider than ``columns`` characters goes on below, like text.
    """
    computed = [e for e in events if e.step.op in COMPUTE]
    begin = min((e.start for e in computed), default=0.0)
    cells: list[dict[int, str]] = [{} for _ in range(ranks)]
    chunk: dict[int, int] = {}  # which of its rank's stages a stage is
    for rank in range(ranks):
        stages = sorted({e.step.stage for e in computed if e.rank == rank})
        chunk |= {stage: place for place, stage in enumerate(stages)}
    length = 0
    for event in computed:
        first = round((event.start - begin) / unit)
        last = max(first + 1, round((event.end - begin) / unit))
        label = f"{MARKS[event.step.op]}{event.step.micro_batch}" + "'" * chunk[event.step.stage]
        for at in range(first, last):
            cells[event.rank][at] = label if at == first else "--"
        length = max(length, last)
    width = max((len(label) for line in cells for label in line.values()), default=1)
    head = len(str(ranks - 1))
    fit = max(length, 1) if columns is None else max(1, (columns - head - len(" | ") + 1) // (width + 1))
    blocks = []
    for start in range(0, max(length, 1), fit):
        places = range(start, min(start + fit, length))
        rows = (" ".join(line.get(at, ".").ljust(width) for at in places).rstrip() for line in cells)
        blocks.append("\n".join(f"{rank:>{head}} | {row}" for rank, row in enumerate(rows)))
    return "\n\n".join(blocks)


def chrome_trace(events: Sequence[Event], ranks: int, microseconds: float = 1000.0) -> str:
    """The events as Chrome's trace JSON (also read by Perfetto), one row for each rank.

    ``microseconds``: length of one unit of the events' time.
    """
    rows: list[dict[str, object]] = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": {"name": f"pipeline rank {rank}"}}
        for rank in range(ranks)
    ]
    rows += [
        {
            "name": str(e.step),
            "cat": NAMES.get(e.step.op, e.step.op.value),
            "ph": "X",
            "pid": 0,
            "tid": e.rank,
            "ts": e.start * microseconds,
            "dur": (e.end - e.start) * microseconds,
            "args": {"stage": e.step.stage, "micro_batch": e.step.micro_batch},
        }
        for e in events
    ]
    return json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"}, indent=None)
