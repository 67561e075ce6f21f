"""The process groups that every rank has when nothing but data is divided, under the names that clients ask for.

A model that is divided in other ways carries its groups itself, in the grid of its ``PipelineModule``.
"""

from __future__ import annotations

from typing import Any

from zeropipe.comm.group import world
from zeropipe.errors import UsageError


def get_world_group() -> Any:
    """The process group of all ranks."""
    return world().pg


def get_data_parallel_group() -> Any:
    """The process group of all ranks, which all hold different data."""
    return world().pg


def get_data_parallel_rank() -> int:
    return world().rank


def get_data_parallel_world_size() -> int:
    return world().size


# Tensors and sequences are not divided among ranks, so each rank is a model- and a sequence-parallel group of one.


def get_model_parallel_rank() -> int:
    return 0


def get_model_parallel_world_size() -> int:
    return 1


_get_sequence_parallel_rank = get_model_parallel_rank
_get_sequence_parallel_world_size = get_model_parallel_world_size


def _get_sequence_parallel_group() -> Any:
    """Raises UsageError."""
    raise UsageError(
        "sequence parallelism (Ulysses) is not part of zeropipe",
        fix="use torch.distributed.tensor.experimental.context_parallel, or shorter sequences",
    )
