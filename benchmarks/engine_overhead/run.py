"""What the engine adds to a step at world 1: the plain PyTorch loop, zeropipe and DeepSpeed in one process.

    python -m benchmarks.engine_overhead.run         # in an environment that also has deepspeed, to see it beside

The contenders take turns step by step in short turns, so that whatever else the machine does falls on all of them;
a turn is compared with the plain loop's turn of the same round. What is measured is CPU time, which a busy machine
changes less than the clock. Writes results.md and results.json (or to --out).
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import zeropipe
from benchmarks.common import report
from benchmarks.common.contenders import CONTENDERS, Step, Task
from benchmarks.common.model import GPT, SIZES, batch
from benchmarks.common.peers import why_no_deepspeed

PROCESS_OF_ITS_OWN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
SIZES_SHOWN = ("tiny", "10M")
LAYERS, WIDTH = 500, 64


class Layers(nn.Module):
    """Many small layers: what an engine does for each of them is most of its step."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return (x - y).square().mean()


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    os.environ.update(PROCESS_OF_ITS_OWN | {"MASTER_PORT": str(args.port)})
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    zeropipe.init_distributed("gloo")
    lines = [
        "| model | contender | step, microseconds | added, microseconds | times the plain loop |",
        "|---|---|---:|---:|---:|",
    ]
    device, numbers = torch.device("cpu"), {}
    peers = not why_no_deepspeed(sys.executable)
    for name in SIZES_SHOWN:
        size = SIZES[name]
        task = Task(seeded(lambda size=size: GPT(size)), "fp32", device, size.micro_batch)
        who = ["plain", "zeropipe_0", "zeropipe_2", *(["deepspeed_0"] if peers else [])]
        numbers[name] = play(task, batch(size, 0, device), who, args)
    # Every layer a unit that is gathered and freed, as FSDP2 is told to: none is small enough to stay whole.
    zero = {"stage3_param_persistence_threshold": 0}
    task = Task(seeded(Layers), "fp32", device, 4, zero)
    data = torch.randn(4, WIDTH), torch.zeros(4, WIDTH)
    who = ["plain", "zeropipe_2", "zeropipe_3", "fsdp2", *(["deepspeed_2", "deepspeed_3"] if peers else [])]
    numbers[f"{LAYERS} Linear({WIDTH})"] = play(task, data, who, args)
    for name, turns in numbers.items():
        for who_ran, seconds in turns.items():
            pairs = list(zip(seconds, turns["plain"], strict=True))
            added = statistics.median(mine - plain for mine, plain in pairs)
            times = statistics.median(mine / plain for mine, plain in pairs)
            middle = statistics.median(seconds)
            lines.append(f"| {name} | {who_ran} | {middle * 1e6:.0f} | {added * 1e6:+.0f} | {times:.2f} |")
    if not peers:
        lines.append("\nDeepSpeed was left out: this interpreter does not have it.")
    title = "What the engine adds to a step, in one process (CPU time)"
    report.write(args.out, title, "\n".join(lines), {"turns": numbers})


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return make()

    return made


def play(
    task: Task, data: tuple[torch.Tensor, torch.Tensor], names: list[str], args: argparse.Namespace
) -> dict[str, list[float]]:
    """Mean seconds of a step in every turn, by contender."""
    x, y = data
    steps: dict[str, Step] = {name: CONTENDERS[name](task) for name in names}
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
            start = time.process_time()
            for _ in range(count):
                step(x, y)
            turns[name].append((time.process_time() - start) / count)
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
