"""What is planned and then run: a small GPT at one configuration of two ranks."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zeropipe
from benchmarks.common.model import GPT, Block, Size, batch
from benchmarks.pipeline.model import classes, cut, loss
from zeropipe.pipe import LayerSpec, PipelineModule

RANKS = 2
MEDIUM = Size(layers=6, width=512, heads=8, vocabulary=8192, context=128, micro_batch=4)


@dataclass(frozen=True)
class Case:
    """One configuration; ``schedule``: of a pipeline of two stages, empty for none; ``offload``: what goes to files."""

    stage: int = 0
    dtype: str = "fp32"
    accumulation: int = 1
    recompute: bool = False
    schedule: str = ""
    offload: str = ""  # optimizer, or optimizer and params
    size: Size = field(default=MEDIUM)

    def __str__(self) -> str:
        parts = [f"stage {self.stage}", self.dtype]
        parts += [f"accumulation {self.accumulation}"] if self.accumulation > 1 else []
        parts += ["recompute"] if self.recompute else []
        parts += [f"pipeline {self.schedule}"] if self.schedule else []
        parts += [f"{self.offload} in files"] if self.offload else []
        return ", ".join(parts)

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32

    def config(self, folder: str) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.stage}
        for part in ("optimizer", "param"):
            if part in self.offload:
                zero[f"offload_{part}"] = {"device": "nvme", "nvme_path": folder}
        return {
            "train_micro_batch_size_per_gpu": self.size.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
            "zero_optimization": zero,
            "bf16": {"enabled": self.dtype == "bf16"},
            **({"pipeline": {"schedule": self.schedule}} if self.schedule else {}),
        }


class Recomputing(nn.Module):
    """A block whose activations are made again in backward."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = checkpoint(self.block, x, use_reentrant=False)
        return made


def _module(case: Case) -> nn.Module:
    if case.schedule:
        return PipelineModule(
            [LayerSpec(kind, case.size) for kind in classes(case.size)],
            num_stages=RANKS,
            loss_fn=loss,
            partition_method=cut(case.size, _stages(case.schedule)),
            activation_checkpoint_interval=int(case.recompute),
            schedule=case.schedule,
        )
    model = GPT(case.size)
    if case.recompute:
        model.blocks = nn.ModuleList(map(Recomputing, model.blocks))  # type: ignore[arg-type]
    return model


def _stages(schedule: str) -> int:
    return RANKS * (2 if schedule in ("interleaved", "zbv") else 1)


def _batches(case: Case) -> Iterator[tuple[Tensor, Tensor]]:
    seed = 0
    while True:
        seed += 1
        yield batch(case.size, seed, torch.device("cpu"))


def begin(case: Case, folder: str) -> tuple[Any, Callable[[], None]]:
    """The engine of ``case``, and what makes one optimizer step with it. Files go to ``folder``."""
    config = case.config(folder)
    torch.manual_seed(0)
    if case.stage == 3 and not case.schedule:
        with zeropipe.zero.Init(config_dict_or_path=config):
            model = _module(case)
    else:
        model = _module(case)
    engine, *_ = zeropipe.initialize(model=model, config=config)
    del model
    batches = _batches(case)

    def step() -> None:
        if case.schedule:
            engine.train_batch(batches)
            return
        for _ in range(case.accumulation):
            value = engine(*next(batches))
            engine.backward(value)
            del value
            engine.step()

    return engine, step


def chosen() -> list[Case]:
    """The 24 configurations of the table."""
    plain = [Case(stage, dtype) for dtype in ("fp32", "bf16") for stage in range(4)]
    accumulated = [Case(stage, accumulation=3) for stage in range(4)]
    recomputed = [Case(stage, "bf16", 2, recompute=True) for stage in range(4)]
    piped = [
        Case(0, "fp32", 4, schedule="1f1b"),
        Case(1, "bf16", 4, recompute=True, schedule="gpipe"),
        Case(1, "fp32", 4, schedule="zb-h1"),
    ]
    offloaded = [
        Case(3, offload="optimizer"),
        Case(3, "bf16", offload="optimizer"),
        Case(3, "bf16", 3, offload="optimizer and param"),
        Case(3, offload="optimizer and param"),
        Case(3, "bf16", 2, recompute=True, offload="optimizer and param"),
    ]
    return [*plain, *accumulated, *recomputed, *piped, *offloaded]


def drawn(seed: int) -> Case:
    """A random configuration and size."""
    pick = random.Random(seed)
    schedule = pick.choice(["", "", "", "1f1b", "gpipe", "zb-h1"])
    stage = pick.choice([0, 1]) if schedule else pick.choice([0, 1, 2, 3])
    offload = pick.choice(["", "", "", "optimizer", "optimizer and param"]) if not schedule else ""
    if stage < 3:  # others offload to the host's memory alone, which is this one
        offload = ""
    heads = pick.choice([2, 4, 8])
    size = Size(
        layers=pick.choice([2, 3, 4, 6, 9]),
        width=heads * pick.choice([32, 48, 64]),
        heads=heads,
        vocabulary=pick.choice([512, 2048, 10000, 20000]),
        context=pick.choice([32, 64, 128, 200]),
        micro_batch=pick.choice([1, 2, 3, 6]),
    )
    dtype, accumulation, recompute = (pick.choice(some) for some in (["fp32", "bf16"], [1, 2, 4], [0, 1]))
    return Case(stage, str(dtype), int(accumulation), bool(recompute), schedule, offload, size)


def timed() -> list[Case]:
    """The 8 configurations whose steps are timed."""
    return [
        Case(0),
        Case(1, "bf16"),
        Case(2, accumulation=2),
        Case(3),
        Case(3, "bf16", recompute=True),
        Case(1, recompute=True, size=Size(4, 768, 12, 4096, 64, 2)),
        Case(2, "bf16", 3, size=Size(10, 256, 4, 16384, 200, 3)),
        Case(0, "fp32", 4, schedule="1f1b"),
    ]
