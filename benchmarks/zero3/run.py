"""DDP, FSDP2, DeepSpeed 3 and zeropipe 3 on the same GPT, in turn; memory while building, and a model that
does not fit.

    python -m benchmarks.zero3.run                               # two gloo ranks, one thread each
    python -m benchmarks.zero3.run --device auto --ranks 1 --size 1.3B --dtypes bf16        # one GPU
    python -m benchmarks.zero3.run --peer-python /path/to/environment-with-deepspeed/bin/python

Writes results.md and results.json beside this file (or to --out).
"""

import argparse
import sys
from pathlib import Path

from benchmarks.common import report
from benchmarks.common.model import GPT, SIZES
from benchmarks.common.rounds import Plan, play
from benchmarks.zero3 import limited

CONTENDERS = ["ddp", "zeropipe_3", "zeropipe_3_init", "fsdp2", "fsdp2_no_reshard", "deepspeed_3"]
STATE_BYTES = {"fp32": 16, "bf16": 14}  # per parameter, over all ranks (docs/architecture.md)


def main() -> None:
    args = arguments()
    plan = Plan(
        contenders=args.only or CONTENDERS,
        reference="ddp",
        dtypes=args.dtypes,
        size=args.size,
        ranks=args.ranks,
        rounds=args.rounds,
        warm_up=args.warm_up,
        steps=args.steps,
        peer_python=args.peer_python,
        device=args.device,
    )
    rows = play(plan)
    parameters = sum(p.numel() for p in GPT(SIZES[args.size]).parameters())
    formula = [
        f"- {dtype}: {STATE_BYTES[dtype]} bytes x {parameters / 1e6:.1f} M parameters / {args.ranks} ranks = "
        f"{STATE_BYTES[dtype] * parameters / args.ranks / 1e6:.0f} MB"
        for dtype in args.dtypes
    ]
    parts = [
        report.table(rows, "ddp", gpu=args.device != "cpu"),
        "State of stage 3 by the formula, without activations and gathered units:\n" + "\n".join(formula),
    ]
    numbers = {"parameters": parameters, "rows": report.as_numbers(rows)}
    if args.limited:
        outcomes = limited.play()
        parts.append(limited.table(outcomes))
        numbers["limited"] = [outcome.numbers() for outcome in outcomes]
    report.write(args.out, "ZeRO stage 3: time and memory of one step", "\n\n".join(parts), numbers)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=3, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each contender in each round")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--device", choices=("cpu", "auto"), default="cpu", help="auto: GPUs where there are some"
    )
    parser.add_argument("--dtypes", nargs="+", choices=STATE_BYTES, default=["fp32", "bf16"])
    parser.add_argument("--only", nargs="+", metavar="CONTENDER", help=f"some of: {' '.join(CONTENDERS)}")
    parser.add_argument("--size", choices=SIZES, default="34M")
    parser.add_argument(
        "--limited", action=argparse.BooleanOptionalAction, default=True, help=limited.__doc__
    )
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has deepspeed")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    return parser.parse_args()


if __name__ == "__main__":
    main()
