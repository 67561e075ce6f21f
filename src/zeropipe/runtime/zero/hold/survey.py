"""What all ranks must know before a step: the norm of the gradients, and what nobody used; decided alike on each.

An optimizer that communicates by itself takes each rank's own gradients, not their average: before such a step the
reducer keeps them on their rank. What all ranks still decide together is overflow and the clip factor, from one small
sum, so that an overflow skips the step everywhere before anything was exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from zeropipe.comm.collectives import all_reduce
from zeropipe.comm.group import Group
from zeropipe.errors import UsageError
from zeropipe.runtime.zero.hold.grads import GradStore
from zeropipe.runtime.zero.hold.partition import Partition
from zeropipe.tensor.norms import rough_squared_norm, squared_norm


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


def bind(optimizer: torch.optim.Optimizer, stage: int, group: Group) -> Communicates | None:
    """Tell such an optimizer its ranks; None for any other. Raises where it cannot work at ``stage``."""
    if not isinstance(optimizer, Communicates):
        return None
    optimizer.check_stage(stage)
    optimizer.bind_communication(group)
    return optimizer


def own_squares(
    stores: Sequence[GradStore], ranks: int, counts: Callable[[torch.nn.Parameter], bool] | None
) -> torch.Tensor | float:
    """This rank's share of the mean over ranks of the squared norm of a rank's own gradients.

    The norm of their average is not known without averaging them; the root of this mean is never below it.
    """
    total: torch.Tensor | float = 0.0
    for store in stores:
        for index, param in enumerate(store.partition.params):
            if index not in store.seen:
                store.view(index).zero_()  # left by an earlier window
            elif counts is not None and not counts(param):
                total -= squared_norm(store.view(index).reshape(-1)) / ranks
        total += squared_norm(store.buffer) / ranks
    return total


def hand_over(optimizer: Communicates, stores: Sequence[GradStore], factor: float) -> None:
    """Give the optimizer ``factor`` times this rank's gradients: the whole buffer of each partition."""
    for store in stores:
        gradient = store.buffer if factor == 1.0 else store.buffer.float().mul_(factor)
        master = store.partition.master
        optimizer.set_local_gradient(master, gradient.to(master.device))


Counts = Callable[[torch.nn.Parameter], bool]  # whether this rank's copy enters the norm


@dataclass(frozen=True, slots=True)
class Figures:
    """Sums over all ranks."""

    square: float  # squared norm of the scaled gradients
    unseen: float  # parameters without a gradient on some rank, counted there
    woken: float  # parameters that were unfrozen since the last step, counted on each rank


def survey(
    stores: Sequence[GradStore],
    group: Group,
    model_group: Group,
    replicas: Group,
    counts: Counts | None,
    decides: bool,
    own: bool,
    awake: int,
) -> Figures:
    """One small collective, one more where ``model_group`` holds other parts of the model.

    ``decides``: something hangs on the norm, so it is exact. ``own``: gradients are each rank's own. ``awake``:
    parameters unfrozen on this rank.
    """
    device = stores[0].partition.params[0].device if stores else torch.device("cpu")
    square = squared_norm if decides or device.type != "cpu" else rough_squared_norm
    unseen = 0 if own else sum(len(store.partition.params) - len(store.seen) for store in stores)
    squares: torch.Tensor | float = 0.0
    if own:
        squares = own_squares(stores, group.size, counts)
    for store in () if own else stores:
        holder = replicas if store.partition.sharded else group
        if holder.rank == 0:  # so that each element counts once
            squares = squares + square(store.shard, store.let_go) - _not_counted(store, counts)
    if group.size == 1 and model_group.size == 1:
        return Figures(float(squares), unseen, awake)
    figures = torch.tensor([0.0, unseen, awake], dtype=torch.float64, device=device)
    figures[0] = squares
    all_reduce(figures, group, label="gradient norm")
    if model_group.size > 1:
        all_reduce(figures[:1], model_group, label="gradient norm of all stages")
    return Figures(*figures.tolist())


def _not_counted(store: GradStore, counts: Counts | None) -> torch.Tensor | float:
    """The squared norm of this rank's pieces of parameters whose copy on another rank counts."""
    if counts is None:
        return 0.0
    partition = store.partition
    copies = [i for i, param in enumerate(partition.params) if not counts(param)]
    return sum((squared_norm(partition.local(store.shard, i)) for i in copies), start=0.0)


def unused_everywhere(stores: Sequence[GradStore], group: Group) -> list[tuple[Partition, list[int]]]:
    """The parameters, by partition, that no rank gave a gradient; collective."""
    device = stores[0].partition.params[0].device if stores else torch.device("cpu")
    flags = [index in store.seen for store in stores for index in range(len(store.partition.params))]
    used = torch.tensor(flags, dtype=torch.int32, device=device)
    all_reduce(used, group, op="max", label="used parameters")
    counts = [len(store.partition.params) for store in stores]
    found = []
    for store, marks in zip(stores, used.split(counts), strict=True):
        indices = [index for index, mark in enumerate(marks.tolist()) if not mark]
        if indices:
            found.append((store.partition, indices))
    return found


def refuse(unused: list[tuple[Partition, list[int]]]) -> None:
    """Raise UsageError, on every rank alike, for parameters that require a gradient and got none."""
    pairs = [(partition, index) for partition, indices in unused for index in indices]
    names = [f"'{p.names[index]}'" for p, index in pairs if p.params[index].requires_grad]
    if names:
        raise UsageError(
            f"parameters {', '.join(names)} got no gradient on any rank in this step. Fix: use them in the loss, "
            "freeze them with requires_grad_(False), or set zero_optimization.ignore_unused_parameters to true"
        )
