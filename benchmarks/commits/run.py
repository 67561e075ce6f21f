"""Times steps of two checkouts of zeropipe against each other: speed does not change when the code is rebuilt.

    git worktree add /somewhere/old COMMIT
    python -m benchmarks.commits.run --old /somewhere/old

Both sets of ranks live at the same time and take turns (`benchmarks/common/turns.py`). Only names that users have are
called, so any commit can be the old one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import report, turns

CASES = {
    "stage 0, GPT": {"stage": 0},
    "stage 1, GPT": {"stage": 1},
    "stage 2, GPT": {"stage": 2},
    "stage 3, GPT": {"stage": 3},
    "stage 3, GPT, bf16": {"stage": 3, "bf16": True},
    "stage 1, 1,000 small tensors": {"stage": 1, "model": "many"},
    "stage 3, 200 small layers": {"stage": 3, "model": "layers"},
    "pipeline 1f1b, 2 stages": {"stage": 1, "model": "pipeline"},
    "1-bit Adam, compressed": {"stage": 0, "optimizer": "OneBitAdam"},
}


def main() -> None:
    args = arguments()
    rows, numbers = [], {}
    for number, (name, case) in enumerate(CASES.items()):
        if args.only and args.only not in name:
            continue
        seconds = play(case, {"old": args.old, "new": turns.ROOT}, args, args.port + 2 * number)
        ratios = [new / old for old, new in zip(seconds["old"], seconds["new"], strict=True)]
        old, new = (statistics.median(seconds[who]) * 1e3 for who in ("old", "new"))
        quarters = statistics.quantiles(ratios, n=4)
        rows.append(
            f"| {name} | {old:.2f} | {new:.2f} | {quarters[1]:.3f} | {quarters[0]:.3f} to {quarters[2]:.3f} |"
        )
        numbers[name] = seconds
        print(rows[-1], file=sys.stderr)
    head = [
        "| case (2 ranks) | old, ms | new, ms | new / old, median | middle half |",
        "|---|---:|---:|---:|---:|",
    ]
    of = subprocess.run(
        ["git", "-C", args.old, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    body = f"Old: commit {of.stdout.strip() or 'unknown'}.\n\n" + "\n".join([*head, *rows])
    report.write(args.out, "A step before and after a change of the code", body, {"turns": numbers})


def play(
    case: dict[str, Any], trees: dict[str, Path], args: argparse.Namespace, port: int
) -> dict[str, list[float]]:
    """Seconds of a step in every turn, by tree."""
    sets = {}
    try:
        for place, (who, tree) in enumerate(trees.items()):
            path = {"PYTHONPATH": f"{tree / 'src'}{os.pathsep}{turns.ROOT}", "OMP_NUM_THREADS": "1"}
            command = turns.python("benchmarks.commits.worker", json.dumps(case))
            sets[who] = turns.start(command, 2, port + place, path)
        return turns.play(sets, rounds=args.rounds, warm_up=args.warm_up, steps=args.steps, lost=gone)
    finally:
        turns.end(sets)


def gone(who: str) -> None:
    raise SystemExit(f"a rank of the {who} tree ended; what it said is above")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--old", type=Path, required=True, help="folder of the other checkout")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--warm-up", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn")
    parser.add_argument("--port", type=int, default=29640)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    args.old = args.old.resolve()
    return args


if __name__ == "__main__":
    main()
