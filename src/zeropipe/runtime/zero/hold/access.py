"""Reads and writes one parameter's whole fp32 value, gradient or optimizer state, whatever is sharded.

The ``full`` functions are collective: every rank of the data-parallel group calls them, in the same order. The
``local`` ones touch only this rank's piece, and are collective too where others have what follows from it: a gradient
may have to be reduced first, and a value that was set is published. Gradients are in true units (averaged, without the
loss scale) and exist between backward and step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from zeropipe.comm.group import Group
from zeropipe.errors import UsageError
from zeropipe.runtime.zero.hold.grads import GradStore
from zeropipe.runtime.zero.hold.partition import Partition
from zeropipe.runtime.zero.hold.reducer import Reducer


class What(Enum):
    """What lies like the master, besides the optimizer's state, which goes by its key."""

    MASTER = "fp32 value"
    GRADIENT = "gradient"


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
        self.write(What.MASTER, value, whole=True)

    def read(self, what: What | str, whole: bool) -> torch.Tensor | None:
        """The parameter's shape, or (not ``whole``) this rank's piece, 1D; None where there is no such thing yet."""
        # An edit that no step has seen yet is part of the value.
        if what is What.MASTER and whole:
            self.partition.values.take_edit(self.index)
        shard = self._shard(what)
        if shard is None:
            return None
        part = self.partition.values.full(shard, self.index) if whole else self._local(shard)
        if what is What.GRADIENT:
            return part.float() / self.loss_scale()
        # A piece is a view to write to; the whole is a copy, in fp32 also where the master is bf16.
        return part.float() if whole and what is What.MASTER and part.dtype == torch.bfloat16 else part

    def write(self, what: What | str, value: torch.Tensor, whole: bool) -> None:
        """Raises UsageError for a value of another shape, and where there is no such thing yet."""
        if whole:
            self._check(value, self.partition.shapes[self.index])
        shard = self._shard(what)
        if shard is None and what is What.GRADIENT:
            raise UsageError(
                f"parameter '{self.name}' has no gradient yet", fix="set it between backward and step"
            )
        if shard is None:
            keys = ", ".join(sorted(self.partition.state.keys()))
            raise UsageError(
                f"parameter '{self.name}' has no optimizer state {what!r}",
                expected=keys or "none before the first step",
                fix="use one of these",
            )
        if not whole:
            self._check(value, tuple(self._local(shard).shape))
        if isinstance(what, str):
            self.partition.state.write(what, self.index, value, whole)
            return
        if what is What.GRADIENT:
            value = value * self.loss_scale()
            self.store.seen.add(self.index)  # else a step would leave it out, as one that nobody used
        if what is What.MASTER:
            self.partition.values.before_write()
        self.partition.put(shard, self.index, value, whole)
        if what is What.MASTER and whole:
            self.partition.values.write(self.index, value)
        elif what is What.MASTER:
            # Each rank has written its own piece alone.
            self.partition.values.publish()

    def _shard(self, what: What | str) -> torch.Tensor | None:  # 1D, as the master
        if what is What.MASTER:
            return self.partition.master.detach()
        if isinstance(what, str):
            return self.partition.state.shard(what)
        # Stages 0 and 1 reduce once per window, and this may be before its boundary: what was reduced so far goes on
        # as one more term, see ``GradStore.reopen``.
        if self.reducer.window_is_empty:
            return None  # no backward ran since the last step
        self.reducer.reduce_now()
        return self.store.shard

    def _local(self, shard: torch.Tensor) -> torch.Tensor:
        return self.partition.local(shard, self.index)

    def _check(self, value: torch.Tensor, expected: tuple[int, ...]) -> None:
        if tuple(value.shape) != expected:
            raise UsageError(
                f"value for parameter '{self.name}'", expected=f"shape {expected}", found=tuple(value.shape)
            )


def trained_of(param: torch.Tensor) -> Trained | None:
    """What is known of a parameter that an optimizer trains; None for any other."""
    return getattr(getattr(param, "_zero", None), "trained", None)


def _required(param: torch.nn.Parameter) -> Trained:
    one = trained_of(param)
    if one is None:
        raise UsageError(
            f"a parameter of shape {tuple(param.shape)} is not trained by any engine",
            fix="give it to the optimizer, or (a frozen parameter) set requires_grad before the forward pass that "
            "follows",
        )
    return one


def _read(param: torch.nn.Parameter, what: What | str, whole: bool) -> torch.Tensor | None:
    one = trained_of(param)
    return None if one is None else one.read(what, whole)


def safe_get_full_fp32_param(param: torch.nn.Parameter) -> torch.Tensor | None:
    """The parameter's master, whole, as a new fp32 tensor of its shape; None if no optimizer trains it."""
    return _read(param, What.MASTER, True)


def safe_set_full_fp32_param(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Set master and parameter to ``value`` (the parameter's shape, the same on every rank)."""
    _required(param).write(What.MASTER, value, True)


def safe_get_full_grad(param: torch.nn.Parameter) -> torch.Tensor | None:
    """The averaged gradient so far, whole, as a new fp32 tensor; None before the first backward of a step."""
    return _read(param, What.GRADIENT, True)


def safe_set_full_grad(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Set the averaged gradient to ``value`` (the parameter's shape, the same on every rank)."""
    _required(param).write(What.GRADIENT, value, True)


def safe_update_full_grad_vectorized(
    param_list: Sequence[torch.nn.Parameter],
    update_func: Callable[[torch.Tensor, torch.nn.Parameter], torch.Tensor],
) -> None:
    """Set each averaged gradient to ``update_func(gradient, parameter)``, which is given it whole, in fp32.

    A parameter without a gradient is passed over. Collective: ``update_func`` must give the same on every rank.
    """
    for param in param_list:
        grad = safe_get_full_grad(param)
        if grad is not None:
            safe_set_full_grad(param, update_func(grad, param))


def safe_get_full_optimizer_state(param: torch.nn.Parameter, optim_state_key: str) -> torch.Tensor | None:
    """State such as ``exp_avg``, whole, as a new tensor of the parameter's shape; None before the first step."""
    return _read(param, optim_state_key, True)


def safe_set_full_optimizer_state(
    param: torch.nn.Parameter, value: torch.Tensor, optim_state_key: str
) -> None:
    """Set state such as ``exp_avg`` to ``value`` (the parameter's shape, the same on every rank)."""
    _required(param).write(optim_state_key, value, True)


def safe_get_local_fp32_param(param: torch.nn.Parameter) -> torch.Tensor | None:
    """This rank's piece of the master: 1D, a view, empty if the shard holds none of the parameter."""
    return _read(param, What.MASTER, False)


def safe_set_local_fp32_param(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Set this rank's piece of the master (1D). Every rank must call it: the values are gathered anew."""
    _required(param).write(What.MASTER, value, False)


def safe_get_local_grad(param: torch.nn.Parameter) -> torch.Tensor | None:
    """This rank's piece of the averaged gradient as a new fp32 tensor (1D). Reduces first, so collective."""
    return _read(param, What.GRADIENT, False)


def safe_set_local_grad(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Set this rank's piece of the averaged gradient (1D)."""
    _required(param).write(What.GRADIENT, value, False)


def safe_get_local_optimizer_state(param: torch.nn.Parameter, optim_state_key: str) -> torch.Tensor | None:
    """This rank's piece of the state: 1D; None before the first step."""
    return _read(param, optim_state_key, False)


def safe_set_local_optimizer_state(
    param: torch.nn.Parameter, value: torch.Tensor, optim_state_key: str
) -> None:
    """Set this rank's piece of the state (1D)."""
    _required(param).write(optim_state_key, value, False)
