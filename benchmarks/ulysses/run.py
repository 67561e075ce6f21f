"""What a rank keeps of one sequence between forward and backward, where 1, 2 and 4 ranks share it, and in tiles.

    python -m benchmarks.ulysses.run                   # two minutes

A GPT trains on one sequence at stage 1. ``kept``: bytes of the tensors that autograd has saved when forward ends, each
memory counted once, parameters not; it has no noise. ``peak``: what a step adds to the resident memory at most. The
loss is that of the whole sequence, and the same in every row.

A rank of n keeps 1/n, and one more output of attention in each layer: attention saves its own, and what follows it
saves that which was exchanged. Exits with 1 where it keeps more than 1.15 / n.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

from benchmarks.common.memory import peak_resident, reset_peak, resident
from benchmarks.common.report import write

MOST = 1.15
WIDTH, HEADS, DEPTH, WORDS = 256, 8, 4, 8192
MB = 1e6


class Block(nn.Module):
    def __init__(self, attention: Any, tiles: int) -> None:
        super().__init__()
        self.attention, self.tiles = attention, tiles
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from zeropipe.runtime.sequence_parallel.tiled import TiledMLP

        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, HEADS, -1)).unbind(2)
        x = x + self.out(self.attention(q, k, v).flatten(2))
        inner = self.second(x)
        return x + (TiledMLP.apply(Block.mlp, self, inner, self.tiles) if self.tiles > 1 else self.mlp(inner))


class Gpt(nn.Module):
    def __init__(self, tokens: int, attention: Any, tiles: int) -> None:
        super().__init__()
        self.tiles = tiles
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(tokens, WIDTH)
        self.blocks = nn.Sequential(*(Block(attention, tiles) for _ in range(DEPTH)))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def loss(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(x).flatten(0, -2), labels.flatten(), reduction="sum")

    def forward(self, ids: torch.Tensor, places: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        from zeropipe.runtime.sequence_parallel.tiled import TiledFusedLogitsLoss

        x = self.blocks(self.words(ids) + self.places(places))
        if self.tiles == 1:
            return self.loss(x, labels)
        return TiledFusedLogitsLoss.apply(Gpt.loss, self, x, labels, None, self.tiles, None, "sum")


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def measure(rank: int, world: int, port: int, tokens: int, tiles: int, steps: int, results: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    import zeropipe
    from zeropipe.runtime.sequence_parallel.attention import DistributedAttention
    from zeropipe.runtime.sequence_parallel.data import shard_batch
    from zeropipe.runtime.sequence_parallel.place import initialize_sequence_parallel

    mpu = initialize_sequence_parallel(world)
    torch.manual_seed(0)
    around = attend if world == 1 else DistributedAttention(attend, mpu.sequence_group, 2, 1)
    model = Gpt(tokens, around, tiles)
    config = {
        "train_batch_size": 1,
        "sequence_parallel_size": world,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 1},
    }
    engine = zeropipe.initialize(model=model, config=config)[0]
    ids = torch.randint(WORDS, (1, tokens), generator=torch.Generator().manual_seed(1))
    part = shard_batch({"input_ids": ids, "labels": ids}, rank, world)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    memories: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            memories[storage.data_ptr()] = storage.nbytes()
        return tensor

    losses, seconds, peaks = [], [], []
    for _ in range(steps):
        dist.barrier()
        memories.clear()
        reset_peak()
        before, begun = resident(), time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = engine(part["input_ids"], part["position_ids"], part["shift_labels"]) / (tokens - 1)
        kept = sum(memories.values())
        engine.backward(loss * world)
        engine.step()
        seconds.append(time.perf_counter() - begun)
        peaks.append(peak_resident() - before)
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total))
    results[rank] = {
        "kept": kept,
        "peak": max(peaks[1:]),  # the first step also makes the optimizer's state
        "seconds": statistics.median(seconds[1:]),
        "losses": losses,
    }
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tiles", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for tiles in args.tiles:
        for world in args.ranks:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
            with mp.Manager() as manager:
                results = manager.dict()
                given = (world, store.port, args.tokens, tiles, args.steps, results)
                mp.start_processes(measure, given, nprocs=world, start_method="spawn")
                ranks = dict(results)
            rows.append(
                {
                    "tiles": tiles,
                    "ranks": world,
                    "kept": max(one["kept"] for one in ranks.values()),
                    "peak": max(one["peak"] for one in ranks.values()),
                    "seconds": max(one["seconds"] for one in ranks.values()),
                    "losses": ranks[0]["losses"],
                }
            )
    lines = [
        "| tiles of MLP and loss | ranks | kept per rank, MB | of one rank | peak growth per rank, MB | step, s "
        f"| loss after {args.steps - 1} steps |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    worst = 0.0
    for row in rows:
        one = next(r for r in rows if r["tiles"] == row["tiles"] and r["ranks"] == args.ranks[0])
        share = row["kept"] / one["kept"]
        worst = max(worst, share * row["ranks"] / args.ranks[0])
        lines.append(
            f"| {row['tiles']} | {row['ranks']} | {row['kept'] / MB:.1f} | {share:.3f} | {row['peak'] / MB:.0f} "
            f"| {row['seconds']:.2f} | {row['losses'][-1]:.6f} |"
        )
    title = (
        f"One sequence of {args.tokens:,} tokens, {DEPTH} layers of {WIDTH}, {WORDS:,} words, fp32, stage 1"
    )
    write(Path(__file__).parent, title, "\n".join(lines), {"rows": rows})
    return int(worst > MOST)


if __name__ == "__main__":
    sys.exit(main())
