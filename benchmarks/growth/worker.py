"""One rank that times what the library does with many small tensors: a line of JSON for each figure, as it is found.

Started by ``run.py`` under torchrun, once for each number of tensors. Figures that came before a time limit stay.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from typer.testing import CliRunner

import zeropipe
from zeropipe.cli.ckpt import app as tools
from zeropipe.runtime.zero.gather.fetch_plan import Budget, Phase, Visit, plan
from zeropipe.utils import safe_get_full_fp32_param

MARK = "FIGURE "
WIDTH = 4
DEPTH = 500
STAGES = (0, 1, 2, 3)
PARTS = ("plan", "stage0", "stage1", "stage2", "stage3", "across", "tools")
REPEAT_FOR = 2.0  # seconds: short figures are taken several times, and the smallest counts


class Chain(nn.Module):
    """Modules with one small weight each, in chains of 500; a chain's sum stays near its input.

    One chain of 16,000 modules would be a graph of which torch takes the nodes apart by recursion, once hooks have
    looked at them, and a stack of 8 MiB ends at some 13,000.
    """

    def __init__(self, tensors: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(tensors))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ends = []
        for start in range(0, len(self.layers), DEPTH):
            along = x
            for layer in self.layers[start : start + DEPTH]:
                along = along + layer(along) / DEPTH
            ends.append(along)
        return torch.stack(ends).square().mean()


class Figures:
    """Times actions on all ranks together and prints them on rank 0, unless they are only to be done once before."""

    def __init__(self, tensors: int, quiet: bool = False) -> None:
        self.tensors = tensors
        self._quiet = quiet

    def take(self, name: str, action: Callable[[], object], most: int = 3) -> None:
        """CPU seconds of all ranks and seconds on the clock, the smallest of up to ``most`` times."""
        cpu: list[float] = []
        wall: list[float] = []
        while len(cpu) < (1 if self._quiet else most) and sum(wall) < REPEAT_FOR:
            # Python's collector looks through everything that lives, torch's own too, whenever enough is new: a jump at
            # some size, not growth. It looks only at what the action makes.
            gc.collect()
            gc.freeze()
            dist.barrier()
            started, ticked = time.perf_counter(), time.process_time()
            action()
            spent = torch.tensor([time.process_time() - ticked, time.perf_counter() - started])
            dist.all_reduce(spent)
            gc.unfreeze()
            cpu.append(float(spent[0]))
            wall.append(float(spent[1]) / dist.get_world_size())
        if dist.get_rank() == 0 and not self._quiet:
            found = {"name": name, "tensors": self.tensors, "cpu": min(cpu), "wall": min(wall)}
            print(MARK + json.dumps(found), flush=True)


def engine_at(stage: int, tensors: int) -> Any:
    torch.manual_seed(0)
    return engine_of(Chain(tensors), stage)


def engine_of(model: nn.Module, stage: int) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage},
    }
    return zeropipe.initialize(model=model, config=config)[0]


def step(engine: Any) -> None:
    engine.backward(engine(torch.ones(1, WIDTH)))
    engine.step()


def at_stage(stage: int, tensors: int, folder: Path, figures: Figures) -> None:
    torch.manual_seed(0)
    model = Chain(tensors)
    built: list[Any] = []
    name = f"stage {stage}"
    figures.take(f"{name}: initialize", lambda: built.append(engine_of(model, stage)), most=1)
    engine = built[0]
    figures.take(f"{name}: first step", lambda: step(engine), most=1)
    step(engine)
    figures.take(f"{name}: step", lambda: step(engine))
    figures.take(
        f"{name}: every fp32 value", lambda: [safe_get_full_fp32_param(p) for p in model.parameters()]
    )
    where = folder / str(stage)
    figures.take(f"{name}: save", lambda: engine.save_checkpoint(where, tag="growth"))
    figures.take(f"{name}: load", lambda: engine.load_checkpoint(where, tag="growth"))
    engine.destroy()


def saved_at(stage: int, tensors: int, folder: Path) -> Path:
    """The folder with this stage's checkpoint, which is saved now if no figure has needed it before."""
    where = folder / str(stage)
    known = torch.tensor(int((where / "growth").exists()))
    dist.all_reduce(known, op=dist.ReduceOp.MIN)
    if not known:
        engine = engine_at(stage, tensors)
        step(engine)
        engine.save_checkpoint(where, tag="growth")
        engine.destroy()
    return where


def across(tensors: int, folder: Path, figures: Figures) -> None:
    for old, new in ((1, 3), (3, 1)):
        where = saved_at(old, tensors, folder)
        engine = engine_at(new, tensors)
        figures.take(f"load: stage {old} to {new}", lambda: engine.load_checkpoint(where))  # noqa: B023
        engine.destroy()


def run_tools(tensors: int, folder: Path, figures: Figures) -> None:
    """Each of ``zeropipe ckpt`` on a checkpoint of stage 2, by rank 0; the others wait."""
    where = saved_at(2, tensors, folder)
    other = folder / "other"
    if dist.get_rank() == 0:
        shutil.copytree(where, other)
    commands = {
        "inspect": ["inspect", "--tensors", where],
        "verify": ["verify", where],
        "diff": ["diff", where, other],
        "convert to universal": ["convert", where, folder / "universal", "--to", "universal"],
        "convert to dcp": ["convert", where, folder / "dcp", "--to", "dcp"],
        "convert to another stage": ["convert", where, folder / "one", "--to", "zeropipe", "--stage", "3"],
        "export": ["export", where, folder / "exported"],
    }

    def command(words: list[Any]) -> None:
        if dist.get_rank() == 0:
            done = CliRunner().invoke(tools, [str(word) for word in words])
            if done.exit_code:
                raise RuntimeError(f"zeropipe ckpt {words}: {done.output}") from done.exception

    for name, words in commands.items():
        figures.take(f"ckpt {name}", lambda: command(words), most=1)  # noqa: B023


def fetch_plan(tensors: int, figures: Figures) -> None:
    """The plan of a step, with budgets as scarce as in a large model: the live one binds at every visit."""
    visits = [Visit(Phase.FORWARD, unit) for unit in range(tensors)]
    visits += [Visit(Phase.BACKWARD, unit) for unit in reversed(range(tensors))]
    numel = [4096] * tensors
    for name, live in (("unlimited", 2**63 - 1), ("of 1,000 units", 4096 * 1000)):
        budget = Budget(3 * 2**21, live, 0)
        figures.take(f"plan(), live parameters {name}", lambda: plan(visits, numel, budget))  # noqa: B023


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.growth.worker")
    parser.add_argument("tensors", type=int)
    parser.add_argument("--parts", nargs="*", default=PARTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    zeropipe.init_distributed("gloo")
    name = [tempfile.mkdtemp(prefix="growth-") if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(name)
    folder = Path(name[0])
    try:
        # What is done once in a process (imports, groups) is done off the clock.
        measure(10, folder / "warm", arguments.parts, Figures(10, quiet=True))
        measure(arguments.tensors, folder / "real", arguments.parts, Figures(arguments.tensors))
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
    dist.destroy_process_group()


def measure(tensors: int, folder: Path, parts: Sequence[str], figures: Figures) -> None:
    if "plan" in parts:
        fetch_plan(tensors, figures)
    for stage in STAGES:
        if f"stage{stage}" in parts:
            at_stage(stage, tensors, folder, figures)
    if "across" in parts:
        across(tensors, folder, figures)
    if "tools" in parts:
        run_tools(tensors, folder, figures)


if __name__ == "__main__":
    main()
