"""What the ZeRO stages differ in, as data: one optimizer class reads it, no stage is a class of its own."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

# 8 MiB of fp32: past it no algorithm gains, scratch stays small, and latency is hidden.
AUTO_BUCKET_NUMEL = 2**21
# 64 MiB of fp32 for each of master, gradient and moments that a step reads from files.
AUTO_SUB_GROUP_NUMEL = 2**24


class Place(Enum):
    """Where tensors are at rest; the names are the config's."""

    DEVICE = "none"  # with the parameters; on a CPU run HOST is the same
    HOST = "cpu"  # costs host memory, pinned, and a copy on each use
    FILE = "nvme"  # costs no memory beyond what is in use, and reads and writes of files


@dataclass(frozen=True, slots=True)
class Policy:
    """How one engine shards, reduces and stores (arXiv 1910.02054, section 5: Pos, Pos+g, Pos+g+p)."""

    stage: int
    bucket_numel: int = AUTO_BUCKET_NUMEL
    publish_numel: int = AUTO_BUCKET_NUMEL  # of a shard, in one message (gloo)
    overlap_comm: bool = True
    accumulate_dtype: torch.dtype | None = None  # None: the parameter's own
    scales_loss: bool = False  # gradients are the loss scale times too large until the step
    reduce_dtype: torch.dtype | None = None  # None: the accumulation's own
    optimizer_place: Place = Place.DEVICE  # of masters and moments; FILE at stage 3 only
    param_place: Place = Place.DEVICE  # of what gathers read; stage 3 only
    optimizer_folder: str = ""  # FILE: where the files are made
    param_folder: str = ""
    pin_memory: bool = True
    sub_group_numel: int = AUTO_SUB_GROUP_NUMEL  # FILE: stepped at a time

    @property
    def offload_optimizer(self) -> bool:
        return self.optimizer_place is not Place.DEVICE

    @property
    def shards_optimizer(self) -> bool:
        return self.stage >= 1

    @property
    def shards_gradients(self) -> bool:
        return self.stage >= 2

    @property
    def shards_parameters(self) -> bool:
        return self.stage >= 3
