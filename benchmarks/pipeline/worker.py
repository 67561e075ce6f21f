"""One rank of one pipeline contender: build it, warm it up, time its steps, print the numbers as one JSON line.

A step is forward and backward of all micro-batches and AdamW, the same for all.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.common import memory, peers
from benchmarks.common.model import SIZES, Size, batch
from benchmarks.common.worker import MARK
from benchmarks.pipeline.model import classes, cut, loss

CHUNKS = {"interleaved": 2, "interleaved-zb": 2, "zbv": 2, "dualpipev": 2}
Step = Callable[[list[tuple[Tensor, Tensor]]], None]
CPU = torch.device("cpu")


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    system, _, schedule = args.contender.partition("_")
    _start(system)
    dist.barrier()
    size = replace(SIZES[args.size], micro_batch=args.micro_batch)
    memory.reset_peak()
    before = memory.resident()
    torch.manual_seed(0)
    # After a colon: zeropipe cuts by itself, by a partition method.
    schedule, _, method = schedule.partition(":")
    more = {"method": method} if method else {}
    step, bubble = BUILD[system](size, schedule, args.micro_batches, **more)
    seconds = []
    for number in range(args.warm_up + args.steps):
        data = [batch(size, number * args.micro_batches + m, CPU) for m in range(args.micro_batches)]
        dist.barrier()
        start = time.perf_counter()
        step(data)
        dist.barrier()
        if number >= args.warm_up:
            seconds.append(time.perf_counter() - start)
    numbers = {
        "step_seconds": statistics.median(seconds),
        "peak_growth": memory.peak_resident() - before,
        "bubble": bubble(),
    }
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, numbers)
    if dist.get_rank() == 0:
        print(MARK + json.dumps(every), flush=True)
    dist.barrier()
    os._exit(0)  # a peer's clean-up must neither fail the measurement nor take part in it


def _start(system: str) -> None:
    if system == "deepspeed":
        peers.deepspeed().init_distributed(dist_backend="gloo")
    elif system == "zeropipe":
        import zeropipe

        zeropipe.init_distributed("gloo")
    else:
        dist.init_process_group("gloo")


def config(micro_batch: int, micro_batches: int, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": micro_batches,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "gradient_clipping": 0.0,
        **more,
    }


def zeropipe_step(
    size: Size, schedule: str, micro_batches: int, method: str | None = None
) -> tuple[Step, Callable[[], float | None]]:
    import zeropipe
    from zeropipe.pipe import LayerSpec, PipelineModule

    ranks = dist.get_world_size()
    module = PipelineModule(
        [LayerSpec(kind, size) for kind in classes(size)],
        num_stages=ranks,
        loss_fn=loss,
        partition_method=method or cut(size, ranks * CHUNKS.get(schedule, 1)),
        schedule=schedule,
        sample_input=torch.zeros(size.micro_batch, size.context, dtype=torch.int64),
    )
    engine, *_ = zeropipe.initialize(model=module, config=config(size.micro_batch, micro_batches))

    def bubble() -> float:
        events = engine.pipeline_events()
        busy = sum(e.end - e.start for e in events)
        span = max(e.end for e in events) - min(e.start for e in events)
        return (span * ranks - busy) / busy

    return lambda data: engine.train_batch(iter(data)), bubble


def torch_step(size: Size, schedule: str, micro_batches: int) -> tuple[Step, Callable[[], float | None]]:
    from torch.distributed import pipelining

    rank, ranks = dist.get_rank(), dist.get_world_size()
    chunks = CHUNKS.get(schedule, 1)
    numbers = [rank] if chunks == 1 else [rank, rank + ranks]
    if schedule in ("zbv", "dualpipev"):
        numbers = [rank, 2 * ranks - 1 - rank]
    bounds = cut(size, ranks * chunks)
    stages, parameters = [], []
    for number in numbers:
        layers = classes(size)[bounds[number] : bounds[number + 1]]
        module = nn.Sequential(*(kind(size) for kind in layers))
        parameters += list(module.parameters())
        stages.append(pipelining.PipelineStage(module, number, ranks * chunks, CPU))
    names = {
        "gpipe": "ScheduleGPipe",
        "1f1b": "Schedule1F1B",
        "interleaved": "ScheduleInterleaved1F1B",
        "interleaved-zb": "ScheduleInterleavedZeroBubble",
        "zbv": "ScheduleZBVZeroBubble",
        "dualpipev": "ScheduleDualPipeV",
    }
    kind = getattr(pipelining.schedules, names[schedule])
    plan = kind(stages[0] if chunks == 1 else stages, micro_batches, loss_fn=loss)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    last = ranks * chunks - 1

    def step(data: list[tuple[Tensor, Tensor]]) -> None:
        x, y = (torch.cat(part) for part in zip(*data, strict=True))
        inputs = (x,) if 0 in numbers else ()
        more = {"target": y, "losses": []} if last in numbers else {}
        plan.step(*inputs, **more)
        optimizer.step()
        optimizer.zero_grad()

    return step, lambda: None


def deepspeed_step(size: Size, schedule: str, micro_batches: int) -> tuple[Step, Callable[[], float | None]]:
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule

    assert schedule == "1f1b"
    ranks = dist.get_world_size()
    module = PipelineModule(
        [LayerSpec(kind, size) for kind in classes(size)],
        num_stages=ranks,
        loss_fn=loss,
        partition_method="type:Block",
    )
    settings = config(size.micro_batch, micro_batches, steps_per_print=10**9)
    settings["optimizer"]["params"]["torch_adam"] = True  # torch's own, so that nothing is compiled
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=list(module.parameters()), config=settings
    )
    return lambda data: engine.train_batch(iter(data)), lambda: None


BUILD = {"zeropipe": zeropipe_step, "torch": torch_step, "deepspeed": deepspeed_step}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", help="SYSTEM_SCHEDULE, such as zeropipe_zbv, or zeropipe_zbv:profile")
    parser.add_argument("--size", choices=SIZES, default="34M")
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
