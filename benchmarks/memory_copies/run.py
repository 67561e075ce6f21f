"""What copies in memory cost a step that nothing disturbs.

    python -m benchmarks.memory_copies.run [--rounds 8] [--steps 4]

The GPT of 34 M parameters on two ranks, its batch that of ``benchmarks/data_parallel``. One engine takes turns of a few
steps with a copy after every one and without, and what a copy leaves to the next step is waited for before its turn
ends; a turn is compared with the one beside it. To hold: at most 1.03 of the time without.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import report
from benchmarks.common.contenders import LEARNING_RATE
from benchmarks.common.model import GPT, SIZES, batch

ROOT = Path(__file__).resolve().parents[2]
MARK = "MEMORY COPIES "


def main() -> None:
    args = arguments()
    if "RANK" in os.environ:
        worker(args)
    else:
        measure(args)


def measure(args: argparse.Namespace) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command += ["benchmarks.memory_copies.run", *sys.argv[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    found = [
        json.loads(line.removeprefix(MARK)) for line in done.stdout.splitlines() if line.startswith(MARK)
    ]
    lines = [
        "| stage | dtype | step, ms | with copies, ms | ratio (median, middle half) | by CPU time | MB a rank |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for one in found:
        cells = [f"{statistics.median(one['clock'][who]) * 1e3:.0f}" for who in ("without", "with")]
        ratios, cpu = (ratios_of(one[kind]) for kind in ("clock", "cpu"))
        quarters = statistics.quantiles(ratios, n=4)
        spread = f"{quarters[1]:.3f} ({quarters[0]:.3f} to {quarters[2]:.3f})"
        cells += [spread, f"{statistics.median(cpu):.3f}", f"{one['bytes'] / 1e6:.0f}"]
        lines.append(f"| {one['stage']} | {one['dtype']} | " + " | ".join(cells) + " |")
    report.write(args.out, "Copies in memory: what they cost", "\n".join(lines), {"turns": found})


def ratios_of(seconds: dict[str, list[float]]) -> list[float]:
    return [copied / plain for plain, copied in zip(seconds["without"], seconds["with"], strict=True)]


def worker(args: argparse.Namespace) -> None:
    import zeropipe

    torch.set_num_threads(1)
    zeropipe.init_distributed("gloo")
    size, device = SIZES[args.size], torch.device("cpu")
    for stage in args.stages:
        for dtype in args.dtypes:
            torch.manual_seed(0)
            model = GPT(size)
            config: dict[str, Any] = {
                "train_micro_batch_size_per_gpu": size.micro_batch,
                "gradient_clipping": 0.0,
                "zero_optimization": {"stage": stage},
                "bf16": {"enabled": dtype == "bf16"},
                "checkpoint": {"memory": {"every": 1}},
            }
            optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
            engine = zeropipe.initialize(model=model, optimizer=optimizer, config=config)[0]
            found = {"stage": stage, "dtype": dtype, **turns(engine, size, device, args)}
            engine.destroy()
            del engine, model, optimizer
            if dist.get_rank() == 0:
                print(MARK + json.dumps(found), flush=True)


def turns(engine: Any, size: Any, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    engine.stopping.leave_to_caller()
    seconds: dict[str, dict[str, list[float]]] = {k: {"without": [], "with": []} for k in ("clock", "cpu")}
    number = 0
    for turn in range(-1, args.rounds):
        # Who begins changes from round to round.
        for who in ("without", "with") if turn % 2 else ("with", "without"):
            dist.barrier()
            clock, cpu = time.perf_counter(), time.process_time()
            for _ in range(args.steps):
                number += 1
                x, y = batch(size, number * dist.get_world_size() + dist.get_rank(), device)
                engine.backward(engine(x, y))
                engine.step()
                if who == "with":
                    engine.copies.take()
            engine.copies.settle()
            dist.barrier()
            if turn >= 0:  # the first is a warm-up
                seconds["clock"][who].append((time.perf_counter() - clock) / args.steps)
                seconds["cpu"][who].append((time.process_time() - cpu) / args.steps)
    folder = engine.copies.shelf().folder
    largest = max(path.stat().st_size for path in folder.iterdir())
    return {"bytes": largest, **seconds}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", choices=SIZES, default="34M")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--dtypes", nargs="+", default=["fp32"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    return parser.parse_args()


if __name__ == "__main__":
    main()
