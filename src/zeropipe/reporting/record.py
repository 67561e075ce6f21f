"""Reads the record of a run (``runtime/engine/recorder.py`` writes it): pure, but for the files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zeropipe.errors import UsageError


@dataclass(slots=True)
class RankRecord:
    """What one rank has written, in the order of the run; a step that was made twice (after a crash) stands once."""

    number: int
    starts: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    phases: list[dict[str, Any]] = field(default_factory=list)
    grids: list[dict[str, Any]] = field(default_factory=list)  # of a pipeline
    saves: list[dict[str, Any]] = field(default_factory=list)
    ended: bool = False
    torn: int = 0  # lines that a crash has left in half


@dataclass(frozen=True, slots=True)
class Run:
    """The record of all ranks, by rank."""

    folder: Path
    ranks: list[RankRecord]

    @property
    def first(self) -> RankRecord:
        return self.ranks[0]

    @property
    def start(self) -> dict[str, Any]:
        """The latest start: settings and environment."""
        return self.first.starts[-1] if self.first.starts else {}


def read(folder: str | Path) -> Run:
    """The record in ``folder``. Raises UsageError where there is none."""
    folder = Path(folder)
    files = sorted(folder.glob("record-*.jsonl"))
    if not files:
        raise UsageError(
            "zeropipe report: no record of a run",
            expected="files record-00000.jsonl",
            found=f"none in {folder}",
            fix='train with the configuration "report": {"folder": "..."}, and name that folder',
        )
    return Run(folder, [_read_rank(path) for path in files])


def _read_rank(path: Path) -> RankRecord:
    found = RankRecord(int(path.stem.partition("-")[2]))
    steps: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            kind = row["kind"]
        except (ValueError, KeyError, TypeError):
            found.torn += 1
            continue
        if kind == "start":
            found.starts.append(row)
            found.ended = False
            # What was done after the checkpoint from which it went on is done again.
            steps = {step: old for step, old in steps.items() if step <= row.get("step", 0)}
        elif kind == "step":
            steps[row["step"]] = row
        elif kind == "phases":
            found.phases.append(row)
        elif kind == "grid":
            found.grids.append(row)
        elif kind == "save":
            found.saves.append(row)
        elif kind == "end":
            found.ended = True
    found.steps = [steps[step] for step in sorted(steps)]
    return found
