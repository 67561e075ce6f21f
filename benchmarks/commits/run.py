"""Times steps of two checkouts of zeropipe against each other: speed does not change when the code is rebuilt.

    git worktree add /somewhere/old COMMIT
    python -m benchmarks.commits.run --old /somewhere/old

Both sets of ranks live at the same time. They take turns of a few steps, one set computing while the other waits for a
line on its standard input, so that whatever else the machine does falls on both; a turn is compared with the other's
of the same round. Only names that users have are called, so any commit can be the old one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import report

ROOT = Path(__file__).resolve().parents[2]
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
        turns = play(case, {"old": args.old, "new": ROOT}, args, args.port + 2 * number)
        ratios = [new / old for old, new in zip(turns["old"], turns["new"], strict=True)]
        old, new = (statistics.median(turns[who]) * 1e3 for who in ("old", "new"))
        quarters = statistics.quantiles(ratios, n=4)
        rows.append(
            f"| {name} | {old:.2f} | {new:.2f} | {quarters[1]:.3f} | {quarters[0]:.3f} to {quarters[2]:.3f} |"
        )
        numbers[name] = turns
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
    sets = {who: start(tree, case, port + place) for place, (who, tree) in enumerate(trees.items())}
    turns: dict[str, list[float]] = {who: [] for who in trees}
    try:
        for ranks in sets.values():  # their first steps, one set after the other
            turn(ranks, args.warm_up)
        for number in range(args.rounds):
            order = list(sets) if number % 2 else list(sets)[::-1]
            for who in order:
                turns[who].append(turn(sets[who], args.steps))
    finally:
        for rank in (rank for ranks in sets.values() for rank in ranks):
            rank.kill()
            rank.wait()
    return turns


def start(tree: Path, case: dict[str, Any], port: int) -> list[subprocess.Popen[str]]:
    environment = os.environ | {
        "PYTHONPATH": f"{tree / 'src'}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.commits.worker", json.dumps(case)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def turn(ranks: list[subprocess.Popen[str]], steps: int) -> float:
    """Let all ranks make ``steps`` steps; the mean time of one on the slower rank."""
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.write(f"{steps}\n")
        rank.stdin.flush()
    answers = [rank.stdout.readline() if rank.stdout else "" for rank in ranks]
    if not all(answers):
        raise SystemExit("a rank ended; what it said is above")
    return max(map(float, answers))


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
