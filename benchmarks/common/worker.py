"""One rank of one contender: build it, warm it up, time its steps, and print the numbers as one JSON line.

Started by `rounds.py` under torchrun. Memory is counted from the moment when everything is imported and the
process group stands, before the model is built.
"""

import argparse
import json
import os
import statistics
import time

import torch
import torch.distributed as dist

from benchmarks.common import memory, peers
from benchmarks.common.contenders import CONTENDERS, Task
from benchmarks.common.model import GPT, SIZES, batch

MARK = "BENCHMARK "


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    on_gpu = torch.cuda.is_available() and args.device != "cpu"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    begin(args.contender, "nccl" if on_gpu else "gloo")
    dist.barrier()
    size = SIZES[args.size]
    memory.reset_peak()
    before = memory.resident()

    def make_model() -> GPT:
        torch.manual_seed(0)
        return GPT(size)

    step = CONTENDERS[args.contender](Task(make_model, args.dtype, device, size.micro_batch))
    built = memory.peak_resident() - before
    seconds = []
    for number in range(args.warm_up + args.steps):
        x, y = batch(size, number * dist.get_world_size() + dist.get_rank(), device)
        dist.barrier()
        start = time.perf_counter()
        loss = step(x, y)
        if on_gpu:
            torch.cuda.synchronize()
        if number >= args.warm_up:
            seconds.append(time.perf_counter() - start)
    numbers = {
        "step_seconds": statistics.median(seconds),
        "peak_growth": memory.peak_resident() - before,
        "growth_while_building": built,
        "gpu_peak": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "last_loss": loss.item(),
        "torch": torch.__version__,
    }
    every: list[dict[str, float] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(every, numbers)
    if dist.get_rank() == 0:
        print(MARK + json.dumps(every), flush=True)
    dist.barrier()
    os._exit(0)  # a peer's clean-up must neither fail the measurement nor take part in it


def begin(contender: str, backend: str) -> None:
    """Import the system under test and start its process group before memory is counted."""
    if contender.startswith("deepspeed"):
        peers.deepspeed().init_distributed(dist_backend=backend)
    elif contender.startswith("zeropipe"):
        import zeropipe

        zeropipe.init_distributed(backend)
    else:
        dist.init_process_group(backend)
    import torch.distributed.fsdp
    import torch.distributed.optim
    import torch.nn.parallel  # noqa: F401


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--size", choices=SIZES, default="34M")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
