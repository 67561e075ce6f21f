"""Every way to train the same model that the benchmarks compare: a name, and how one training step is made.

Each builder takes a `Task` and returns `step(x, y) -> loss`, a whole optimizer step with AdamW. Nobody clips
gradients. In bf16 every contender keeps fp32 master values: DDP and ZeroRedundancyOptimizer by autocast, FSDP2 by
its mixed-precision policy, DeepSpeed and zeropipe by their `bf16` section.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import peers

Step = Callable[[Tensor, Tensor], Tensor]
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Task:
    make_model: Callable[[], nn.Module]
    dtype: str  # "fp32" or "bf16"
    device: torch.device
    micro_batch: int
    zero: dict[str, Any] = field(default_factory=dict)  # more keys of `zero_optimization`


Builder = Callable[[Task], Step]


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)


def _precision(task: Task) -> AbstractContextManager[Any]:
    return torch.autocast(task.device.type, torch.bfloat16) if task.dtype == "bf16" else nullcontext()


def _loop(model: nn.Module, optimizer: torch.optim.Optimizer, precision: AbstractContextManager[Any]) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        with precision:
            loss = model(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def plain(task: Task) -> Step:
    """The loop that anyone writes for one process."""
    model = task.make_model().to(task.device)
    return _loop(model, _adamw(model.parameters()), _precision(task))


def ddp(task: Task) -> Step:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(task.make_model().to(task.device), gradient_as_bucket_view=True)
    return _loop(model, _adamw(model.parameters()), _precision(task))


def zero_redundancy_optimizer(task: Task) -> Step:
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(task.make_model().to(task.device), gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(),
        optimizer_class=torch.optim.AdamW,
        parameters_as_bucket_view=True,
        lr=LEARNING_RATE,
        fused=True,
    )
    return _loop(model, optimizer, _precision(task))


def fsdp2(reshard: bool) -> Builder:
    """FSDP2, one unit per block; `reshard` frees the blocks between forward and backward, as ZeRO-3 does."""

    def build(task: Task) -> Step:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(task.device.type, (torch.distributed.get_world_size(),))
        mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        policy = mixed if task.dtype == "bf16" else MixedPrecisionPolicy()
        model = task.make_model().to(task.device)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
        fully_shard(model, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
        return _loop(model, _adamw(model.parameters()), nullcontext())

    return build


def _config(task: Task, stage: int) -> dict[str, Any]:
    """One configuration for the two systems that read the same keys."""
    return {
        "train_micro_batch_size_per_gpu": task.micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage} | task.zero,
        "bf16": {"enabled": task.dtype == "bf16"},
    }


def _engine_step(engine: Any) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = engine(x, y)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def deepspeed(stage: int) -> Builder:
    def build(task: Task) -> Step:
        model = task.make_model()
        engine, *_ = peers.deepspeed().initialize(
            model=model, optimizer=_adamw(model.parameters()), config=_config(task, stage)
        )
        return _engine_step(engine)

    return build


def zeropipe(stage: int, init: bool = False) -> Builder:
    """`init`: build the model under `zero.Init`, each module's parameters sharded as soon as it is made."""

    def build(task: Task) -> Step:
        import zeropipe

        config = _config(task, stage)
        with zeropipe.zero.Init(config_dict_or_path=config) if init else nullcontext():
            model = task.make_model()
        engine, *_ = zeropipe.initialize(model=model, optimizer=_adamw(model.parameters()), config=config)
        return _engine_step(engine)

    return build


CONTENDERS: dict[str, Builder] = {
    "plain": plain,
    "ddp": ddp,
    "zero_redundancy_optimizer": zero_redundancy_optimizer,
    "fsdp2": fsdp2(reshard=True),
    "fsdp2_no_reshard": fsdp2(reshard=False),
    **{f"deepspeed_{stage}": deepspeed(stage) for stage in range(4)},
    **{f"zeropipe_{stage}": zeropipe(stage) for stage in range(4)},
    "zeropipe_3_init": zeropipe(3, init=True),
}
