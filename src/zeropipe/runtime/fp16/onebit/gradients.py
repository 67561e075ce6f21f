"""The gradient that one step uses: averaged over ranks for a dense step, this rank's own for a compressed one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from zeropipe.comm import collectives
from zeropipe.comm.group import Group
from zeropipe.errors import UsageError
from zeropipe.runtime.fp16.onebit.lane import Lane


def averaged(lane: Lane, group: Group | None) -> torch.Tensor:  # 1-D float32, lane.numel
    """The gradients on the parameters, averaged over ``group`` (None: an engine has done so already)."""
    gradient = lane.gradient()
    if group is not None and group.size > 1:
        collectives.all_reduce(gradient, group, op="avg", label="gradients")
    return gradient


def own_gradient(
    lane: Lane, given: Mapping[nn.Parameter, torch.Tensor], group: Group
) -> torch.Tensor:  # 1-D float32, lane.layout.numel
    """This rank's gradient of the whole buffer: ``given`` for the master, or what is on the parameters.

    Raises UsageError for a shard whose engine did not give one.
    """
    gradient = given.get(lane.params[0])
    if gradient is None and not lane.sharded:
        gradient = lane.gradient()
    if gradient is None or gradient.numel() < lane.layout.numel:
        raise UsageError(
            f"a compressed step needs this rank's own gradient of param group {lane.index}, not averaged",
            rank=group.ranks[group.rank],
            expected=f"{lane.layout.numel} elements from set_local_gradient",
            found="none" if gradient is None else gradient.numel(),
        )
    return gradient.detach().view(-1)[: lane.layout.numel].float()


def clip_(gradients: Sequence[torch.Tensor], limits: Sequence[float]) -> None:
    """Scale each gradient so that the norm of all together does not exceed its limit; 0 is no limit.

    In a compressed step that is the norm of this rank's own gradients, which needs no communication.
    """
    if not any(limits):
        return
    total = torch.stack([gradient.norm() for gradient in gradients]).norm()
    for gradient, limit in zip(gradients, limits, strict=True):
        if limit:
            gradient.mul_((limit / (total + 1e-6)).clamp(max=1.0))


def put_gradients(param_groups: Sequence[dict[str, Any]], grads: Sequence[torch.Tensor | None]) -> None:
    """Set ``.grad`` of all parameters, in order. Raises UsageError for another number of gradients."""
    params = [param for options in param_groups for param in options["params"]]
    if len(grads) != len(params):
        raise UsageError(
            "step(grads=...) needs one gradient per parameter", expected=len(params), found=len(grads)
        )
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.to(param.dtype)
