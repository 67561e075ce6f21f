"""What DeepSpeed's modules tell about themselves: versions, what was compiled, defaults of a launch.

Behind ``deepspeed.version``, ``git_version_info``, ``constants`` and ``ops.__compatible_ops__``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Final

import torch

from zeropipe.accelerator import get_accelerator
from zeropipe.compat.table import VERSION

# deepspeed.version, deepspeed.git_version_info
version: Final = VERSION
git_hash: Final = "unknown"  # an installed zeropipe knows no commit
git_branch: Final = "unknown"
accelerator_name: Final[str] = get_accelerator()._name
# Nothing is compiled, so no operation is installed or compatible: who asks takes the way without it.
installed_ops: Final[Mapping[str, bool]] = MappingProxyType({})
compatible_ops: Final[Mapping[str, bool]] = MappingProxyType({})
torch_info: Final[dict[str, Any]] = {
    "version": ".".join(torch.__version__.split(".")[:2]),
    "bf16_support": True,
    "cuda_version": torch.version.cuda or "0.0",
    "hip_version": torch.version.hip or "0.0",
    "nccl_version": "0.0",
}

# deepspeed.constants
TORCH_DISTRIBUTED_DEFAULT_PORT: Final = 29500
CROSS_RANK: Final = "CROSS_RANK"
CROSS_SIZE: Final = "CROSS_SIZE"
default_pg_timeout: Final = timedelta(minutes=30)

# deepspeed.runtime.engine: what ``initialize(optimizer=)`` and ``initialize(lr_scheduler=)`` also take.
DeepSpeedOptimizerCallable = Callable[[Iterable[Any]], torch.optim.Optimizer]
DeepSpeedSchedulerCallable = Callable[[torch.optim.Optimizer], Any]
