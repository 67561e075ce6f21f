"""Several rounds, each of every contender once, in turn: what disturbs the machine disturbs them alike.

A time is compared only with another of the same round; over the rounds the median is reported.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common.peers import why_no_deepspeed
from benchmarks.common.worker import MARK

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 900  # seconds for one contender in one round


@dataclass(frozen=True)
class Plan:
    contenders: Sequence[str]
    reference: str  # the contender that the others' times are divided by
    dtypes: Sequence[str]
    size: str
    ranks: int
    rounds: int
    warm_up: int
    steps: int
    peer_python: str  # the interpreter that has the peers (DeepSpeed)
    device: str = "auto"


@dataclass(frozen=True)
class Row:
    """What one contender did in one dtype; times in seconds, memory in bytes, None where it did not run."""

    contender: str
    dtype: str
    seconds: list[float]
    relative: list[float]
    growth: list[int]
    building: list[int]
    gpu_peak: list[int]
    why_not: str = ""


def play(plan: Plan) -> list[Row]:
    """Run everything; a contender that fails is left out of later rounds and says why."""
    console = Console(stderr=True)
    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    failed: dict[tuple[str, str], str] = {}
    if any(contender.startswith("deepspeed") for contender in plan.contenders):
        # Its first start compiles an operation, by all ranks at once: let one process do it, off the clock.
        console.print("preparing deepspeed", highlight=False)
        _run(replace(plan, ranks=1, size="tiny", warm_up=0, steps=1), "deepspeed_0", "fp32")
    for number in range(plan.rounds):
        for dtype in plan.dtypes:
            for contender in plan.contenders:
                key = (contender, dtype)
                if key in failed:
                    continue
                console.print(f"round {number + 1}/{plan.rounds}: {contender} in {dtype}", highlight=False)
                outcome = _run(plan, contender, dtype)
                if isinstance(outcome, str):
                    failed[key] = outcome
                    console.print(f"  left out: {outcome}", highlight=False, markup=False)
                else:
                    results.setdefault(key, []).append(outcome | {"round": number})
    return [
        _row(contender, dtype, results, plan.reference, failed.get((contender, dtype), ""))
        for dtype in plan.dtypes
        for contender in plan.contenders
    ]


def _row(
    contender: str,
    dtype: str,
    results: dict[tuple[str, str], list[dict[str, Any]]],
    reference: str,
    why_not: str,
) -> Row:
    mine = results.get((contender, dtype), [])
    base = {r["round"]: r["seconds"] for r in results.get((reference, dtype), [])}
    return Row(
        contender,
        dtype,
        seconds=[r["seconds"] for r in mine],
        relative=[r["seconds"] / base[r["round"]] for r in mine if r["round"] in base],
        growth=[r["growth"] for r in mine],
        building=[r["building"] for r in mine],
        gpu_peak=[r["gpu_peak"] for r in mine],
        why_not=why_not,
    )


def _run(plan: Plan, contender: str, dtype: str) -> dict[str, Any] | str:
    """One torchrun job; its numbers (the slowest and the largest of the ranks), or the reason why there are none."""
    python = plan.peer_python if contender.startswith("deepspeed") else sys.executable
    if contender.startswith("deepspeed") and (why_not := why_no_deepspeed(python)):
        return why_not
    command = [
        *(python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={plan.ranks}"),
        *("-m", "benchmarks.common.worker", contender, f"--size={plan.size}", f"--dtype={dtype}"),
        *(f"--warm-up={plan.warm_up}", f"--steps={plan.steps}", f"--device={plan.device}"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if plan.device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    try:
        job = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT
        )
    except subprocess.TimeoutExpired:
        return f"took more than {TIME_LIMIT} s"
    lines = [line for line in job.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        errors = [line for line in job.stderr.splitlines() if "Error" in line and "ChildFailed" not in line]
        return errors[0].strip() if errors else f"exit status {job.returncode}"
    ranks = json.loads(lines[-1].removeprefix(MARK))
    return {
        "seconds": max(r["step_seconds"] for r in ranks),
        "growth": max(r["peak_growth"] for r in ranks),
        "building": max(r["growth_while_building"] for r in ranks),
        "gpu_peak": max(r["gpu_peak"] for r in ranks),
    }


def median_or_none(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
