"""What users call: ``torch.distributed``'s own names, plus ours for starting up, recording and grouping.

``zeropipe.comm.all_reduce`` and every other name that is not ours is torch.distributed's function itself.
"""

from typing import Any

import torch.distributed as _dist

from zeropipe.comm.group import Group, init_distributed
from zeropipe.comm.record import Event, record
from zeropipe.names import lazy

__all__ = ["Event", "Group", "init_distributed", "record"]


_ours, _ = lazy(__name__)


def __getattr__(name: str) -> Any:
    try:
        return _ours(name)
    except AttributeError:
        if not hasattr(_dist, name):
            raise
        return getattr(_dist, name)
