"""Steps of an optimizer that communicates by itself: it takes each rank's own gradients, not their average.

Before such a step the reducer keeps gradients on their rank, accumulated over the window. What all ranks still
decide together is overflow and the clip factor, from one small sum, so that an overflow skips the step
everywhere before anything was exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from zeropipe.comm.group import Group
from zeropipe.runtime.zero.hold.grads import GradStore
from zeropipe.tensor.norms import squared_norm


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
