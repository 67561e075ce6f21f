"""Saving and loading through ``zeropipe`` or DeepSpeed on the same model, in an interpreter that has the one asked for.

Started by ``run.py``, which times nothing itself but DeepSpeed's converter. One line of JSON on rank 0.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.common import peers

MARK = "RESULTS "
WRITTEN = "bytes written"
WIDTH = 1024


def model(mbytes: int) -> nn.Module:
    """Square layers: at stage 2 in fp32 with Adam their state on the disk is ``mbytes`` (16 bytes a parameter)."""
    rows = max(1, round(mbytes * 1e6 / 16 / WIDTH))
    layers = [nn.Linear(WIDTH, min(WIDTH, rows - at), bias=False) for at in range(0, rows, WIDTH)]
    return nn.ModuleList(layers)


def engine_of(system: str, arguments: argparse.Namespace) -> Any:
    if system == "deepspeed":
        library = peers.deepspeed()
        # Compiles for minutes, unused here.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda *a, **k: None  # type: ignore[attr-defined]
    else:
        import zeropipe as library
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 2},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": arguments.universal},
    }
    built = model(arguments.mbytes)
    engine, *_ = library.initialize(
        model=Stack(built), config=config, model_parameters=list(built.parameters())
    )
    return engine


class Stack(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([layer(x).mean() for layer in self.layers]).sum()  # type: ignore[operator]


def step(engine: Any) -> None:
    engine.backward(engine(torch.ones(1, WIDTH)))
    engine.step()


def written() -> int:
    """Bytes that this process has sent to the disk."""
    with open("/proc/self/io") as file:
        return int(next(line for line in file if line.startswith("write_bytes")).split()[1])


def timed(action: Callable[[], object]) -> float:
    os.sync()  # nobody pays for what another has left to be written
    dist.barrier()
    start = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.checkpoint.engines")
    parser.add_argument("system", choices=["zeropipe", "deepspeed"])
    parser.add_argument("--mbytes", type=int, default=514)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", default="", help="a folder to save to")
    parser.add_argument("--load", nargs="*", default=[], help="NAME=FOLDER: loads to time, after the saves")
    parser.add_argument("--universal", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    engine = engine_of(arguments.system, arguments)
    step(engine)
    results: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        results.setdefault(name, []).append(seconds)

    for _ in range(arguments.rounds if arguments.save else 0):
        note("save", timed(lambda: engine.save_checkpoint(arguments.save, tag="full")))
        if arguments.system == "zeropipe":
            note(
                "blocked", timed(lambda: engine.save_checkpoint(arguments.save, tag="async", async_save=True))
            )
            timed(engine.wait_for_checkpoint)
    for _ in range(arguments.rounds):
        for entry in arguments.load:
            name, folder = entry.split("=", 1)
            tag = None if arguments.universal else "full"
            before = written()
            note(name, timed(lambda: engine.load_checkpoint(folder, tag=tag)))  # noqa: B023
            note(f"{name}: {WRITTEN}", float(written() - before))
            if arguments.system == "zeropipe":
                unchecked = f"{name}, unchecked"
                note(unchecked, timed(lambda: engine.load_checkpoint(folder, tag=tag, verify=False)))  # noqa: B023
    step(engine)
    if int(os.environ.get("RANK", 0)) == 0:
        print("\n" + MARK + json.dumps(results), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
