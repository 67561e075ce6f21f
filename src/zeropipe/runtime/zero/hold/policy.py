"""What the ZeRO stages differ in, as data: one optimizer class reads it, no stage is a class of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import torch

from zeropipe.comm.group import SELF, Group
from zeropipe.layout.slots import Sharing
from zeropipe.tensor.host import Number

# 8 MiB of fp32: past it no algorithm gains, scratch stays small, and latency is hidden: while one bucket travels the
# next one fills.
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
    narrow_masters: bool = False  # parameters in bf16 are their own masters
    narrow_state: bool = False  # moments of such parameters are bf16
    scales_loss: bool = False  # gradients are the loss scale times too large until the step
    reduce_dtype: torch.dtype | None = None  # None: the accumulation's own
    optimizer_place: Place = Place.DEVICE  # of masters and moments; FILE at stage 3 only
    param_place: Place = Place.DEVICE  # of what gathers read; stage 3 only
    optimizer_folder: str = ""  # FILE: where the files are made
    param_folder: str = ""
    pin_memory: bool = True
    sub_group_numel: int = AUTO_SUB_GROUP_NUMEL  # FILE: stepped at a time
    sharing: Sharing | None = None  # of a step's slots, where sums must not show who computed them

    @property
    def offload_optimizer(self) -> bool:
        return self.optimizer_place is not Place.DEVICE

    def master_dtype(self, values: torch.dtype) -> torch.dtype:
        """Of masters whose parameters have the dtype ``values``."""
        if values == torch.float64 or (values == torch.bfloat16 and self.narrow_masters):
            return values
        return torch.float32

    def state_dtype(self, values: torch.dtype) -> torch.dtype:
        """Of their moments."""
        if values == torch.bfloat16:
            return torch.bfloat16 if self.narrow_state else torch.float32
        return self.master_dtype(values)

    @property
    def shards_optimizer(self) -> bool:
        return self.stage >= 1

    @property
    def shards_gradients(self) -> bool:
        return self.stage >= 2

    @property
    def keeps_whole(self) -> bool:
        """Whether the buffer of gradients is whole."""
        return not (self.shards_optimizer if self.sharing else self.shards_gradients)

    @property
    def shards_parameters(self) -> bool:
        return self.stage >= 3


class Scaler(Protocol):
    """What a loss scaler must offer; the classes are in ``runtime/fp16``."""

    @property
    def dynamic(self) -> bool: ...
    @property
    def loss_scale(self) -> float: ...
    def update_scale(self, overflow: bool, diagnosis: object = None) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(slots=True, eq=False)
class Remark:
    """A number that each rank says beside the norm of every step, and the sum of all of them, which each hears then."""

    _say: Callable[[], float] | None = None
    heard: Sequence[Number] = ()  # in the last step, on its device; empty where nobody says one

    def begin(self, say: Callable[[], float] | None) -> None:
        """Ask ``say`` in each step from now on; None on all ranks or on none."""
        self._say = say

    def said(self) -> list[float]:
        """What this rank says: one number, or none."""
        said = [] if self._say is None else [self._say()]
        self.heard = said  # of a rank alone that is all
        return said

    def hear(self, sums: Sequence[Number]) -> None:
        self.heard = sums


@dataclass(frozen=True, slots=True)
class StepOptions:
    """How gradients become a step. ``clip``: largest global norm, 0 for none."""

    clip: float = 0.0
    scaler: Scaler | None = None
    skip_nonfinite: bool = False  # without a scaler: a step with inf or NaN is skipped
    refuse_unused: bool = False  # a parameter that no rank gave a gradient is an error
    model_group: Group = (
        SELF  # ranks that hold the other parts of this replica: norm and overflow are theirs too
    )
    counts: Callable[[torch.nn.Parameter], bool] | None = None  # whether this rank's copy enters the norm
    exact: bool = False  # no place where shards are cut shows in the norm
    replicas: Group = SELF  # stage 3: the ranks that hold the same shards as this one (MiCS)
    remark: Remark = field(default_factory=Remark)


class Conductor(Protocol):
    """Keeps ranks together where they wait for each other in gathers too."""

    def meet(self, what: str) -> None:
        """Go on when every rank is about to do ``what``."""

    def tell(self, error: BaseException, where: str) -> None:
        """Let the peers know that this rank will not come."""
