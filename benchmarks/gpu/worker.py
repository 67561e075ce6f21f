"""One rank of one contender, which trains when its standard input says so (`benchmarks/common/turns.py`).

A line with a number: make as many steps, answer with the mean seconds of one. The line `memory`: answer with the bytes
that were held, as JSON.
"""

import argparse
import contextlib
import json
import os
import sys
import time

import torch
import torch.distributed as dist

from benchmarks.common import memory
from benchmarks.common.contenders import CONTENDERS, Task
from benchmarks.common.model import GPT, SIZES, batch
from benchmarks.common.worker import begin


def main() -> None:
    args = arguments()
    out = quiet()
    device = torch.device(args.device, int(os.environ["LOCAL_RANK"]) if args.device == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    begin(args.contender, "nccl" if device.type == "cuda" else "gloo")
    size = SIZES[args.size]
    before = start_counting(device)

    def make_model() -> GPT:
        torch.manual_seed(0)
        with torch.device(device):
            return GPT(size)

    step = CONTENDERS[args.contender](Task(make_model, args.dtype, device, size.micro_batch))
    building = most(device) - before
    start_counting(device)
    tokens = [batch(size, n * dist.get_world_size() + dist.get_rank(), device) for n in range(8)]
    done = 0
    for line in sys.stdin:
        if line.strip() == "memory":
            answer = json.dumps({"building": building, "training": most(device) - before})
        else:
            settle(device)
            begun = time.perf_counter()
            for _ in range(int(line)):
                step(*tokens[done % len(tokens)])
                done += 1
            settle(device)
            answer = str((time.perf_counter() - begun) / int(line))
        out.write(answer + "\n")
        out.flush()


def quiet():  # type: ignore[no-untyped-def]
    """Standard output for the answers alone; what anybody prints goes to the error stream."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start_counting(device: torch.device) -> int:
    """Bytes held now, from which the most is counted: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError):
        memory.reset_peak()
    return memory.resident()


def most(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return memory.peak_resident()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
