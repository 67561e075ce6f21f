"""What a parameter knows of ZeRO: its name and where its master, gradient and state live."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from zeropipe.runtime.zero.partition import Partition


@dataclass(slots=True, weakref_slot=True)
class ZeroParam:
    """Carried by a parameter as ``param._zero``, the only state that zeropipe puts there."""

    name: str
    partition: Partition
    index: int  # in partition.params and partition.layout.tensors

    @property
    def shape(self) -> tuple[int, ...]:
        return self.partition.layout.tensors[self.index].shape


def zero_param(param: torch.nn.Parameter) -> ZeroParam | None:
    """The parameter's ZeroParam; None for a parameter that no engine trains."""
    return getattr(param, "_zero", None)
