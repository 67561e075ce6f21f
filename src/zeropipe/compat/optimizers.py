"""Classes that scripts ask ``isinstance`` of: true of our one optimizer at the stage and dtype they stand for.

Behind ``deepspeed.runtime.zero.stage_1_and_2``, ``stage3``, ``mics``, ``parameter_offload``,
``runtime.bf16_optimizer``, ``fp16.fused_optimizer``, ``fp16.unfused_optimizer``, ``runtime.ZeROOptimizer`` and
``runtime.utils.DummyOptim``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from zeropipe.compat.absent import AbsentError
from zeropipe.runtime.zero.gather.hooks import ParameterOffload as DeepSpeedZeRoOffload
from zeropipe.runtime.zero.hold.optimizer import ZeroOptimizer
from zeropipe.runtime.zero.param import is_sharded as is_zero_param

__all__ = [
    "BF16_Optimizer",
    "DeepSpeedZeRoOffload",
    "DeepSpeedZeroOptimizer",
    "DeepSpeedZeroOptimizer_Stage3",
    "DummyOptim",
    "FP16_Optimizer",
    "FP16_UnfusedOptimizer",
    "MiCS_Optimizer",
    "ZeROOptimizer",
    "is_zero_param",
]


class DummyOptim:
    """Parameters in a param group and nothing else: for code that wants an optimizer where nothing is stepped."""

    def __init__(self, params: Iterable[torch.nn.Parameter]) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": list(params)}]


class _Kind(type):
    """The class of names whose instances are told by what they hold, not by what made them."""

    holds: Callable[[Any], bool]

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, ZeroOptimizer) and cls.holds(instance)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise AbsentError(
            f"{cls.__name__} is not built by hand here",
            fix="deepspeed.initialize makes the engine's optimizer, and isinstance tells what it is",
        )


def _kind(name: str, holds: Callable[[ZeroOptimizer], bool]) -> type:
    return _Kind(name, (), {"holds": staticmethod(holds), "__module__": __name__})


def _in_fp16(optimizer: ZeroOptimizer) -> bool:
    return optimizer.options.scaler is not None


def _in_bf16(optimizer: ZeroOptimizer) -> bool:
    return any(partition.dtype is torch.bfloat16 for partition in optimizer.partitions)


ZeROOptimizer = _kind("ZeROOptimizer", lambda o: o.policy.stage > 0)
DeepSpeedZeroOptimizer = _kind("DeepSpeedZeroOptimizer", lambda o: o.policy.stage in (1, 2))
DeepSpeedZeroOptimizer_Stage3 = _kind("DeepSpeedZeroOptimizer_Stage3", lambda o: o.policy.stage == 3)
MiCS_Optimizer = _kind("MiCS_Optimizer", lambda o: o.policy.stage == 3 and o.options.replicas.size > 1)
BF16_Optimizer = _kind("BF16_Optimizer", lambda o: o.policy.stage <= 1 and _in_bf16(o))
FP16_Optimizer = _kind("FP16_Optimizer", lambda o: o.policy.stage == 0 and _in_fp16(o))
FP16_UnfusedOptimizer = _kind(
    "FP16_UnfusedOptimizer",
    lambda o: o.policy.stage == 0 and _in_fp16(o) and "lamb" in type(o.optimizer).__name__.lower(),
)
