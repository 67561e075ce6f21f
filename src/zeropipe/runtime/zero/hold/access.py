"""Reads and writes one parameter's whole fp32 value, gradient or optimizer state, whatever is sharded.

The ``full`` functions are collective: every rank of the data-parallel group calls them, in the same order. The
``local`` ones touch only this rank's piece. Gradients are in true units (averaged, without the loss scale) and
exist between backward and step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zeropipe.errors import UsageError
from zeropipe.runtime.zero.hold.types import AnyPartition, AnyStore
from zeropipe.runtime.zero.param import zero_param


def safe_get_full_fp32_param(param: torch.nn.Parameter) -> torch.Tensor | None:
    """The parameter's master, whole, as a new fp32 tensor of its shape; None if no optimizer trains it."""
    zp = _trained(param)
    if zp is None:
        return None
    zp.partition.take_edit(zp.index)
    return zp.partition.full(zp.partition.master.detach(), zp.index)


def safe_set_full_fp32_param(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Set master and parameter to ``value`` (the parameter's shape, the same on every rank)."""
    zp = _required(param)
    _check_shape(zp, value, zp.shape)
    zp.partition.write_value(zp.index, value)


def safe_get_full_grad(param: torch.nn.Parameter) -> torch.Tensor | None:
    """The averaged gradient so far, whole, as a new fp32 tensor; None before the first backward of a step."""
    zp = _trained(param)
    store = None if zp is None else _reduced(zp)
    if zp is None or store is None:
        return None
    return zp.partition.full(store.shard, zp.index).float() / zp.partition.owner.loss_scale


def safe_set_full_grad(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Set the averaged gradient to ``value`` (the parameter's shape, the same on every rank)."""
    zp = _required(param)
    _check_shape(zp, value, zp.shape)
    store = _reduced(zp)
    if store is None:
        raise UsageError(f"parameter '{zp.name}' has no gradient yet. Fix: set it between backward and step")
    zp.partition.scatter(store.shard, zp.index, value * zp.partition.owner.loss_scale)
    store.seen.add(zp.index)


def safe_get_full_optimizer_state(param: torch.nn.Parameter, optim_state_key: str) -> torch.Tensor | None:
    """State such as ``exp_avg``, whole, as a new tensor of the parameter's shape; None before the first step."""
    zp = _trained(param)
    shard = None if zp is None else _state(zp, optim_state_key)
    return None if zp is None or shard is None else zp.partition.full(shard, zp.index)


def safe_set_full_optimizer_state(
    param: torch.nn.Parameter, value: torch.Tensor, optim_state_key: str
) -> None:
    """Set state such as ``exp_avg`` to ``value`` (the parameter's shape, the same on every rank)."""
    zp = _required(param)
    _check_shape(zp, value, zp.shape)
    _required_state(zp, optim_state_key)
    zp.partition.state.write(optim_state_key, zp.index, value)


def safe_get_local_fp32_param(param: torch.nn.Parameter) -> torch.Tensor | None:
    """This rank's piece of the master: 1D, a view, empty if the shard holds none of the parameter."""
    zp = _trained(param)
    return None if zp is None else zp.partition.local(zp.partition.master.detach(), zp.index)


def safe_set_local_fp32_param(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Set this rank's piece of the master (1D). Every rank must call it: the values are gathered anew."""
    zp = _required(param)
    piece = zp.partition.local(zp.partition.master.detach(), zp.index)
    _check_shape(zp, value, tuple(piece.shape))
    piece.copy_(value)
    zp.partition.publish()


def safe_get_local_grad(param: torch.nn.Parameter) -> torch.Tensor | None:
    """This rank's piece of the averaged gradient as a new fp32 tensor (1D). Reduces first, so collective."""
    zp = _trained(param)
    store = None if zp is None else _reduced(zp)
    if zp is None or store is None:
        return None
    return zp.partition.local(store.shard, zp.index).float() / zp.partition.owner.loss_scale


def safe_set_local_grad(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Set this rank's piece of the averaged gradient (1D)."""
    zp = _required(param)
    store = _reduced(zp)
    if store is None:
        raise UsageError(f"parameter '{zp.name}' has no gradient yet. Fix: set it between backward and step")
    piece = zp.partition.local(store.shard, zp.index)
    _check_shape(zp, value, tuple(piece.shape))
    piece.copy_(value * zp.partition.owner.loss_scale)
    store.seen.add(zp.index)


def safe_get_local_optimizer_state(param: torch.nn.Parameter, optim_state_key: str) -> torch.Tensor | None:
    """This rank's piece of the state: 1D; None before the first step."""
    zp = _trained(param)
    shard = None if zp is None else _state(zp, optim_state_key)
    return None if zp is None or shard is None else zp.partition.local(shard, zp.index)


def safe_set_local_optimizer_state(
    param: torch.nn.Parameter, value: torch.Tensor, optim_state_key: str
) -> None:
    """Set this rank's piece of the state (1D)."""
    zp = _required(param)
    piece = zp.partition.local(_required_state(zp, optim_state_key), zp.index)
    _check_shape(zp, value, tuple(piece.shape))
    zp.partition.state.write(optim_state_key, zp.index, value, local=True)


@dataclass(frozen=True, slots=True)
class _Trained:
    """A parameter that an optimizer trains."""

    name: str
    partition: AnyPartition
    index: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.partition.shapes[self.index]


def _trained(param: torch.nn.Parameter) -> _Trained | None:
    zp = zero_param(param)
    return None if zp is None or zp.partition is None else _Trained(zp.name, zp.partition, zp.index)


def _required(param: torch.nn.Parameter) -> _Trained:
    zp = _trained(param)
    if zp is None:
        raise UsageError(
            f"a parameter of shape {tuple(param.shape)} is not trained by any engine. Fix: give it to the "
            "optimizer, or (a frozen parameter) set requires_grad before the forward pass that follows"
        )
    return zp


def _check_shape(zp: _Trained, value: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(value.shape) != expected:
        raise UsageError(
            f"value for parameter '{zp.name}'", expected=f"shape {expected}", found=tuple(value.shape)
        )


def _reduced(zp: _Trained) -> AnyStore | None:
    """The parameter's store with everything reduced; None when no backward ran since the last step."""
    partition = zp.partition
    reducer = partition.owner.reducer
    if reducer.window_is_empty:
        return None
    reducer.refuse_broken()
    reducer.finish_window()
    return partition.owner.store_of(partition)


def _state(zp: _Trained, key: str) -> torch.Tensor | None:
    """The shard-sized state ``key``; works for a master that is stepped whole and for one stepped by views."""
    return zp.partition.state.shard(key)


def _required_state(zp: _Trained, key: str) -> torch.Tensor:
    shard = _state(zp, key)
    if shard is None:
        known = ", ".join(sorted(zp.partition.state_keys())) or "none before the first step"
        raise UsageError(
            f"parameter '{zp.name}' has no optimizer state {key!r}",
            expected=known,
            fix="use one of these",
        )
    return shard
