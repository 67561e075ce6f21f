"""Words about groups of ranks, communication and random states that scripts import from DeepSpeed.

Behind ``deepspeed.comm``, ``utils.groups`` and ``checkpointing``. Nothing but data is divided here, so the
data-parallel group is the world, and tensors, sequences and experts have groups of one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Final

import torch

from zeropipe.checkpointing import (
    MODEL_PARALLEL_RNG,
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
)
from zeropipe.comm.collectives import all_gather
from zeropipe.comm.group import from_process_group, world
from zeropipe.comm.record import SEAM
from zeropipe.errors import UsageError
from zeropipe.given import Anything, ProcessGroup

# deepspeed.comm


def get_world_group() -> Any:
    """The process group of all ranks."""
    return world().pg


def get_local_rank() -> int:
    """This process's number on its node, as torchrun says it; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def allgather_fn(
    output_tensor: torch.Tensor,
    input_tensor: torch.Tensor,
    group: ProcessGroup = None,
    async_op: bool = False,
    debug: object = None,
) -> Any:
    """All ranks' ``input_tensor`` one after the other in ``output_tensor``."""
    ranks = world() if group is None else from_process_group(group)
    work = all_gather(
        output_tensor.view(-1), input_tensor.reshape(-1), ranks, label="allgather_fn", async_op=async_op
    )
    return work if async_op else None


def has_all_gather_into_tensor() -> bool:
    return True


def has_reduce_scatter_tensor() -> bool:
    return True


def has_coalescing_manager() -> bool:
    """False: what is sent together here goes as one tensor."""
    return False


def has_all_reduce_coalesced() -> bool:
    return False


def mpi_discovery(distributed_port: int = 29500, verbose: bool = True) -> None:
    """Raises UsageError."""
    raise UsageError("ranks are not discovered through MPI here", fix="start the script with torchrun")


def configure(
    deepspeed_config: Anything = None,
    enabled: bool | None = None,
    prof_all: bool | None = None,
    prof_ops: Sequence[str] | None = None,
    verbose: bool | None = None,
    debug: bool | None = None,
) -> None:
    """Count collectives from now on (or no more), as the section ``comms_logger`` or the arguments say."""
    section = getattr(deepspeed_config, "comms_logger", None)
    if not (enabled if enabled is not None else getattr(section, "enabled", False)):
        SEAM.log.stop()
        return
    every = prof_all if prof_all is not None else getattr(section, "prof_all", True)
    only = prof_ops if prof_ops is not None else getattr(section, "prof_ops", ())
    SEAM.log.start(None if every and prof_ops is None else only)


# deepspeed.utils.groups

mpu: Final = None  # nobody gave one


def _get_broadcast_src_rank() -> int:
    """The global rank from which a data-parallel group gets its first values."""
    return world().ranks[0]


def _get_model_parallel_world_size() -> int:
    return 1


def _get_zero_param_intra_parallel_group() -> None:
    """None: mics_shard_size and zero_hpz_partition_size make their groups inside the engine."""


# deepspeed.checkpointing

_MODEL_PARALLEL_RNG_TRACKER_NAME: Final = MODEL_PARALLEL_RNG
_CUDA_RNG_STATE_TRACKER: Final = get_cuda_rng_tracker()


def _set_cuda_rng_state(new_state: torch.Tensor, device: int = -1) -> None:
    """Set the random state of a GPU (-1: the current one), or of the CPU where there is none."""
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(new_state, "cuda" if device == -1 else device)
    else:
        torch.set_rng_state(new_state)


def model_parallel_reconfigure_tp_seed(seed: int) -> None:
    """Start the model-parallel random state anew from ``seed``, another one on each model-parallel rank."""
    model_parallel_cuda_manual_seed(seed)


def detach_variable(inputs: tuple[Any, ...], device: torch.device | str | None = None) -> tuple[Any, ...]:
    """The inputs without their graphs; each keeps whether it wants a gradient."""
    if not isinstance(inputs, tuple):
        raise TypeError(f"a tuple of inputs is expected, found {type(inputs).__name__}")

    def detached(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        moved = value if device is None else value.to(device)
        return moved.detach().requires_grad_(value.requires_grad)

    return tuple(map(detached, inputs))
