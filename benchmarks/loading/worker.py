"""One rank of a load: builds a model from a folder of weights in one way, and says what that took.

torchrun --standalone --nproc-per-node 2 -m benchmarks.loading.worker stage3 FOLDER

plain     from_pretrained, as it is without ZeRO: every rank the whole model
stage3    the same line under a configuration of stage 3, on whichever ``deepspeed`` this interpreter has
init      zero.Init(weights=FOLDER) around the model's own constructor
"""

import argparse
import json
import os
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common.memory import peak_resident, reset_peak, resident

MARK = "LOADED "
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3},
}


def main() -> None:
    arguments = _arguments()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    kept: list[Any] = []
    if arguments.way == "stage3":
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig

        deepspeed.init_distributed("gloo")
        kept.append(HfDeepSpeedConfig(CONFIG))
    else:
        import zeropipe

    def load(folder: Path) -> torch.nn.Module:
        if arguments.way != "init":
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)  # type: ignore[no-any-return]
        config = AutoConfig.from_pretrained(folder)
        with no_init_weights(), zeropipe.zero.Init(config_dict_or_path=CONFIG, weights=folder):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-any-return]

    load(arguments.folder / "tiny")  # what the first use costs: modules of Python, threads, connections
    dist.barrier()
    before, read = resident(), _read()
    mapped = Mapped(arguments.folder)
    reset_peak()
    start = time.perf_counter()
    with mapped:
        model = load(arguments.folder)
    seconds = time.perf_counter() - start
    params = list(model.parameters())
    found = {
        "peak": peak_resident() - before,
        "resident": resident() - before,
        "read": _read() - read - mapped.looked,
        "mapped": mapped.most,
        "seconds": seconds,
        "shard": sum(_held(param) for param in params) * 2,
        "largest": max(_whole(param) for param in params) * 2,
        "bits": _bits(model, rank),
    }
    every: list[Any] = [None] * world
    dist.all_gather_object(every, found)
    if rank == 0:
        print(MARK + json.dumps(every), flush=True)
    dist.destroy_process_group()


class Mapped:
    """The most bytes of the weights' files that were mapped and resident at once: what was read through a map."""

    def __init__(self, folder: Path) -> None:
        self.most = self.looked = 0  # bytes; the latter of the looking itself
        self._folder, self._done = str(folder.resolve()), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self.most = max(self.most, self._now())

    def _now(self) -> int:
        total, ours = 0, False
        text = Path("/proc/self/smaps").read_text()
        self.looked += len(text)
        for line in text.splitlines():
            if "-" in line.split(" ", 1)[0]:
                ours = self._folder in line
            elif ours and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
        return total


def _read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])  # rchar: by read and pread, from the cache too


def _held(param: Any) -> int:
    return int(param.ds_tensor.numel() if hasattr(param, "ds_tensor") else param.numel())


def _whole(param: Any) -> int:
    return int(param.ds_numel if hasattr(param, "ds_numel") else param.numel())


def _bits(model: torch.nn.Module, rank: int) -> str:
    """A digest of all parameters, by name, on rank 0."""
    import hashlib

    digest = hashlib.sha256()
    for name, param in sorted(model.named_parameters()):
        if hasattr(param, "ds_numel"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([param]):
                value = param.detach().clone()
        else:
            value = param.detach()
        if rank == 0:
            digest.update(name.encode())
            digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=("plain", "stage3", "init"))
    parser.add_argument("folder", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
