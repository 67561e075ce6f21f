"""The CPU time of rank 0 for one collective of a step, on 8 to 4,096 ranks of torch's fake process group.

    python -m benchmarks.ranks.run                   # a minute

What is gathered is zeros, at once: the fake group itself would copy a shard for every rank. So what is left of a step
is the library, autograd and the small model. Exits with 1 where the time per collective rises by more than 1.3 times
from the smallest world to the largest. (That not one call of Python more is made is counted in
``tests/dist/test_engine_large_world.py``.)
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import zeropipe
import zeropipe.runtime.engine.build
from benchmarks.common.report import write
from zeropipe.comm import native
from zeropipe.comm.record import record

MOST = 1.3
WIDTH, DEPTH = 256, 20  # a weight is 16 elements for each of 4,096 ranks, so that padding does not grow much


class _Done:
    """The handle of what is over."""

    def wait(self) -> None: ...
    def is_completed(self) -> bool:
        return True


def _zeros(output: torch.Tensor, *_: Any, **__: Any) -> _Done:
    output.zero_()
    return _Done()


def _all_zeros(pg: Any, outputs: list[torch.Tensor], *_: Any) -> _Done:
    torch._foreach_zero_(outputs)
    return _Done()


def measure(world: int, stage: int, steps: int) -> tuple[float, int]:
    """Seconds of CPU time of the fastest of ``steps`` steps, and its collectives."""
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    config: dict[str, Any] = {
        "train_batch_size": world,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))
    engine = zeropipe.initialize(model=model, config=config)[0]
    best, count, x = float("inf"), 0, torch.ones(1, WIDTH)
    for _ in range(steps):
        begun = time.process_time()
        with record() as events:
            engine.backward(engine(x).square().mean())
            engine.step()
        best, count = min(best, time.process_time() - begun), len(events)
    engine.destroy()
    dist.destroy_process_group()
    return best, count


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", type=int, nargs="+", default=[8, 64, 512, 4096])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument(
        "--rounds", type=int, default=2, help="in turns, so that a busy machine hits all alike"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    zeropipe.runtime.engine.build.agree = lambda items, group: None  # the fake group invents others' answers
    native._all_gather, native._reduce_scatter = _zeros, _zeros
    for name in ("all_gather_single_coalesced", "allgather_into_tensor_coalesced"):
        setattr(dist.ProcessGroup, name, _all_zeros)
    found: dict[int, dict[int, float]] = {stage: {} for stage in (1, 2, 3)}
    counts: dict[int, int] = {}
    for _ in range(args.rounds):
        for stage, times in found.items():
            for world in args.worlds:
                seconds, counts[stage] = measure(world, stage, args.steps)
                times[world] = min(times.get(world, seconds), seconds)
    heads = [f"{world:,}" for world in args.worlds]
    lines = ["| stage | collectives in a step | " + " | ".join(heads) + " | last / first |"]
    lines += ["|---|---:|" + "---:|" * (len(heads) + 1)]
    worst = 0.0
    for stage, times in found.items():
        micro = [times[world] / counts[stage] * 1e6 for world in args.worlds]
        worst = max(worst, micro[-1] / micro[0])
        cells = " | ".join(f"{one:.0f}" for one in micro)
        lines.append(f"| {stage} | {counts[stage]} | {cells} | {micro[-1] / micro[0]:.2f} |")
    body = "CPU time of a step of rank 0, divided by its collectives, microseconds, by number of ranks\n\n"
    write(Path(__file__).parent, "Growth with the number of ranks", body + "\n".join(lines), {"times": found})
    return int(worst > MOST)


if __name__ == "__main__":
    sys.exit(main())
