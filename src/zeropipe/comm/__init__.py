"""What users call: ``torch.distributed``'s own names, plus ours for starting up, recording and grouping.

``zeropipe.comm.all_reduce`` and every other name that is not ours is torch.distributed's function itself.
"""

from typing import Any

import torch.distributed as _dist

from zeropipe.comm.group import Group
from zeropipe.comm.record import Event, record
from zeropipe.comm.startup import init_distributed

__all__ = ["Event", "Group", "init_distributed", "record"]


def __getattr__(name: str) -> Any:
    try:
        return getattr(_dist, name)
    except AttributeError:
        raise AttributeError(f"module 'zeropipe.comm' has no attribute {name!r}") from None
