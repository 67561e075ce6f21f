"""What our optimizers share: the view of the 1-D shard that they are given to step on, a step, and checks of options.

Also what an engine may ask of any optimizer: whether it wants its shards (``ShardAware``), or exchanges by itself
(``Communicates``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, ParamsT

from zeropipe.comm.group import SELF, Group
from zeropipe.errors import UsageError
from zeropipe.layout.flat import FlatShards, Piece, TensorSpec


@dataclass(frozen=True, slots=True)
class ShardView:
    """One 1-D master: shard ``shard`` of ``layout``, whose other shards lie with the members of ``group``.

    Member ``s`` of the group holds shard ``s``. True shapes are in ``layout.tensors[i].shape``.
    """

    layout: FlatShards
    shard: int
    group: Group

    # Whole-tensor updates ask the group for what other shards hold: member s must be who has shard s.
    def __post_init__(self) -> None:
        if self.group.size != self.layout.num_shards or self.group.rank != self.shard:
            raise UsageError(
                "a shard view needs one group member per shard, in order",
                rank=self.group.ranks[self.group.rank],
                expected=f"shard {self.group.rank} of {self.group.size}",
                found=f"shard {self.shard} of {self.layout.num_shards}",
            )

    def pieces(self) -> tuple[Piece, ...]:
        return self.layout.pieces(self.shard)


@runtime_checkable
class ShardAware(Protocol):
    """An optimizer whose update of a tensor needs the whole tensor, and that can get it from shards.

    ``bind_shards`` is called before the first step that meets a master, with its view; later calls add to
    earlier ones. The caller sees to it that a master's gradient is None on all members of the group or on none:
    None means that the master is not stepped, so no member may wait for it.
    """

    def bind_shards(self, views: Mapping[nn.Parameter, ShardView]) -> None: ...


@runtime_checkable
class Communicates(Protocol):
    """An optimizer that exchanges something else than gradients in some of its steps, over the ranks it is bound to."""

    communicates: bool

    def check_stage(self, stage: int) -> None: ...
    def check_ties(self, names: Sequence[str]) -> None: ...
    def check_run(self, total_steps: object, warmup_steps: object) -> None: ...
    def bind_communication(self, group: Group) -> None: ...
    def wants_local_gradients(self) -> bool: ...
    def set_local_gradient(self, master: torch.nn.Parameter, gradient: torch.Tensor) -> None: ...
    def rank_state(self) -> dict[str, Any]: ...
    def take_rank_states(
        self, own: dict[str, Any] | None, everyone: Callable[[], Sequence[dict[str, Any]]]
    ) -> str: ...


class Stepped(Optimizer):
    """One of ours: what it does in a step is ``_update``, without gradients being recorded."""

    # A closure evaluates the model again, and may record gradients for it.
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    def _update(self) -> None:
        raise NotImplementedError


class OnShards(Stepped):
    """One that needs whole tensors, and steps on ordinary ones or, once it is bound, on 1-D masters: ``ShardAware``."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._views: dict[Any, ShardView] = {}  # as bound
        self._whole: dict[torch.Tensor, ShardView] = {}  # of all others: made once, as shapes do not change
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copied or unpickled optimizer is unbound, as a process group cannot be copied; load_state_dict passes
        # here too, and stays bound.
        super().__setstate__(state)
        for name in ("_views", "_whole"):
            self.__dict__.setdefault(name, {})

    def bind_shards(self, views: Mapping[nn.Parameter, ShardView]) -> None:
        """Step on these 1-D masters as shards from now on, too. Raises UsageError where one is no such shard."""
        for param, view in views.items():
            if tuple(param.shape) != (view.layout.shard_numel,):
                raise UsageError(
                    "a master does not have the shape of its shard",
                    rank=view.group.ranks[view.group.rank],
                    expected=(view.layout.shard_numel,),
                    found=tuple(param.shape),
                )
        self._views |= views

    def _view(self, param: torch.Tensor) -> ShardView:
        """The view of ``param``: as bound, or of an ordinary tensor, a layout of one that a group of one holds."""
        found = self._views.get(param) or self._whole.get(param)
        if found is None:
            spec = TensorSpec("", tuple(param.shape), str(param.dtype).removeprefix("torch."))
            found = self._whole[param] = ShardView(FlatShards((spec,), 1), 0, SELF)
        return found

    def _stepped(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]:
        """(parameter, its gradient as one flat run, its param group) of each that has a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.grad.is_sparse:
                    name = type(self).__name__
                    raise UsageError(
                        f"{name} does not take sparse gradients", fix="build the embedding with sparse=False"
                    )
                yield param, param.grad.reshape(-1), group

    def _counted(self, param: torch.Tensor, names: Sequence[str]) -> dict[str, Any]:
        """The state of ``param``, with zeros like it under ``names``, one step further."""
        # By key: a parameter that changes its group may need what it had not (Muon's matrices and others).
        state: dict[str, Any] = self.state[param]
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(param, memory_format=torch.contiguous_format)
        state["step"] += 1
        return state


# A master is contiguous. A tensor that a user steps on without an engine (channels last, a transpose) need not be.
def flat(param: torch.Tensor) -> torch.Tensor:  # 1-D, numel of param
    """``param`` as one run of elements: a view of it where it is contiguous, else a copy to be put back."""
    data = param.detach()
    return data.view(-1) if data.is_contiguous() else data.reshape(-1)


def put_back(param: torch.Tensor, run: torch.Tensor) -> None:
    """Write ``run``, made by ``flat``, back into ``param`` where it is a copy."""
    if not param.is_contiguous():
        param.detach().copy_(run.view(param.shape))


def check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not float(value) >= 0.0:  # also true of NaN
            raise ValueError(f"{name} must be at least 0, found {value}")


def check_betas(betas: Sequence[float]) -> None:
    if len(betas) != 2 or not all(0.0 <= float(beta) < 1.0 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), found {betas}")
