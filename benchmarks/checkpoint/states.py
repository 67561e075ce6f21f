"""Saving and loading one training state beside ``torch.save`` and torch's DCP; started by ``run.py``.

Every round runs every contender once, in turn. zeropipe and DCP sync their files to the disk, ``torch.save`` does not.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.checkpoint.engines import MARK
from zeropipe.checkpoint.export import export
from zeropipe.checkpoint.loader import load, open_source
from zeropipe.checkpoint.save.records import FlatState, Grid, LocalState, ModelState, TrainState
from zeropipe.checkpoint.save.saver import Saver
from zeropipe.comm.group import world
from zeropipe.layout.flat import FlatShards, flat_shards

WIDTH = 1024


def state(mbytes: int, rank: int, ranks: int) -> LocalState:
    """fp32 weights, masters and two moments at stage 2: ``mbytes`` in all, over all ranks."""
    count = max(1, mbytes * 2**20 // (16 * WIDTH * WIDTH))
    layout = flat_shards([(f"layers.{i}.weight", (WIDTH, WIDTH), "float32") for i in range(count)], ranks, 16)
    return at(layout, rank, ranks)


def at(layout: FlatShards, rank: int, ranks: int) -> LocalState:
    values = torch.randn(layout.padded_numel)
    start, stop = layout.shard_range(rank)
    tensors = {"fp32": values[start:stop]}
    tensors |= {key: torch.randn(layout.shard_numel) for key in ("exp_avg", "exp_avg_sq")}
    module = {
        s.name: values[slice(*layout.tensor_range(i))].view(s.shape) for i, s in enumerate(layout.tensors)
    }
    flat = FlatState("group0", layout, rank, tensors, {"step": torch.tensor(1.0)})
    grid = Grid(rank, ranks, rank, ranks)
    return LocalState(grid, 2, "float32", ModelState(module), (flat,), train=TrainState(global_steps=1))


def tree(local: LocalState) -> dict[str, Any]:
    """What the other savers get: this rank's shard, and the module on rank 0."""
    flat = {k: v.clone() for k, v in local.flats[0].tensors.items()}
    return {"flat": flat} | ({"module": dict(local.model.tensors)} if local.grid.rank == 0 else {})


def timed(action: Callable[[], object]) -> float:
    os.sync()  # nobody pays for what another has left to be written
    if dist.is_initialized():
        dist.barrier()
    start = time.perf_counter()
    action()
    if dist.is_initialized():
        dist.barrier()
    return time.perf_counter() - start


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    group = world()
    rank, ranks = group.rank, group.size
    local = state(arguments.mbytes, rank, ranks)
    other = at(local.flats[0].layout.reshard(1), 0, 1) if rank == 0 else None
    saver, background = Saver(group), Saver(group)
    results: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        results.setdefault(name, []).append(seconds)

    for _ in range(arguments.rounds):
        note("zeropipe save", timed(lambda: saver.save(folder, "z", local)))
        note(
            "zeropipe save, asynchronous: blocked",
            timed(lambda: background.save(folder, "a", local, async_save=True)),
        )
        timed(background.wait)
        note("zeropipe load, same size", timed(lambda: load(folder, "z", local, group)))
        note(
            "zeropipe load, same size, unchecked",
            timed(lambda: load(folder, "z", local, group, verify=False)),
        )
        note("zeropipe load at 1 rank", timed(lambda: other is None or load(folder, "z", other)))
        plain = tree(local)
        note(
            "torch.save, a file per rank, not synced",
            timed(lambda: torch.save(plain, folder / f"t{rank}.pt")),  # noqa: B023,
        )
        note("torch.load", timed(lambda: torch.load(folder / f"t{rank}.pt", weights_only=True)))
        dcp(folder, plain, note)
    return results


def dcp(folder: Path, plain: dict[str, Any], note: Callable[[str, float], None]) -> None:
    import torch.distributed.checkpoint as checkpoint

    rank = dist.get_rank()
    values = {f"{rank}.{key}": tensor for key, tensor in plain["flat"].items()}
    values |= {f"module.{key}": t for key, t in plain.get("module", {}).items()}
    note("torch DCP save", timed(lambda: checkpoint.save(values, checkpoint_id=folder / "dcp")))
    note("torch DCP load", timed(lambda: checkpoint.load(values, checkpoint_id=folder / "dcp")))


def export_peak(arguments: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    Saver(world()).save(folder, "z", state(arguments.mbytes, 0, 1))
    source = open_source(folder)
    start, seen = _anonymous(), [0]
    seconds = timed(
        lambda: export(
            source, folder / "out", max_shard_size="64MB", progress=lambda n: seen.append(_anonymous())
        )
    )
    return {"export": [seconds], "export: peak MB above the start": [(max(seen) - start) / 2**20]}


def _anonymous() -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.checkpoint.states")
    parser.add_argument("what", choices=["times", "export"])
    parser.add_argument("--mbytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", required=True)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    folder = Path(arguments.folder)
    results = measure(arguments, folder) if arguments.what == "times" else export_peak(arguments, folder)
    if world().rank == 0:
        print(MARK + json.dumps(results), flush=True)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
