"""Shows a run of the pipeline, simulated or measured alike, to lay side by side: as text, trace or picture."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

from zeropipe.comm.collectives import all_gather_object, barrier
from zeropipe.comm.group import Group
from zeropipe.errors import UsageError
from zeropipe.runtime.pipe.instructions import Op, computes
from zeropipe.runtime.pipe.simulate import Event

Tint = tuple[float, float, float]
# How each kind of step is named and painted: a rank's first stage is light, its last one dark.
LOOKS: dict[Op, tuple[str, Tint, Tint]] = {
    Op.FORWARD: ("forward", (0.68, 0.80, 0.94), (0.36, 0.56, 0.82)),
    Op.BACKWARD: ("full backward", (0.99, 0.80, 0.55), (0.93, 0.58, 0.22)),
    Op.BACKWARD_INPUT: ("input gradient", (0.98, 0.74, 0.72), (0.87, 0.45, 0.44)),
    Op.BACKWARD_WEIGHT: ("weight gradient", (0.76, 0.90, 0.72), (0.46, 0.70, 0.42)),
}
_INCH_PER_STEP = 0.24
_WIDTH = 14.0  # inches; a longer run goes on in the next row
_MOST_ROWS = 6
_INCH_PER_LABEL = 0.115  # a micro-batch number of one digit at the smallest size that can be read


def of_all_ranks(mine: list[Event], pipe: Group) -> list[Event]:
    """Every rank's events in one time; collective."""
    barrier(pipe, label="timeline")
    clock = time.perf_counter()  # the same moment on every rank: aligns the clocks of several machines
    everyone = all_gather_object((clock, mine), pipe, label="timeline")
    found = [replace(e, start=e.start - at, end=e.end - at) for at, events in everyone for e in events]
    begin = min((e.start for e in found), default=0.0)
    return [replace(e, start=e.start - begin, end=e.end - begin) for e in found]


def _computed(events: Sequence[Event]) -> tuple[list[Event], dict[tuple[int, int], tuple[int, int]]]:
    """The compute steps, in time since the first one; of each (rank, stage): which of its rank's stages, of how many.

    Transfers and stage instructions are not drawn: their time shows as idle.
    """
    found = [e for e in events if computes(e.step)]
    begin = min((e.start for e in found), default=0.0)
    stages: dict[int, list[int]] = {}
    for rank, stage in sorted({(e.rank, e.step.stage) for e in found}):
        stages.setdefault(rank, []).append(stage)
    places = {(rank, s): (at, len(own)) for rank, own in stages.items() for at, s in enumerate(own)}
    return [replace(e, start=e.start - begin, end=e.end - begin) for e in found], places


def text_grid(events: Sequence[Event], ranks: int, unit: float = 1.0, columns: int | None = None) -> str:
    """One line for each rank, one cell for each ``unit`` of time: ``F3`` is a forward of micro-batch 3.

    A step longer than one cell goes on as dashes; a later chunk of the rank is marked by an apostrophe for each
    chunk before it; dots are idle. A run that is wider than ``columns`` characters goes on below, like text.
    """
    cells: list[dict[int, str]] = [{} for _ in range(ranks)]
    computed, places = _computed(events)
    length = 0
    for event in computed:
        step = event.step
        first = round(event.start / unit)
        last = max(first + 1, round(event.end / unit))
        cells[event.rank] |= dict.fromkeys(range(first, last), "--")
        cells[event.rank][first] = (
            f"{step.op.value}{step.micro_batch}" + "'" * places[event.rank, step.stage][0]
        )
        length = max(length, last)
    # All cells are as wide as the widest label, so that columns are moments.
    width = max((len(label) for line in cells for label in line.values()), default=1)
    head = len(str(ranks - 1))
    fit = max(length, 1) if columns is None else max(1, (columns - head - len(" | ") + 1) // (width + 1))
    blocks = []
    for start in range(0, max(length, 1), fit):
        shown = range(start, min(start + fit, length))
        rows = (" ".join(line.get(at, ".").ljust(width) for at in shown).rstrip() for line in cells)
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
            "cat": LOOKS[e.step.op][0] if computes(e.step) else e.step.op.value,
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


def draw(
    events: Sequence[Event], ranks: int, path: str | PathLike[str], title: str = "", unit: str = "unit cost"
) -> None:
    """Write the run as a picture; the ending of ``path`` chooses PNG, SVG or PDF. Needs matplotlib.

    Numbers in the cells are micro-batches, left out where they would not fit. A long run is wrapped like text.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch, Rectangle
    except ImportError as error:
        raise UsageError(
            "drawing a picture needs matplotlib", fix="pip install 'zeropipe[plot]', or use --trace"
        ) from error
    computed, places = _computed(events)
    if not computed:
        raise UsageError("nothing to draw: no compute step was recorded")
    length = max(e.end for e in computed)
    steps = sorted(e.end - e.start for e in computed if e.end > e.start) or [1.0]
    shortest = max(steps[0], steps[len(steps) // 2] / 2)  # a measured run has a few steps of next to no time
    whole = min(_WIDTH * _MOST_ROWS, max(7.0, length / shortest * _INCH_PER_STEP))
    rows = math.ceil(whole / _WIDTH)
    # Rows break between steps where all steps are multiples of the shortest.
    width, span = whole / rows, math.ceil(length / rows / shortest - 1e-9) * shortest
    figure = Figure(figsize=(width + 0.7, rows * (0.34 * ranks + 0.45) + 0.85), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    inch = width / span
    for row, axes in enumerate(figure.subplots(rows, 1, squeeze=False)[:, 0]):
        first, last = row * span, (row + 1) * span
        for event in computed:
            start, end = event.start, event.end
            if end <= first or start >= last:
                continue
            _, light, dark = LOOKS[event.step.op]
            chunk, chunks = places[event.rank, event.step.stage]
            place = chunk / max(1, chunks - 1)
            tint = tuple(a + (b - a) * place for a, b in zip(light, dark, strict=True))
            low = event.rank - 0.45
            axes.add_patch(Rectangle((start, low), end - start, 0.9, fc=tint, ec="white", lw=0.6))
            # A label that its cell cannot hold is left out; one of a step that goes on in the next row stands where
            # the middle of the step is.
            label, middle = str(event.step.micro_batch), (start + end) / 2
            fits = (end - start) * inch >= _INCH_PER_LABEL * (0.4 + 0.6 * len(label))
            if fits and first <= middle <= last:
                axes.text(middle, event.rank, label, ha="center", va="center", fontsize=7.5)
        axes.set_xlim(first, last)
        axes.set_ylim(ranks - 0.5, -0.5)
        axes.set_yticks(range(ranks), [f"rank {r}" for r in range(ranks)])
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False)
    axes.set_xlabel(f"time ({unit})")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    kinds = [op for op in LOOKS if any(e.step.op is op for e in computed)]
    figure.legend(
        handles=[Patch(facecolor=LOOKS[op][2], label=LOOKS[op][0]) for op in kinds],
        loc="outside lower right",
        ncols=len(kinds),
        frameon=False,
        fontsize=8,
    )
    figure.savefig(path)


def write(events: Sequence[Event], ranks: int, path: str | PathLike[str], title: str) -> None:
    """Measured events, in seconds: as a trace where ``path`` ends in ``.json``, as a picture elsewhere."""
    if str(path).endswith(".json"):
        Path(path).write_text(chrome_trace(events, ranks, microseconds=1e6))
    else:
        draw(events, ranks, path, title, unit="seconds")
