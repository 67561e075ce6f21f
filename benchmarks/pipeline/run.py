"""The same GPT cut into stages by zeropipe, torch.distributed.pipelining and DeepSpeed, in turn.

    python -m benchmarks.pipeline.run                            # 2 gloo ranks, 8 micro-batches of 2 x 128 tokens
    python -m benchmarks.pipeline.run --ranks 4 --rounds 1
    python -m benchmarks.pipeline.run --peer-python /path/to/environment-with-deepspeed/bin/python

All cut the model in the same places, but those named ``:profile``, where zeropipe cuts it by what it measures.
Writes results.md and results.json beside this file (or to --out).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common import report
from benchmarks.common.model import SIZES
from benchmarks.common.rounds import ROOT
from benchmarks.common.worker import MARK
from zeropipe.runtime.pipe.schedule import default_chunks, make_schedule
from zeropipe.runtime.pipe.simulate import simulate

REFERENCE = "torch_1f1b"
CONTENDERS = [
    REFERENCE,
    "torch_interleaved",
    "torch_interleaved-zb",
    "torch_zbv",
    "zeropipe_gpipe",
    "zeropipe_1f1b",
    "zeropipe_interleaved",
    "zeropipe_zb-h1",
    "zeropipe_interleaved-zb",
    "zeropipe_zbv",
    "zeropipe_1f1b:profile",
    "zeropipe_zbv:profile",
    "deepspeed_1f1b",
]
TIME_LIMIT = 600  # seconds for one contender in one round


def main() -> None:
    args = arguments()
    console = Console(stderr=True)
    found: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    for number in range(args.rounds):
        for name in args.only or CONTENDERS:
            if name in failed:
                continue
            console.print(f"round {number + 1}/{args.rounds}: {name}", highlight=False)
            outcome = run(args, name)
            if isinstance(outcome, str):
                failed[name] = outcome
                console.print(f"  left out: {outcome}", highlight=False, markup=False)
            else:
                found.setdefault(name, []).append(outcome | {"round": number})
    report.write(
        args.out,
        f"Pipeline: one step of the {args.size} GPT on {args.ranks} ranks, {args.micro_batches} micro-batches",
        table(found, failed, args.ranks, args.micro_batches),
        {"results": found, "failed": failed},
    )


def run(args: argparse.Namespace, name: str) -> dict[str, Any] | str:
    """One torchrun job; the slowest and the largest rank's numbers, or the reason why there are none."""
    python = args.peer_python if name.startswith("deepspeed") else sys.executable
    command = [
        *(python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"),
        *("-m", "benchmarks.pipeline.worker", name, f"--size={args.size}"),
        *(f"--micro-batch={args.micro_batch}", f"--micro-batches={args.micro_batches}"),
        *(f"--warm-up={args.warm_up}", f"--steps={args.steps}"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
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
        "bubble": ranks[0]["bubble"],
    }


def table(
    found: dict[str, list[dict[str, Any]]], failed: dict[str, str], ranks: int, micro_batches: int
) -> str:
    """Markdown; times of the same round are compared, and the medians of rounds are shown."""
    base = {one["round"]: one["seconds"] for one in found.get(REFERENCE, [])}
    lines = [
        f"| contender | step, s | relative to {REFERENCE} | peak growth, MB | bubble, measured | bubble, unit costs |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, rows in found.items():
        schedule = name.partition("_")[2].partition(":")[0]
        relative = [one["seconds"] / base[one["round"]] for one in rows if one["round"] in base]
        bubbles = [one["bubble"] for one in rows if one["bubble"] is not None]
        plan = simulate(make_schedule(schedule, ranks, micro_batches, default_chunks(schedule)))
        lines.append(
            f"| {name} | {statistics.median(one['seconds'] for one in rows):.3f} "
            f"| {statistics.median(relative) if relative else float('nan'):.3f} "
            f"| {statistics.median(one['growth'] for one in rows) / 1e6:.0f} "
            f"| {f'{statistics.median(bubbles):.3f}' if bubbles else '-'} | {plan.bubble:.3f} |"
        )
    lines += [f"| {name} | not run: {why} | | | | |" for name, why in failed.items()]
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each contender in each round")
    parser.add_argument("--only", nargs="+", metavar="CONTENDER", help=f"some of: {' '.join(CONTENDERS)}")
    parser.add_argument("--size", choices=SIZES, default="34M")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has deepspeed")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    return parser.parse_args()


if __name__ == "__main__":
    main()
