"""What the engine adds to a step at world 1: the plain PyTorch loop, zeropipe and DeepSpeed in one process.

    python -m benchmarks.engine_overhead.run         # in an environment that also has deepspeed, to see it beside

The contenders take turns step by step in short turns, so that whatever else the machine does falls on all of them;
a turn is compared with the plain loop's turn of the same round. Writes results.md and results.json (or to --out).
"""

import argparse
import importlib.util
import os
import statistics
import time
from pathlib import Path

import torch

import zeropipe
from benchmarks.common import report
from benchmarks.common.contenders import CONTENDERS, Step, Task
from benchmarks.common.model import GPT, SIZES, Size, batch

PROCESS_OF_ITS_OWN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
SIZES_SHOWN = ("tiny", "10M")


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    os.environ.update(PROCESS_OF_ITS_OWN | {"MASTER_PORT": str(args.port)})
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    zeropipe.init_distributed("gloo")
    lines = [
        "| model | contender | step, microseconds | added, microseconds | added, % |",
        "|---|---|---:|---:|---:|",
    ]
    numbers = {}
    for name in SIZES_SHOWN:
        turns = play(SIZES[name], contenders(), args)
        added = {
            who: statistics.median(
                mine - plain for mine, plain in zip(turns[who], turns["plain"], strict=True)
            )
            for who in turns
        }
        base = statistics.median(turns["plain"])
        for who, seconds in turns.items():
            middle = statistics.median(seconds)
            lines.append(
                f"| {name} | {who} | {middle * 1e6:.0f} | {added[who] * 1e6:+.0f} | {added[who] / base:+.1%} |"
            )
        numbers[name] = turns
    if importlib.util.find_spec("deepspeed") is None:
        lines.append("\nDeepSpeed was left out: this interpreter does not have it.")
    report.write(
        args.out, "What the engine adds to a step, in one process", "\n".join(lines), {"turns": numbers}
    )


def contenders() -> list[str]:
    peers = ["deepspeed_0"] if importlib.util.find_spec("deepspeed") else []
    return ["plain", "zeropipe_0", "zeropipe_2", *peers]


def play(size: Size, names: list[str], args: argparse.Namespace) -> dict[str, list[float]]:
    """Mean seconds of a step in every turn, by contender."""
    device = torch.device("cpu")

    def make_model() -> GPT:
        torch.manual_seed(0)
        return GPT(size)

    steps: dict[str, Step] = {
        n: CONTENDERS[n](Task(make_model, "fp32", device, size.micro_batch)) for n in names
    }
    x, y = batch(size, 0, device)
    for step in steps.values():
        for _ in range(args.warm_up):
            step(x, y)
    turns: dict[str, list[float]] = {name: [] for name in names}
    # As many steps in a turn as fill about `turn_seconds`: tiny steps need many, large ones few.
    start = time.perf_counter()
    steps["plain"](x, y)
    count = max(1, round(args.turn_seconds / (time.perf_counter() - start)))
    for number in range(args.rounds):
        # Each round begins with another contender: none is always the one after a costly neighbour.
        for name in names[number % len(names) :] + names[: number % len(names)]:
            step = steps[name]
            start = time.perf_counter()
            for _ in range(count):
                step(x, y)
            turns[name].append((time.perf_counter() - start) / count)
    return turns


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--turn-seconds", type=float, default=0.1)
    parser.add_argument("--port", type=int, default=29591)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    return parser.parse_args()


if __name__ == "__main__":
    main()
