"""What sums over slots cost: a step with ``reproducible.slots`` beside one without, in turns in the same processes.

    python -m benchmarks.reproducible.run [--rounds 9] [--width 384]

12 micro-batches of a GPT of four blocks, on 2 ranks (each sends one partial sum) and on 3 (each sends two), at stages 0
to 3. To hold: the median of the ratios of neighbouring steps is at most 1.10 on 2 ranks and 1.35 on 3. Takes about
three minutes on two cores; nothing else should run on the machine. Ranks are processes on gloo.
"""

import argparse
import os
import random
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import zeropipe
from benchmarks.common.report import write

SLOTS, MICRO, WORDS, LENGTH = 12, 2, 256, 64
LIMITS = {2: 1.10, 3: 1.35}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        return x + self.wide(self.norm(mixed))


class GPT(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, width), nn.Linear(width, WORDS, bias=False)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(4)])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        scores = self.head(self.blocks(self.words(ids[:, :-1])))
        return nn.functional.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten())


def engine_of(width: int, stage: int, more: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": MICRO,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        **more,
    }
    return zeropipe.initialize(model=GPT(width), config=config)[0]


def seconds(engine: Any, ids: torch.Tensor) -> float:
    dist.barrier()
    began = time.perf_counter()
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(ids))
        engine.step()
    dist.barrier()
    return time.perf_counter() - began


def rank_main(rank: int, world: int, port: int, args: argparse.Namespace, queue: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    zeropipe.init_distributed()
    ids = torch.randint(WORDS, (MICRO, LENGTH + 1), generator=torch.Generator().manual_seed(rank))
    for stage in args.stages:
        usual = engine_of(args.width, stage, {"gradient_accumulation_steps": SLOTS // world})
        slots = engine_of(args.width, stage, {"reproducible": {"slots": SLOTS}})
        pairs = []
        for number in range(args.rounds + 2):
            # Which goes first changes, so that neither always finds the other's memory in the cache.
            order = (usual, slots) if number % 2 else (slots, usual)
            took = {id(engine): seconds(engine, ids) for engine in order}
            pairs.append((took[id(usual)], took[id(slots)]))
        usual.destroy()
        slots.destroy()
        if rank == 0:
            queue.put((world, stage, pairs[2:]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--ranks", type=int, nargs="+", default=list(LIMITS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    queue = mp.get_context("spawn").SimpleQueue()
    found = []
    for world in args.ranks:
        mp.spawn(rank_main, (world, random.randint(20000, 40000), args, queue), nprocs=world)
        found += [queue.get() for _ in args.stages]
    lines = ["| ranks | stage | usual, s | slots, s | ratio | to hold |", "|---:|---:|---:|---:|---:|---:|"]
    for world, stage, pairs in found:
        usual, slots = (median(pair[at] for pair in pairs) for at in (0, 1))
        ratio = median(b / a for a, b in pairs)
        lines.append(
            f"| {world} | {stage} | {usual:.3f} | {slots:.3f} | {ratio:.3f} | {LIMITS.get(world, 1.35)} |"
        )
    title = f"A step of {SLOTS} slots beside the usual one: a GPT of four blocks, width {args.width}"
    write(args.out, title, "\n".join(lines), {"found": found})


if __name__ == "__main__":
    main()
