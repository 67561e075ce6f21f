"""A world in which this process stands for one rank and nobody else is there: nothing is sent, and what the others
would say is what this rank says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork
from torch.testing._internal.distributed.fake_pg import FakeStore  # importing it registers the backend

from zeropipe.errors import UsageError
from zeropipe.given import Anything

NAMESPACE = "c10d"  # of torch's operators that communicate


@contextmanager
def imagine(rank: int, world_size: int) -> Iterator[None]:
    """Be ``rank`` of a world of ``world_size`` inside the block.

    Raises UsageError where torch.distributed runs already.
    """
    if dist.is_initialized():
        raise UsageError(
            "torch.distributed runs already", fix="imagine a world in a process that has not joined one"
        )
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def left_out(func: Anything, args: tuple[Any, ...]) -> Any:
    """What the collective ``func`` (an operator of torch's) returns where its tensors are neither read nor written."""
    # torch's own fake group copies what it can, and so asks for all the memory that a plan is to do without.
    found = [FakeWork().boxed() if "Work" in str(one.type) else args[0] for one in func._schema.returns]
    return found[0] if len(found) == 1 else tuple(found)
