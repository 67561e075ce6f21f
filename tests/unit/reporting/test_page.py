"""The page of a run opens anywhere: no script error, its charts are there, and nothing comes from a network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from zeropipe.reporting.page import plan_page, run_page
from zeropipe.reporting.record import read

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = "<script>alert(1)</script> & \u2603"
PLAN = {
    "world": 2,
    "device": "cpu",
    "memory": 10**9,
    "fits": True,
    "verdict": "fits",
    "peak": 5 * 10**8,
    "seconds": 0.1,
    "samples_per_second": 40.0,
    "parameters": 1000,
    "settings": {"zero_optimization.stage": 2},
    "links": {},
    "ranks": [
        {
            "rank": 0,
            "peak": 4 * 10**8,
            "moment": "backward of layers.3",
            "kinds": {"parameters": 10**8, "activations": 3 * 10**8},
            "resting": {"parameters": 10**8},
            "curve": [[1, 10, "forward"], [2, 4 * 10**8, "backward"]],
            "traffic": [
                {"op": "all_reduce", "label": "", "bytes": 24, "ranks": 2, "phase": "step", "calls": 1}
            ],
        }
    ],
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two ranks, fp16 with a skipped step, a checkpoint, a pipeline's grid, and text that would break a page."""
    for rank in (0, 1):
        rows: list[dict[str, object]] = [
            {
                "kind": "start",
                "time": 0.0,
                "world": 2,
                "settings": {"zero_optimization.stage": 2, "optimizer.type": NASTY},
                "changed": ["optimizer.type"],
                "batch": "4",
                "parameters": 10,
                "environment": {"host": NASTY},
            }
        ]
        rows += [
            {
                "kind": "step",
                "time": 1.0 * step,
                "step": step,
                "samples": 4 * step,
                "skipped": 1,
                "seconds": 0.5,
                "lr": [1e-3, 1e-4],
                "loss_scale": 2.0,
                "memory": {"now": 10**8, "peak": 2 * 10**8},
                "sent": {"all_reduce": 100},
                "loss": None if step == 3 else 1.0 / step,
                "grad_norm": 0.5,
            }
            for step in range(1, 6)
        ]
        rows.append({"kind": "phases", "step": 2, "phases": [["forward", 0.0, 0.1], ["backward", 0.1, 0.3]]})
        grid = [["0F0", 0.0, 1.0], ["0B0", 1.0, 3.0]]
        rows.append({"kind": "grid", "rank": rank, "step": 2, "ran": grid, "planned": grid})
        rows.append({"kind": "save", "step": 5, "tag": "global_step5", "folder": NASTY, "seconds": 0.2})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"record-{rank:05d}.jsonl").write_text(text)
    return tmp_path


def test_what_a_run_says_is_text_on_its_page(run: Path) -> None:
    text = run_page(read(run), PLAN)
    assert "<script>alert(1)" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 3
    assert "global_step5" in text
    assert "backward of layers.3" in text


def test_nothing_is_fetched(run: Path) -> None:
    for text in (run_page(read(run), PLAN), plan_page(PLAN)):
        assert not re.search(r"<(script|link|img|iframe)[^>]*\s(src|href)=", text)
        assert "@import" not in text


@pytest.mark.process
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_draws_every_chart_without_a_network(run: Path, tmp_path: Path) -> None:
    trap = "<script>window.onerror = function(m) { document.title = 'ERROR ' + m; };</script>"
    for name, text, charts in (("run", run_page(read(run), PLAN), 13), ("plan", plan_page(PLAN), 2)):
        path = tmp_path / f"{name}.html"
        path.write_text(text.replace("<head>", f"<head>{trap}", 1))
        assert CHROMIUM is not None
        command = [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--host-resolver-rules=MAP * ~NOTFOUND",
        ]
        command += ["--virtual-time-budget=20000", "--dump-dom", f"file://{path}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=True)
        assert "<title>ERROR" not in done.stdout
        assert (
            len(re.findall(r'<svg class="main-svg"', done.stdout)) >= 2 * charts
        )  # each has a layer for its legend


def test_a_run_that_died_before_its_first_step_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "record-00000.jsonl").write_text(
        '{"kind": "start", "time": 1.0, "settings": {}, "changed": []}\n'
    )
    assert "ended in the middle" in run_page(read(tmp_path))


def test_a_plan_shows_what_lies_beside_the_device_and_the_bubble() -> None:
    rank = {**PLAN["ranks"][0], "resting": {"parameters": 10**8, "host: moments": 2 * 10**9}}  # type: ignore[index]
    text = plan_page({**PLAN, "bubble": 0.25, "ranks": [rank]})
    for word in ("2.00 GB", "25%", "100 ms"):
        assert word in text
    assert "host memory and files" not in plan_page(PLAN)
