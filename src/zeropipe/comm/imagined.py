"""A world in which this process stands for one rank and nobody else is there: nothing is sent, and what the others
would say is what this rank says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork
from torch.testing._internal.distributed.fake_pg import FakeStore  # importing it registers the backend

from zeropipe.errors import UsageError
from zeropipe.given import Anything

NAMESPACE = "c10d"  # of torch's operators that communicate


@contextmanager
def imagine(rank: int, world_size: int) -> Iterator[None]:
    """Be ``rank`` of a world of ``world_size`` inside the block, whatever world the program then asks to join.

    Raises UsageError where torch.distributed runs already.
    """
    if dist.is_initialized():
        raise UsageError(
            "torch.distributed runs already", fix="imagine a world in a process that has not joined one"
        )
    start = dist.init_process_group

    def join(*given: Any, **named: Any) -> None:
        """In place of init_process_group: this world is there already, or is made again."""
        for name, there, index in (("world_size", world_size, 3), ("rank", rank, 4)):
            asked = given[index] if len(given) > index else named.get(name, -1)
            if asked not in (-1, there):
                raise UsageError(
                    f"init_process_group asks for another {name} than is planned", expected=there, found=asked
                )
        if not dist.is_initialized():
            start("fake", rank=rank, world_size=world_size, store=FakeStore())

    join()
    with ExitStack() as changes:
        for name, replaced in (("init_process_group", join), *_alone(rank, dist.new_group)):
            changes.enter_context(patch.object(dist, name, replaced))
            # torch's own callers took the name from where it is defined.
            changes.enter_context(patch.object(dist.distributed_c10d, name, replaced))
        try:
            yield
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _alone(rank: int, new_group: Anything) -> Iterator[tuple[str, Callable[..., Any]]]:
    """What torch does with more than tensors: a group of any backend is one of this world, an object of anybody is
    this rank's."""

    def group(*given: Any, **named: Any) -> Any:
        # ranks, timeout, backend
        return new_group(*given[:2], **{**named, "backend": None, "device_id": None})

    def all_gather(object_list: list[Any], obj: Any, *_: Any, **__: Any) -> None:
        object_list[:] = [obj] * len(object_list)

    def gather(obj: Any, object_gather_list: list[Any] | None = None, *_: Any, **__: Any) -> None:
        if object_gather_list is not None:
            object_gather_list[:] = [obj] * len(object_gather_list)

    def scatter(output: list[Any], given: list[Any] | None = None, *_: Any, **__: Any) -> None:
        if given:
            output[0] = given[rank % len(given)]

    yield "new_group", group
    yield "all_gather_object", all_gather
    yield "gather_object", gather
    yield "scatter_object_list", scatter
    yield "broadcast_object_list", lambda *_, **__: None
    yield "monitored_barrier", lambda *_, **__: None


def left_out(func: Anything, args: tuple[Any, ...]) -> Any:
    """What the collective ``func`` (an operator of torch's) returns where its tensors are neither read nor written."""
    # torch's own fake group copies what it can, and so asks for all the memory that a plan is to do without.
    found = [FakeWork().boxed() if "Work" in str(one.type) else args[0] for one in func._schema.returns]
    return found[0] if len(found) == 1 else tuple(found)
