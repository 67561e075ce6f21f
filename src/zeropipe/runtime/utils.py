"""Small tools under the path where DeepSpeed users look for them."""

from __future__ import annotations

import gc
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from zeropipe.comm.group import world
from zeropipe.given import Tree
from zeropipe.utils.logging import logger


@contextmanager
def collecting_later() -> Iterator[None]:
    """Let Python look for garbage in cycles after the block, in which many objects are made that stay."""
    # A full search visits every object of the process and comes each time their number has grown by a quarter: five
    # times while 16,000 small tensors are cut, half of all the time. What a block frees goes with its last reference.
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def move_to_device(
    item: Tree, device: torch.device | str, criterion_func: Callable[[Any], bool] = torch.is_tensor
) -> Any:
    """``item`` on ``device``: what ``criterion_func`` accepts, also inside lists, tuples and dicts."""
    if criterion_func(item):
        return item.to(device)
    if isinstance(item, (list, tuple)):
        values = [move_to_device(value, device, criterion_func) for value in item]
        return type(item)(*values) if hasattr(item, "_fields") else type(item)(values)
    if isinstance(item, dict):
        return {key: move_to_device(value, device, criterion_func) for key, value in item.items()}
    return item


def see_memory_usage(message: str, force: bool = False) -> None:
    """With ``force``, log ``message`` and rank 0's GiB: on the GPU now and at most, in the process at most."""
    if not force or world().rank != 0:
        return
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    parts = [f"process at most {most / 2**30:.2f} GiB"]
    if torch.cuda.is_available():
        now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        parts.insert(0, f"GPU {now / 2**30:.2f} GiB, at most {peak / 2**30:.2f} GiB")
    logger.info("%s: %s", message, "; ".join(parts))
