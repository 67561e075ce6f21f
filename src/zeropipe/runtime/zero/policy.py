"""What the ZeRO stages differ in, as data: one optimizer class reads it, no stage is a class of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch

AUTO_BUCKET_NUMEL = 2**21  # 8 MiB of fp32: past it no algorithm gains, and scratch stays small


@dataclass(frozen=True, slots=True)
class Policy:
    """How one engine shards, reduces and stores (arXiv 1910.02054, section 5: Pos, Pos+g, Pos+g+p)."""

    stage: int
    bucket_numel: int = AUTO_BUCKET_NUMEL
    overlap_comm: bool = True
    accumulate_dtype: torch.dtype | None = None  # None: the parameter's own
    reduce_dtype: torch.dtype | None = None  # None: the accumulation's own
    offload_optimizer: bool = False  # masters and moments live in host memory

    @property
    def shards_optimizer(self) -> bool:
        return self.stage >= 1

    @property
    def shards_gradients(self) -> bool:
        return self.stage >= 2

    @property
    def shards_parameters(self) -> bool:
        return self.stage >= 3
