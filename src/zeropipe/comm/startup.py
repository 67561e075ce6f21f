"""Joins this process to torch.distributed: under torchrun, inside a started world, or alone."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from zeropipe.errors import ConfigError

_ENV = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int | None = None,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Start torch.distributed once; a world that somebody else started is adopted as it is.

    ``dist_backend``: None picks gloo, or gloo for CPU tensors and NCCL for GPU tensors where there is a GPU.
    Without torchrun's variables (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and without ``init_method`` or
    ``rank``, the process is a world of one. ``auto_mpi_discovery``, ``verbose`` and ``config`` are accepted for
    the interface's sake and change nothing.

    Raises ConfigError when some of torchrun's variables are set and others are not.
    """
    if dist.is_initialized() or dist_init_required is False:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    backend = dist_backend or ("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    limits: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    if init_method is not None or rank >= 0:
        dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=world_size, **limits)
        return
    if distributed_port is not None and "RANK" in os.environ:
        os.environ.setdefault("MASTER_PORT", str(distributed_port))
    found = [name for name in _ENV if name in os.environ]
    if len(found) == len(_ENV):
        dist.init_process_group(backend, **limits)
    elif "RANK" in found or "WORLD_SIZE" in found:
        missing = [name for name in _ENV if name not in found]
        raise ConfigError(
            "the environment describes a distributed run only in part",
            expected="all of " + ", ".join(_ENV),
            found="no " + ", ".join(missing),
            fix="start the script with torchrun, which sets all four",
        )
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **limits)


def node_size() -> int:
    """Ranks on this node, of which each has its own process: torchrun's LOCAL_WORLD_SIZE, 1 where it is not set.

    Consecutive ranks are a node. Raises ConfigError where the variable is no number.
    """
    found = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not found.isdigit() or int(found) < 1:
        raise ConfigError(
            "environment variable LOCAL_WORLD_SIZE",
            expected="the number of processes on this node",
            found=repr(found),
            fix="start the script with torchrun, which sets it",
        )
    return int(found)


def backends() -> tuple[str, ...]:
    """The backends that this build of torch can communicate with."""
    if not dist.is_available():
        return ()
    known = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available, "mpi": dist.is_mpi_available}
    return tuple(name for name, there in known.items() if there())
