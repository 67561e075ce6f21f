"""`make gpu DEVICE=cpu`: the script for a machine with a GPU works here: what it measures and what it leaves out."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import start

ROOT = Path(__file__).resolve().parents[2]


def run(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--device", "cpu", "--out", str(out), *arguments]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


def found(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_it_measures_every_contender_and_leaves_a_trace(tmp_path):
    some = ("--contenders", "plain", "fsdp2", "zeropipe_3")
    for part in ("steps, tiny", "trace", "largest, offloaded"):
        done = run(tmp_path / part[:5], "--only", part, *some)
        assert done.returncode == 0, done.stderr
    steps = found(tmp_path / "steps")["steps"]["tiny"]["rows"]
    for who in ("plain", "fsdp2", "zeropipe_3"):
        assert len(steps[who]["seconds"]) == 3, steps[who]
        assert steps[who]["training"] > 0
    assert steps["plain"]["relative"] == [1.0] * 3
    assert found(tmp_path / "trace")["trace"]["host_ms"] > 0
    events = json.loads(gzip.decompress((tmp_path / "trace" / "trace.json.gz").read_bytes()))["traceEvents"]
    assert any(event.get("name") == "aten::addmm" for event in events)
    tries = found(tmp_path / "large")["largest"]["host"]
    assert [each["loss_is_finite"] for each in tries] == [True, True]


def test_what_there_is_no_time_for_is_named(tmp_path):
    done = run(tmp_path, "--minutes", "0.1")
    assert done.returncode == 0, done.stderr
    left = found(tmp_path)["left out"]
    assert [line.partition(":")[0] for line in left] == [
        *("tests", "steps, tiny", "trace", "steps, 10M"),
        *("largest, on the device", "largest, offloaded"),
    ]
    assert "6 s were left, it takes 30" in left[0] or "5 s were left, it takes 30" in left[0]
    assert left[0] in (tmp_path / "results.md").read_text()


def test_stopped_by_hand_it_writes_down_what_it_has(tmp_path):
    """It lost all parts that were done."""
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--device", "cpu", "--out", str(tmp_path)]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    with start([*command, "--only", "trace"], env={"PYTHONPATH": path}, cwd=ROOT) as running:
        assert running.wait_for("left] trace", 100), running.stderr()
        running.process.send_signal(signal.SIGINT)
        assert running.wait(60)
        assert running.process.returncode == 130, running.stderr()
    assert found(tmp_path)["left out"] == ["what came after it was stopped by hand"]


def test_without_a_gpu_it_says_how_to_run_without_one(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.run", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode != 0
    assert "make gpu DEVICE=cpu" in done.stderr


def test_what_an_interpreter_lacks_is_named_with_the_way_out(tmp_path):
    """Stands for an interpreter without rich: an import of it fails."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'rich' else find(name, package)\n"
    )
    done = run(tmp_path, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT / "src"), str(ROOT)]))
    assert done.returncode != 0
    assert "has no rich" in done.stderr
    assert "make gpu PACKAGES=folder" in done.stderr
