"""What other estimators say of one model, and what a run of the system that each speaks of takes.

Runs in processes of its own, most of them of an interpreter that has the peers::

    estimate   accelerate's training usage, DeepSpeed's stage 3 estimator, torch's MemTracker over FSDP2, ours
    run        the same model trained on two gloo ranks by that system, watched by torch's profiler
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks.common import peers
from benchmarks.common.model import GPT, SIZES, Size, batch
from benchmarks.common.rounds import ROOT

MARK = "PEER "
MODELS = {
    "GPT 34 M": replace(SIZES["34M"], micro_batch=4),
    "GPT 10 M, long": replace(SIZES["10M"], context=512, micro_batch=4),
}
RANKS = 2
TIME_LIMIT = 600  # seconds of one estimate or run
CPU = torch.device("cpu")


def compare(python: str) -> Iterator[dict[str, Any]]:
    """A row for each estimator and model; one that cannot run is left out and says why on stderr."""
    for name in MODELS:
        for estimator, (of, _, _) in ESTIMATORS.items():
            says, measured = (_ask(python, what, estimator, name) for what in ("estimate", "run"))
            if says and measured:
                yield {"model": name, "estimator": estimator, "of": of, "says": says, "measured": measured}


def _ask(python: str, what: str, estimator: str, model: str) -> int:
    ours = estimator == "zeropipe plan"
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            subprocess.Popen(
                [sys.executable if ours else python, "-m", "benchmarks.plan.peers", what, estimator, model],
                cwd=ROOT,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "DS_ACCELERATOR": "cpu",
                    "PYTHONPATH": str(ROOT),
                    "STORE": f"file://{folder}/store",
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(RANKS),
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(RANKS if what == "run" else 1)
        ]
        try:
            said = [job.communicate(timeout=TIME_LIMIT) for job in jobs]
        except subprocess.TimeoutExpired:
            sys.stderr.write(f"{estimator}, {what}: no end after {TIME_LIMIT} s\n")
            return 0
        finally:
            for job in jobs:
                job.kill()
    found = [line for out, _ in said for line in out.splitlines() if line.startswith(MARK)]
    if len(found) < len(jobs):
        sys.stderr.write(f"{estimator}, {what}: {said[0][1][-800:]}\n")
        return 0
    return max(json.loads(line.removeprefix(MARK)) for line in found)


# What each says.


def _accelerate(size: Size) -> int:
    from accelerate.utils import calculate_maximum_sizes  # type: ignore[import-not-found]

    # As its command prints "Training using Adam" in fp32: four times the model.
    with torch.device("meta"):
        model = GPT(size)
    return int(calculate_maximum_sizes(model)[0]) * 4


def _deepspeed(size: Size) -> int:
    peers.deepspeed()
    from deepspeed.runtime.zero.stage3 import (  # type: ignore[import-not-found]
        estimate_zero3_model_states_mem_needs,
    )

    with torch.device("meta"):
        model = GPT(size)
    largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())
    total = sum(p.numel() for p in model.parameters())
    # (host, device, largest layer), without offload.
    return int(estimate_zero3_model_states_mem_needs(total, largest, RANKS, 1, False, False)[1])


def _mem_tracker(size: Size) -> int:
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    mesh = init_device_mesh("cpu", (RANKS,))
    with FakeTensorMode():
        model, optimizer, step = _fsdp(size, mesh)
        tracker = FSDPMemTracker(model, optimizer)
        tracker.track_inputs(batch(size, 0, CPU))
        with tracker:
            for number in range(2):
                step(number)
                if number == 0:
                    tracker.reset_mod_stats()
    peaks = tracker.get_tracker_snapshot("peak")
    return max(int(kinds["Total"]) for kinds in peaks.values())


def _plan(size: Size) -> int:
    from benchmarks.plan.cases import Case
    from benchmarks.plan.run import planned
    from zeropipe.planning.devices import KNOWN

    return planned(Case(3, size=size), KNOWN["cpu"]).fullest.peak.peak


# What a run of each takes: a step with a number, after whatever has to be built.


def _fsdp(size: Size, mesh: Any) -> tuple[torch.nn.Module, torch.optim.Optimizer, Callable[[int], None]]:
    from torch.distributed.fsdp import fully_shard

    model = GPT(size)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return model, optimizer, _plainly(model, optimizer, size)


def _plainly(model: Any, optimizer: torch.optim.Optimizer, size: Size) -> Callable[[int], None]:
    def step(number: int) -> None:
        model(*batch(size, number, CPU)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _run_plain(size: Size) -> Callable[[int], None]:
    model = GPT(size)
    return _plainly(model, torch.optim.AdamW(model.parameters(), lr=1e-4), size)


def _run_fsdp(size: Size) -> Callable[[int], None]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group(
        "gloo", init_method=os.environ["STORE"], rank=int(os.environ["RANK"]), world_size=RANKS
    )
    return _fsdp(size, init_device_mesh("cpu", (RANKS,)))[2]


def _run_engine(module: str) -> Callable[[Size], Callable[[int], None]]:
    def begin(size: Size) -> Callable[[int], None]:
        import importlib

        import torch.distributed as dist

        rank = int(os.environ["RANK"])
        dist.init_process_group("gloo", init_method=os.environ["STORE"], rank=rank, world_size=RANKS)
        system: Any = peers.deepspeed() if module == "deepspeed" else importlib.import_module(module)
        config = {
            "train_micro_batch_size_per_gpu": size.micro_batch,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
            "zero_optimization": {"stage": 3},
        }
        with system.zero.Init(config_dict_or_path=config):
            model = GPT(size)
        engine, *_ = system.initialize(model=model, config=config)

        def step(number: int) -> None:
            loss = engine(*batch(size, number, CPU))
            engine.backward(loss)
            engine.step()

        return step

    return begin


Estimate, Begin = Callable[[Size], int], Callable[[Size], Callable[[int], None]]
ESTIMATORS: dict[str, tuple[str, Estimate, Begin]] = {
    "zeropipe plan": ("zeropipe, stage 3", _plan, _run_engine("zeropipe")),
    "torch's FSDP2 MemTracker": ("FSDP2", _mem_tracker, _run_fsdp),
    "DeepSpeed's estimator": ("DeepSpeed, stage 3", _deepspeed, _run_engine("deepspeed")),
    "accelerate estimate-memory": ("plain PyTorch with AdamW", _accelerate, _run_plain),
}


def _measure(begin: Begin, size: Size) -> int:
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.plan.watching import allocated_peak

    watching = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    watching.start()
    step = begin(size)
    for number in range(2):
        step(number)
    watching.stop()
    return allocated_peak(watching)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("estimate", "run"))
    parser.add_argument("estimator", choices=ESTIMATORS)
    parser.add_argument("model", choices=MODELS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    _, estimate, begin = ESTIMATORS[args.estimator]
    size = MODELS[args.model]
    found = estimate(size) if args.what == "estimate" else _measure(begin, size)
    print(MARK + json.dumps(found), flush=True)
    os._exit(0)  # not through what a system leaves for the end


if __name__ == "__main__":
    main()
