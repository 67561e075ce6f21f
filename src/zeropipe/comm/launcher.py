"""What torchrun and a rank tell each other: how often the ranks were started, and which error was the first."""

from __future__ import annotations

import os

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from zeropipe.errors import CommunicationError, DesyncError


def restarts() -> tuple[int, int]:
    """How often torchrun has started the ranks anew after a failure, and how often it may; (0, 0) without it."""
    found = (
        os.environ.get(f"TORCHELASTIC_{name}", "0").strip() for name in ("RESTART_COUNT", "MAX_RESTARTS")
    )
    count, most = (int(text) if text.isdigit() else 0 for text in found)
    return count, most


def follows(error: Exception) -> bool:
    """Whether ``error`` is of a rank whose peers have failed before it, or have gone another way."""
    return isinstance(error, CommunicationError | DesyncError | dist.DistError)


def tell(error: Exception) -> None:
    """Leave ``error``, which is being handled, for torchrun: it ends with the first one, and quotes its traceback.

    Not for an error that only follows from another rank's: of several of one second torchrun would take any.
    """
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)
