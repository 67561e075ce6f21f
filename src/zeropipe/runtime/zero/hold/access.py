"""Reads and writes one parameter's whole fp32 value, gradient or optimizer state, whatever is sharded.

The ``full`` functions are collective: every rank of the data-parallel group calls them, in the same order. The
``local`` ones touch only this rank's piece. Gradients are in true units (averaged, without the loss scale) and
exist between backward and step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from zeropipe.comm.group import Group
from zeropipe.errors import UsageError
from zeropipe.runtime.zero.hold.grads import GradStore
from zeropipe.runtime.zero.hold.partition import Partition
from zeropipe.runtime.zero.hold.reducer import Reducer


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """A parameter that an optimizer trains: where its partition and its gradients have it."""

    name: str
    index: int  # in the partition's and the store's parameters
    partition: Partition
    store: GradStore
    reducer: Reducer
    loss_scale: Callable[[], float]

    @property
    def group(self) -> Group:
        return self.partition.group

    def write_value(self, value: torch.Tensor) -> None:
        self.partition.write_value(self.index, value)

    def full(self, shard: torch.Tensor) -> torch.Tensor:
        return self.partition.values.full(shard, self.index)

    def local(self, shard: torch.Tensor) -> torch.Tensor:
        return self.partition.local(shard, self.index)

    def check_shape(self, value: torch.Tensor, expected: tuple[int, ...] | None = None) -> None:
        """Raise UsageError unless ``value`` has the shape ``expected`` (None: the parameter's)."""
        expected = self.partition.shapes[self.index] if expected is None else expected
        if tuple(value.shape) != expected:
            raise UsageError(
                f"value for parameter '{self.name}'", expected=f"shape {expected}", found=tuple(value.shape)
            )

    def gradient(self) -> torch.Tensor | None:
        """The shard of gradients with everything reduced; None when no backward ran since the last step."""
        if self.reducer.window_is_empty:
            return None
        self.reducer.refuse_broken()
        self.reducer.finish_window()
        return self.store.shard

    def gradient_to_set(self) -> torch.Tensor:
        """The same, for who is about to write the parameter's part. Raises UsageError where there is none."""
        shard = self.gradient()
        if shard is None:
            raise UsageError(
                f"parameter '{self.name}' has no gradient yet. Fix: set it between backward and step"
            )
        return shard

    def state_to_set(self, key: str) -> torch.Tensor:
        """The state ``key``, 1D as the master."""
        shard = self.partition.state.shard(key)
        if shard is None:
            raise UsageError(
                f"parameter '{self.name}' has no optimizer state {key!r}",
                expected=", ".join(sorted(self.partition.state.keys())) or "none before the first step",
                fix="use one of these",
            )
        return shard


def trained_of(param: torch.Tensor) -> Trained | None:
    """What is known of a parameter that an optimizer trains; None for any other."""
    return getattr(getattr(param, "_zero", None), "trained", None)


def _required(param: torch.nn.Parameter) -> Trained:
    one = trained_of(param)
    if one is None:
        raise UsageError(
            f"a parameter of shape {tuple(param.shape)} is not trained by any engine. Fix: give it to the "
            "optimizer, or (a frozen parameter) set requires_grad before the forward pass that follows"
        )
    return one


def safe_get_full_fp32_param(param: torch.nn.Parameter) -> torch.Tensor | None:
    """The parameter's master, whole, as a new fp32 tensor of its shape; None if no optimizer trains it."""
    one = trained_of(param)
    if one is None:
        return None
    one.partition.values.take_edit(one.index)
    return one.full(one.partition.master.detach())


def safe_set_full_fp32_param(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Set master and parameter to ``value`` (the parameter's shape, the same on every rank)."""
    one = _required(param)
    one.check_shape(value)
    one.write_value(value)


def safe_get_full_grad(param: torch.nn.Parameter) -> torch.Tensor | None:
    """The averaged gradient so far, whole, as a new fp32 tensor; None before the first backward of a step."""
    one = trained_of(param)
    shard = None if one is None else one.gradient()
    if one is None or shard is None:
        return None
    return one.full(shard).float() / one.loss_scale()


def safe_set_full_grad(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Set the averaged gradient to ``value`` (the parameter's shape, the same on every rank)."""
    one = _required(param)
    one.check_shape(value)
    one.partition.scatter(one.gradient_to_set(), one.index, value * one.loss_scale())
    one.store.seen.add(one.index)


def safe_get_full_optimizer_state(param: torch.nn.Parameter, optim_state_key: str) -> torch.Tensor | None:
    """State such as ``exp_avg``, whole, as a new tensor of the parameter's shape; None before the first step."""
    one = trained_of(param)
    shard = None if one is None else one.partition.state.shard(optim_state_key)
    return None if one is None or shard is None else one.full(shard)


def safe_set_full_optimizer_state(
    param: torch.nn.Parameter, value: torch.Tensor, optim_state_key: str
) -> None:
    """Set state such as ``exp_avg`` to ``value`` (the parameter's shape, the same on every rank)."""
    one = _required(param)
    one.check_shape(value)
    one.state_to_set(optim_state_key)
    one.partition.state.write(optim_state_key, one.index, value)


def safe_get_local_fp32_param(param: torch.nn.Parameter) -> torch.Tensor | None:
    """This rank's piece of the master: 1D, a view, empty if the shard holds none of the parameter."""
    one = trained_of(param)
    return None if one is None else one.local(one.partition.master.detach())


def safe_set_local_fp32_param(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Set this rank's piece of the master (1D). Every rank must call it: the values are gathered anew."""
    one = _required(param)
    piece = one.local(one.partition.master.detach())
    one.check_shape(value, tuple(piece.shape))
    piece.copy_(value)
    one.partition.values.publish()


def safe_get_local_grad(param: torch.nn.Parameter) -> torch.Tensor | None:
    """This rank's piece of the averaged gradient as a new fp32 tensor (1D). Reduces first, so collective."""
    one = trained_of(param)
    shard = None if one is None else one.gradient()
    if one is None or shard is None:
        return None
    return one.local(shard).float() / one.loss_scale()


def safe_set_local_grad(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Set this rank's piece of the averaged gradient (1D)."""
    one = _required(param)
    piece = one.local(one.gradient_to_set())
    one.check_shape(value, tuple(piece.shape))
    piece.copy_(value * one.loss_scale())
    one.store.seen.add(one.index)


def safe_get_local_optimizer_state(param: torch.nn.Parameter, optim_state_key: str) -> torch.Tensor | None:
    """This rank's piece of the state: 1D; None before the first step."""
    one = trained_of(param)
    shard = None if one is None else one.partition.state.shard(optim_state_key)
    return None if one is None or shard is None else one.local(shard)


def safe_set_local_optimizer_state(
    param: torch.nn.Parameter, value: torch.Tensor, optim_state_key: str
) -> None:
    """Set this rank's piece of the state (1D)."""
    one = _required(param)
    piece = one.local(one.state_to_set(optim_state_key))
    one.check_shape(value, tuple(piece.shape))
    one.partition.state.write(optim_state_key, one.index, value, local=True)
