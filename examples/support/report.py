"""What the example shows: one progress bar while training, two tables, a text and a picture at the end."""

import hashlib
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from torch import Tensor

from support.text import shown

History = list[
    dict[str, float]
]  # one row a step: step, loss, and held_out where it was measured (both in bits)


class Board:
    """The progress bar; silent on every rank but the first, plain lines where there is no terminal."""

    def __init__(self, total: int, history: History, active: bool) -> None:
        self.history, self.active, self.total = history, active, total
        self.tokens, self.began = 0, time.perf_counter()
        columns = [
            TextColumn("step {task.completed}/{task.total}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None),  # takes the room that the numbers leave
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
        ]
        self.console = Console()
        hidden = not (active and self.console.is_terminal)
        self.bar = Progress(*columns, console=self.console, disable=hidden, expand=True)
        self.task = self.bar.add_task("", total=total, completed=len(history))
        if history and active:
            self.console.print(f"Going on from the checkpoint of step {len(history)}.")

    def __enter__(self) -> "Board":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def add(self, row: dict[str, float], tokens: int) -> None:
        """Add one step's row to the history and show it; `tokens` counts all ranks."""
        self.history.append(row)
        self.tokens += tokens
        if not self.active:
            return
        held_out = next((f"{r['held_out']:.3f}" for r in reversed(self.history) if "held_out" in r), "-")
        recent = [r["loss"] for r in self.history[-20:]]
        line = (
            f"loss {sum(recent) / len(recent):.3f}  held-out {held_out} bits/byte  "
            f"{self.tokens / (time.perf_counter() - self.began):,.0f} tokens/s  {peak_memory() / 2**20:,.0f} MiB"
        )
        self.bar.update(self.task, description=line, completed=len(self.history))
        if not self.console.is_terminal and len(self.history) % max(1, self.total // 20) == 0:
            self.console.print(f"step {len(self.history)}/{self.total}  {line}", soft_wrap=True)


def peak_memory() -> int:
    """The most bytes that this process has had resident at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def traffic(events: Iterable[Any]) -> list[list[Any]]:
    """Recorded communication as rows of (operation, what for, calls, bytes)."""
    calls: Counter[tuple[str, str]] = Counter()
    size: Counter[tuple[str, str]] = Counter()
    for event in events:
        calls[event.op, event.label] += 1
        size[event.op, event.label] += event.bytes
    return [[op, label, calls[op, label], size[op, label]] for op, label in calls]


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table whose first column is words and whose numbers stand to the right, with thousands separated."""
    result = Table(title=title, title_justify="left")
    for column in columns:
        result.add_column(column)
    for row in rows:
        result.add_row(*(f"{cell:,}".rjust(14) if isinstance(cell, int) else str(cell) for cell in row))
    return result


def summary(
    memory: Sequence[Sequence[Any]],
    state: dict[str, Any],
    sample: bytes,
    weights: dict[str, Tensor],
    curve: str,
) -> str:
    """Everything that a finished run shows, as text; `memory` has every rank's `engine.memory_report()`."""
    last = state["history"][-1]
    parts = [
        _memory_table(memory),
        table("Communication of one step, on each rank", ("", "for", "calls", "bytes"), state["traffic"]),
        "A sample:",
        shown(sample),
        "",
        f"Step {last['step']}: {last['held_out']:.3f} bits per byte on held-out text.",
        curve,
        f"Weights (SHA-256): {digest(weights)}",
    ]
    return as_text(parts)


def _memory_table(ranks: Sequence[Sequence[Any]]) -> Table:
    columns = ("", *(f"rank {rank}" for rank in range(len(ranks))), "formula", "ratio")
    rows = []
    for kinds in zip(*ranks, strict=True):  # one kind of bytes, on each rank
        worst = max(row.ratio for row in kinds)
        rows.append((kinds[0].kind, *(row.bytes for row in kinds), kinds[0].formula, f"{worst:.3f}"))
    return table("Bytes per rank", columns, rows)


def digest(weights: dict[str, Tensor]) -> str:
    """The same for two runs only if every bit of every weight is the same."""
    total = hashlib.sha256()
    for name, tensor in weights.items():
        total.update(name.encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:32]


def as_text(parts: Iterable[object]) -> str:
    """What rich would print, as a string of at most 110 columns."""
    console = Console(width=110)
    with console.capture() as capture:
        for part in parts:
            console.print(part, markup=False, highlight=False)
    return capture.get()


def loss_curve(history: History, path: Path) -> str:
    """Save the picture and say where it is, or what to install for it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "No loss curve: matplotlib is not installed (pip install matplotlib)."
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [row["step"] for row in history]
    axes.plot(steps, [row["loss"] for row in history], linewidth=0.6, alpha=0.6, label="training batch")
    held_out = [row for row in history if "held_out" in row]
    axes.plot(
        [r["step"] for r in held_out], [r["held_out"] for r in held_out], marker=".", label="held-out text"
    )
    axes.set(
        xlabel="step",
        ylabel="bits per byte",
        ylim=(0, min(8.5, max(r["loss"] for r in history))),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return f"Loss curve: {path}"
