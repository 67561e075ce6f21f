"""One step of stage 3 under torch's profiler: a trace for a viewer, and where host and device meet, as JSON."""

import argparse
import json
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.contenders import CONTENDERS, Task
from benchmarks.common.model import GPT, SIZES, batch
from benchmarks.common.worker import begin
from benchmarks.gpu.worker import quiet, settle

# What makes the host wait for the device, in torch's words and in the driver's.
MEETINGS = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
)
SHOWN = 12


def main() -> None:
    args = arguments()
    out = quiet()
    device = torch.device(args.device)
    begin(args.contender, "nccl" if args.device == "cuda" else "gloo")
    size = SIZES[args.size]

    def make_model() -> GPT:
        torch.manual_seed(0)
        with torch.device(device):
            return GPT(size)

    step = CONTENDERS[args.contender](Task(make_model, "bf16", device, size.micro_batch))
    tokens = batch(size, 0, device)
    for _ in range(4):
        step(*tokens)
    settle(device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if args.device == "cuda" else [])
    with profile(activities=activities) as seen:
        step(*tokens)
    settle(device)
    seen.export_chrome_trace(str(args.out))
    rows = seen.key_averages()

    def on_device(row: object) -> float:
        return float(getattr(row, "self_device_time_total", 0.0))

    meetings = {row.key: row.count for row in rows if row.key in MEETINGS}
    copies = {row.key: row.count for row in rows if row.key.startswith("Memcpy")}
    launches = sum(row.count for row in rows if "LaunchKernel" in row.key)
    longest = sorted(rows, key=on_device if args.device == "cuda" else lambda r: r.self_cpu_time_total)[
        -SHOWN:
    ]
    found = {
        "meetings": meetings,
        "copies": copies,
        "launches": launches,
        "host_ms": sum(row.self_cpu_time_total for row in rows) / 1e3,
        "device_ms": sum(map(on_device, rows)) / 1e3,
        "longest": [
            {
                "name": row.key[:80],
                "calls": row.count,
                "host_us": row.self_cpu_time_total,
                "device_us": on_device(row),
            }
            for row in reversed(longest)
        ],
    }
    out.write(json.dumps(found) + "\n")
    out.flush()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contender", choices=CONTENDERS, default="zeropipe_3")
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="the trace; .gz compresses it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
