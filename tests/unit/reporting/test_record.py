"""What was written is read, however the run ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zeropipe.errors import UsageError
from zeropipe.reporting.record import read


def _write(path: Path, *rows: dict[str, object], torn: str = "") -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)


def _step(step: int, loss: float = 1.0) -> dict[str, object]:
    return {"kind": "step", "step": step, "loss": loss}


def test_a_torn_line_is_dropped_and_counted(tmp_path: Path) -> None:
    _write(
        tmp_path / "record-00000.jsonl", {"kind": "start"}, _step(1), _step(2), torn='{"kind": "step", "st'
    )
    first = read(tmp_path).first
    assert [row["step"] for row in first.steps] == [1, 2]
    assert (first.torn, first.ended) == (1, False)


def test_a_run_that_went_on_has_each_step_once(tmp_path: Path) -> None:
    """Stopped after step 4, resumed from the checkpoint of step 2: steps 3 and 4 are those of the second life."""
    _write(
        tmp_path / "record-00000.jsonl",
        {"kind": "start", "step": 0},
        *(_step(n, loss=n) for n in (1, 2, 3, 4)),
        {"kind": "start", "step": 2},
        *(_step(n, loss=10 * n) for n in (3, 4, 5)),
        {"kind": "end"},
    )
    first = read(tmp_path).first
    assert [(row["step"], row["loss"]) for row in first.steps] == [(1, 1), (2, 2), (3, 30), (4, 40), (5, 50)]
    assert len(first.starts) == 2
    assert first.ended


def test_ranks_come_in_their_order(tmp_path: Path) -> None:
    for rank in (10, 2, 0):
        _write(tmp_path / f"record-{rank:05d}.jsonl", {"kind": "start"}, _step(1))
    assert [rank.number for rank in read(tmp_path).ranks] == [0, 2, 10]


def test_no_record_says_how_to_have_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r'"report": \{"folder"'):
        read(tmp_path)
