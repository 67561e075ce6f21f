"""What users call: ``torch.distributed``'s own names, plus ours for starting up, recording and grouping.

``zeropipe.comm.all_reduce`` and every other name that is not ours is torch.distributed's function itself.
"""

from importlib import import_module
from typing import Any

import torch.distributed as _dist

from zeropipe.comm.group import Group
from zeropipe.comm.record import Event, record
from zeropipe.comm.startup import init_distributed

__all__ = ["Event", "Group", "init_distributed", "record"]


# Built on top of this layer, so looked up only when asked for.
_ABOVE = {"compressed_all_reduce": "zeropipe.runtime.fp16.onebit.exchange"}


def __getattr__(name: str) -> Any:
    if name in _ABOVE:
        return getattr(import_module(_ABOVE[name]), name)
    try:
        return getattr(_dist, name)
    except AttributeError:
        raise AttributeError(f"module 'zeropipe.comm' has no attribute {name!r}") from None
