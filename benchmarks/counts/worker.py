"""One rank that trains a small GPT in each of the cases and says what every part of one step asked of the device.

Started by ``run.py`` under torchrun, once for each contender. zeropipe runs as it does over NCCL: on a backend that is
gloo under another name, and with every tensor taken for a device's.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common import peers
from benchmarks.common.model import GPT, Size, batch
from benchmarks.counts.counting import Counting, Counts

MARK = "COUNTS "
SIZE = Size(layers=6, width=64, heads=4, vocabulary=256, context=16, micro_batch=2)
PARTS = ("forward", "backward", "step")
CLIP, RATE, WARM_UP = 0.1, 1e-4, 3


@dataclass(frozen=True)
class Case:
    dtype: str
    clip: bool = False
    micro_steps: int = 1
    checked: bool = True  # bf16: an engine skips a step whose gradients are not finite


CASES = {
    "fp32": Case("fp32"),
    "fp32, clipped": Case("fp32", clip=True),
    "bf16": Case("bf16"),
    "bf16, clipped, check_grad_overflow false": Case("bf16", clip=True, checked=False),
    "bf16, 4 micro-batches": Case("bf16", micro_steps=4),
    "fp16": Case("fp16"),
}


@dataclass
class Trainer:
    """``last``: whether it is the micro-batch before a step. ``host``: tensors that lie in host memory on a GPU too."""

    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, bool], None]
    step: Callable[[], None]
    host: Callable[[], list[Tensor]] = list
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    every_micro_step: bool = False  # ``step`` belongs to each micro-batch


def of_torch(
    model: Any, case: Case, cast: AbstractContextManager[Any], hold: Callable[[bool], None]
) -> Trainer:
    """The loop of plain PyTorch; ``hold`` is told before each backward whether gradients stay on their rank."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=case.dtype == "fp16")

    def forward(x: Tensor, y: Tensor) -> Tensor:
        with cast:
            return model(x, y)  # type: ignore[no-any-return]

    def backward(loss: Tensor, last: bool) -> None:
        hold(not last)
        scaler.scale(loss / case.micro_steps if case.micro_steps > 1 else loss).backward()

    def step() -> None:
        if case.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return Trainer(forward, backward, step)


def autocast(case: Case) -> AbstractContextManager[Any]:
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast("cpu", dtypes[case.dtype]) if case.dtype in dtypes else nullcontext()


def plain(case: Case) -> Trainer:
    return of_torch(GPT(SIZE), case, autocast(case), lambda _: None)


def ddp(case: Case) -> Trainer:
    model = torch.nn.parallel.DistributedDataParallel(GPT(SIZE), gradient_as_bucket_view=True)

    def hold(local: bool) -> None:
        model.require_backward_grad_sync = not local

    return of_torch(model, case, autocast(case), hold)


def fsdp2(case: Case) -> Trainer:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if case.dtype == "fp16":
        raise NotImplementedError("GradScaler does not take DTensors on a CPU")
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = mixed if case.dtype == "bf16" else MixedPrecisionPolicy()
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    model: Any = GPT(SIZE)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return of_torch(model, case, nullcontext(), lambda local: model.set_requires_gradient_sync(not local))


def engine(system: str, stage: int) -> Callable[[Case], Trainer]:
    """``zeropipe`` or ``deepspeed``, which read one configuration."""

    def build(case: Case) -> Trainer:
        model = GPT(SIZE)
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": SIZE.micro_batch,
            "gradient_accumulation_steps": case.micro_steps,
            "gradient_clipping": CLIP if case.clip else 0.0,
            # Every block of FSDP2 is gathered and freed: no parameter is small enough here to stay.
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        }
        if case.dtype == "bf16":
            config["bf16"] = {"enabled": True, "check_grad_overflow": case.checked}
        if case.dtype == "fp16":
            config["fp16"] = {"enabled": True, "initial_scale_power": 8}
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
        made, *_ = importlib.import_module(system).initialize(
            model=model, optimizer=optimizer, config=config, model_parameters=model.parameters()
        )
        return Trainer(
            made, lambda loss, _: made.backward(loss), made.step, around=afar(system), every_micro_step=True
        )

    return build


def afar(system: str) -> Callable[[], AbstractContextManager[Any]]:
    if system != "zeropipe":
        return nullcontext
    from zeropipe.tensor.host import HOST

    return HOST.afar


CONTENDERS: dict[str, Callable[[Case], Trainer]] = {
    "plain": plain,
    "ddp": ddp,
    "fsdp2": fsdp2,
    **{
        f"{system}_{stage}": engine(system, stage)
        for system in ("zeropipe", "deepspeed")
        for stage in range(4)
    },
}


def counted_step(trainer: Trainer, case: Case, seed: int) -> dict[str, Counts]:
    """One optimizer step."""
    found = {part: Counts() for part in PARTS}

    @contextmanager
    def counting(part: str) -> Iterator[None]:
        with Counting(trainer.host()) as counts:
            yield
        for name, value in counts.figures().items():
            setattr(found[part], name, getattr(found[part], name) + value)
        found[part].where += counts.where

    with trainer.around():
        for micro_step in range(case.micro_steps):
            x, y = batch(SIZE, seed + micro_step, torch.device("cpu"))
            last = micro_step + 1 == case.micro_steps
            with counting("forward"):
                loss = trainer.forward(x, y)
            with counting("backward"):
                trainer.backward(loss, last)
            if last or trainer.every_micro_step:
                with counting("step"):
                    trainer.step()
    return found


def begin(contender: str) -> None:
    backend = "gloo"
    if contender.startswith("zeropipe"):
        backend = "strict"  # zeropipe knows gloo by name alone

        def make(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
            return dist.ProcessGroupGloo(store, rank, size, timeout)

        dist.Backend.register_backend(backend, make, devices=["cpu"])
    if contender.startswith("deepspeed"):
        peers.deepspeed().init_distributed(dist_backend=backend)
    else:
        dist.init_process_group(backend)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.counts.worker")
    parser.add_argument("contender", choices=CONTENDERS)
    contender = parser.parse_args().contender
    torch.set_num_threads(1)
    begin(contender)
    for name, case in CASES.items():
        torch.manual_seed(0)
        try:
            trainer = CONTENDERS[contender](case)
            for seed in range(0, WARM_UP * case.micro_steps, case.micro_steps):
                found = counted_step(trainer, case, seed)
        except Exception as error:  # a peer's limit is a line of the table
            said: dict[str, Any] = {"why_not": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
        else:
            said = {part: counts.figures() | {"where": counts.where} for part, counts in found.items()}
        if dist.get_rank() == 0:
            print(MARK + json.dumps({"contender": contender, "case": name, **said}), flush=True)
        dist.barrier()
    os._exit(0)  # a peer's clean-up takes no part in it


if __name__ == "__main__":
    main()
