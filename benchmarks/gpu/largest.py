"""Whether a model of so many layers trains here: builds it sharded, makes two steps, prints what it took as JSON."""

import argparse
import json
import os
import time

import torch

from benchmarks.common import memory
from benchmarks.common.model import GPT, Size, batch
from benchmarks.gpu.worker import quiet, settle

PLACES = {
    "device": {},
    "host": {key: {"device": "cpu"} for key in ("offload_optimizer", "offload_param")},
}


def main() -> None:
    args = arguments()
    out = quiet()
    torch.set_num_threads(os.cpu_count() or 1)  # the step of what lies in host memory is the CPU's
    import zeropipe

    zeropipe.init_distributed("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
    device = torch.device(args.device)
    wide = args.device == "cuda"
    size = Size(
        layers=args.layers,
        width=4096 if wide else 256,
        heads=32 if wide else 4,
        vocabulary=32768 if wide else 512,
        context=1024 if wide else 64,
        micro_batch=1,
    )
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, **PLACES[args.state]},
    }
    with zeropipe.zero.Init(config_dict_or_path=config), torch.device(device):
        model = GPT(size)
    engine, *_ = zeropipe.initialize(model=model, config=config)
    seconds = []
    for number in range(2):
        settle(device)
        begun = time.perf_counter()
        loss = engine(*batch(size, number, device))
        engine.backward(loss)
        engine.step()
        settle(device)
        seconds.append(time.perf_counter() - begun)
    found = {
        "parameters": sum(p.ds_numel for p in engine.module.parameters()),
        "step_seconds": seconds[-1],
        "loss_is_finite": bool(torch.isfinite(loss)),
        "device_peak": torch.cuda.max_memory_allocated() if wide else 0,
        "host_peak": memory.peak_resident(),
    }
    out.write(json.dumps(found) + "\n")
    out.flush()
    os._exit(0)  # giving back all that memory takes longer than the steps


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--state", choices=PLACES, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
