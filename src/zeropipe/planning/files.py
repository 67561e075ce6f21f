"""Offloading to files that are not there: a rehearsal fills no disk, and needs no folder of another machine."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from zeropipe.planning.dry import pages
from zeropipe.planning.ledger import DISK, Ledger
from zeropipe.runtime.zero.hold import offload
from zeropipe.runtime.zero.hold.offload import Files


@contextmanager
def without_files(ledger: Ledger) -> Iterator[None]:
    """Inside, what goes to a file goes to pages that nobody touches; ``ledger`` has it as lying on a disk."""
    zeros = Files.zeros

    def new(_: Files, nbytes: int) -> tuple[mmap.mmap, int]:
        return pages(nbytes), os.open(os.devnull, os.O_RDONLY)

    def entered(files: Files, numel: int, dtype: torch.dtype) -> torch.Tensor:
        tensor = zeros(files, numel, dtype)
        with ledger.holding(f"{DISK}state"):
            ledger.made(tensor, unknown=True)
        return tensor

    with (
        patch.object(offload, "check_folder", lambda *_: None),
        patch.object(Files, "new", new),
        patch.object(Files, "zeros", entered),
    ):
        yield
