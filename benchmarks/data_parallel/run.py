"""DDP, FSDP2, ZeroRedundancyOptimizer, DeepSpeed 0-2 and zeropipe 0-2 on the same 34 M GPT, in turn.

    python -m benchmarks.data_parallel.run
    python -m benchmarks.data_parallel.run --peer-python /path/to/environment-with-deepspeed/bin/python

Two gloo ranks with one thread each. Writes results.md and results.json beside this file (or to --out).
"""

import argparse
import sys
from pathlib import Path

from benchmarks.common import report
from benchmarks.common.model import GPT, SIZES
from benchmarks.common.rounds import Plan, play

CONTENDERS = [
    "ddp",
    "zeropipe_0",
    "zeropipe_1",
    "zeropipe_2",
    "zero_redundancy_optimizer",
    "fsdp2",
    "fsdp2_no_reshard",
    "deepspeed_0",
    "deepspeed_1",
    "deepspeed_2",
]
# Bytes per parameter and rank at two ranks (docs/data-parallelism.md), for stages 0, 1 and 2.
STATE_BYTES = {"fp32": (16, 12, 10), "bf16": (16, 10, 9)}


def main() -> None:
    args = arguments()
    plan = Plan(
        contenders=args.only or CONTENDERS,
        reference="ddp",
        dtypes=args.dtypes,
        size=args.size,
        ranks=2,
        rounds=args.rounds,
        warm_up=args.warm_up,
        steps=args.steps,
        peer_python=args.peer_python,
        device="cpu",
    )
    rows = play(plan)
    parameters = sum(p.numel() for p in GPT(SIZES[args.size]).parameters())
    formula = [
        f"- zeropipe_{stage} in {dtype}: {per_parameter} bytes x {parameters / 1e6:.1f} M parameters = "
        f"{per_parameter * parameters / 1e6:.0f} MB"
        for dtype in args.dtypes
        for stage, per_parameter in enumerate(STATE_BYTES[dtype])
    ]
    body = report.table(rows, "ddp") + "\n\nState by the formula, without activations:\n" + "\n".join(formula)
    numbers = {"parameters": parameters, "rows": report.as_numbers(rows)}
    report.write(args.out, "Data parallelism: time and memory of one step", body, numbers)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=3, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each contender in each round")
    parser.add_argument("--dtypes", nargs="+", choices=STATE_BYTES, default=["fp32", "bf16"])
    parser.add_argument("--only", nargs="+", metavar="CONTENDER", help=f"some of: {' '.join(CONTENDERS)}")
    parser.add_argument("--size", choices=SIZES, default="34M")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has deepspeed")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    return parser.parse_args()


if __name__ == "__main__":
    main()
