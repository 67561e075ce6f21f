"""One rank of one contender on a link: train a GPT on random tokens and print the time of each step as JSON."""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import zeropipe
from benchmarks.common.model import GPT, SIZES, batch
from zeropipe.comm.record import record

MARK = "COMPRESSED "
DENSE = 2  # dense steps before compression; the clock starts after them and a few more
# 0/1 Adam with the interval at its largest: the time of a whole interval, divided by its steps, is what counts.
INTERVAL = 4
ZERO_ONE = {"var_freeze_step": DENSE, "var_update_scaler": 1, "local_step_scaler": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "zeropipe AdamW": {"type": "AdamW", "params": {}},
    "OnebitAdam": {"type": "OneBitAdam", "params": {"freeze_step": DENSE}},
    "OnebitLamb": {"type": "OneBitLamb", "params": {"freeze_step": DENSE}},
    "ZeroOneAdam, interval 4": {
        "type": "ZeroOneAdam",
        "params": {**ZERO_ONE, "local_step_clipper": INTERVAL},
    },
    "OnebitAdam, stage 1": {"type": "OneBitAdam", "params": {"freeze_step": DENSE}},
}
CONTENDERS = ("DDP + AdamW", *CONFIGS)
Step = Callable[[torch.Tensor, torch.Tensor], None]


def ddp(model: torch.nn.Module) -> Step:
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        wrapped(x, y).backward()
        optimizer.step()

    return step


def engine(model: torch.nn.Module, contender: str, micro_batch: int) -> Step:
    chosen = CONFIGS[contender]
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_clipping": 0.0,
        "optimizer": {"type": chosen["type"], "params": {"lr": 1e-4, **chosen["params"]}},
        "zero_optimization": {"stage": 1 if contender.endswith("stage 1") else 0},
    }
    trained = zeropipe.initialize(model=model, config=config)[0]

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        trained.backward(trained(x, y))
        trained.step()

    return step


def link_rate(rank: int, numel: int = 2_000_000) -> float:
    """Mbit/s from rank 0 to rank 1 as a large message sees it: what the link really does, not what it was told to."""
    payload, reply = torch.zeros(numel), torch.zeros(1)
    seconds = 0.0
    for size in (1000, numel):  # the first opens the connection
        if rank == 0:
            start = time.perf_counter()
            dist.send(payload[:size], 1)
            dist.recv(reply, 1)
            seconds = time.perf_counter() - start
        elif rank == 1:
            dist.recv(payload[:size], 0)
            dist.send(reply, 0)
    dist.barrier()
    return 32e-6 * numel / seconds if seconds else 0.0


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{args.address}:{args.port}",
        rank=args.rank,
        world_size=args.ranks,
        timeout=timedelta(seconds=args.limit),
    )
    rate = link_rate(args.rank)
    size = SIZES[args.size]
    torch.manual_seed(0)
    model = GPT(size)
    if args.contender == "DDP + AdamW":
        step = ddp(model)
    else:
        step = engine(model, args.contender, size.micro_batch)
    seconds: list[float] = []
    busy, sent = 0.0, 0
    for number in range(args.warm_up + args.steps):
        x, y = batch(size, number * args.ranks + args.rank, torch.device("cpu"))
        timed = number >= args.warm_up
        if number == args.warm_up:
            dist.barrier()
        start, worked = time.perf_counter(), time.process_time()
        with record() as events:
            step(x, y)
        if timed:
            seconds.append(time.perf_counter() - start)
            busy += time.process_time() - worked
            sent += sum(event.bytes for event in events)
    numbers = {
        "seconds": seconds,
        # The mean, not the median: 0/1 Adam's steps differ on purpose. Any INTERVAL steps on end hold one exchange.
        "step_seconds": statistics.fmean(seconds),
        "best_seconds": min(
            statistics.fmean(seconds[at : at + INTERVAL]) for at in range(len(seconds) - INTERVAL + 1)
        ),
        "cpu_seconds": busy / args.steps,  # of all threads: what the step takes besides waiting
        "bytes_per_step": sent / args.steps,
        "link_mbit_per_second": rate,  # 0 except on rank 0
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    every: list[Any] = [None] * args.ranks
    dist.all_gather_object(every, numbers)
    if args.rank == 0:
        print(MARK + json.dumps(every), flush=True)
    dist.barrier()
    os._exit(0)  # a peer's clean-up must neither fail the measurement nor take part in it


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--size", choices=SIZES, default="10M")
    parser.add_argument("--warm-up", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--limit", type=int, default=300)
    return parser.parse_args()


if __name__ == "__main__":
    main()
