"""The one optimizer of all ZeRO stages: it owns the partitions and turns reduced gradients into a step.

    backward -> Reducer (grads.py) -> shard of gradients -> norm, overflow, clip -> torch's step on the master
             -> Partition.publish: the new values on every rank

It wraps the very torch optimizer that the user gave, whose param-group dicts stay the same objects; only
their ``params`` lists now hold the masters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from zeropipe.comm.agreement import agree
from zeropipe.comm.group import Group
from zeropipe.errors import UsageError
from zeropipe.runtime.base_optimizer import DeepSpeedOptimizer
from zeropipe.runtime.optimizers.registry import classify
from zeropipe.runtime.optimizers.shard_view import ShardAware
from zeropipe.runtime.zero.hold.access import Trained, trained_of
from zeropipe.runtime.zero.hold.arrivals import Watch
from zeropipe.runtime.zero.hold.grads import GradStore
from zeropipe.runtime.zero.hold.offload import Offload
from zeropipe.runtime.zero.hold.partition import Partition, copy_of
from zeropipe.runtime.zero.hold.policy import Policy, Scaler, StepOptions
from zeropipe.runtime.zero.hold.reducer import Reducer
from zeropipe.runtime.zero.hold.shard_values import ShardValues
from zeropipe.runtime.zero.hold.stepping import Stepping, Update
from zeropipe.runtime.zero.hold.survey import Figures, bind, refuse, survey, unused_everywhere
from zeropipe.runtime.zero.hold.values import FlatValues
from zeropipe.runtime.zero.param import ZeroParam, carry, shards_at
from zeropipe.tensor.norms import NonFinite, clip_coefficient


@dataclass(slots=True)
class _Progress:
    """How far a step has come, so that one that raised is gone on with: ranks would miss what is said twice."""

    passes: int  # of the reducer, when it began
    reduced: bool = False
    figures: Figures | None = None
    update: Update | None = None


class ZeroOptimizer(DeepSpeedOptimizer):
    """A torch optimizer on shards.

    ``names``: dotted name of every parameter of the module. ``is_boundary`` and ``micro_step``: the engine's
    clock. Raises UsageError for a parameter that is not in ``names``.
    """

    parameter_offload: object  # at stage 3 only: clients ask with hasattr

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        names: Mapping[torch.nn.Parameter, str],
        group: Group,
        policy: Policy,
        options: StepOptions,
        is_boundary: Callable[[], bool],
        micro_step: Callable[[], int],
    ) -> None:
        self.optimizer = optimizer
        self.policy = policy
        self.options = options
        self.offload = Offload(policy)
        self.overflow = False
        self.last_nonfinite: NonFinite | None = None
        self.partitions: list[Partition] = []
        self._names = names
        self._group = group
        self._grad_norm: float | None = None
        self._given = [list(param_group["params"]) for param_group in optimizer.param_groups]
        self._dormant: list[tuple[int, torch.nn.Parameter]] = []  # frozen: (param group, parameter)
        watch = Watch(group, micro_step) if options.scaler is not None else None
        self._own = own = bind(optimizer, policy.stage, group)
        keeps_own = (lambda: False) if own is None else own.wants_local_gradients
        self.reducer = Reducer(policy, is_boundary, watch, options.replicas, keeps_own, self._give_up_step)
        install_zero_grad(optimizer, self.reducer)
        kind = classify(optimizer)
        self._stepping = Stepping(optimizer, kind == "elementwise", self.offload.pages_state)
        self._progress: _Progress | None = None  # of a step that is under way, or raised
        # Stage 3 cuts each parameter by itself, so what needs whole tensors steps on the pieces one by one.
        self._flat = (
            kind == "elementwise" if policy.shards_parameters else policy.shards_optimizer or kind != "whole"
        )
        for index, params in enumerate(self._given):
            self._adopt(index, params)

    # What clients read as they would on the torch optimizer.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    @property
    def loss_scale(self) -> float:
        """The factor on the loss, 1.0 where there is no scaling."""
        return 1.0 if self.options.scaler is None else self.options.scaler.loss_scale

    cur_scale = loss_scale

    @property
    def loss_scaler(self) -> Scaler | None:
        return self.options.scaler

    @property
    def grad_norm(self) -> float | None:
        """Global L2 norm of the last step's gradients before clipping; None before the first."""
        return self._grad_norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, reduced ones too; ``.grad`` is None afterwards.

        Raises UsageError after a step that raised when part of it was done: that is to be called again.
        """
        self.reducer.clear()

    def _give_up_step(self) -> None:
        """Before gradients are forgotten, whoever asks for it."""
        self.check_whole("zero_grad")
        self._end_step()

    def check_whole(self, call: str) -> None:
        """Raise UsageError where a step that raised has changed some of the parameters and not others."""
        if self._progress is not None and self._progress.update is not None and self._progress.update.changed:
            raise UsageError(
                f"{call}: the last step raised after a part of the parameters was stepped. Fix: call step() again, "
                "which goes on where it stopped, or load a checkpoint"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As on a torch optimizer; the new parameters must belong to the module."""
        self.optimizer.add_param_group(param_group)
        index = len(self.optimizer.param_groups) - 1
        self._given.append(list(self.optimizer.param_groups[index]["params"]))
        self._adopt(index, self._given[index])

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One whole update: reduce what is not reduced, decide overflow for all ranks, clip, step, publish.

        Returns what ``closure`` returned. Raises LossScaleError at the minimum loss scale.
        """
        result = None
        if not self.in_step:
            result = None if closure is None else closure()
            self._progress = _Progress(self.reducer.passes)
        assert self._progress is not None
        if self._progress.update is None and not self._decide(self._progress):
            return result
        assert self._progress.update is not None
        self._progress.update.run()
        self._end_step()
        self.reducer.clear()
        if self.options.scaler is not None:
            self.options.scaler.update_scale(False)
        return result

    @property
    def in_step(self) -> bool:
        """Whether a step has raised and no backward ran since: the next call of ``step`` goes on with it."""
        progress = self._progress
        return progress is not None and (
            progress.update is not None or progress.passes == self.reducer.passes
        )

    def _decide(self, progress: _Progress) -> bool:
        """Reduce and survey the window and make the update of it; False where an overflow skips it."""
        if not progress.reduced:
            self.reducer.refuse_broken()
            self.reducer.finish_window()
            progress.reduced, progress.passes = True, self.reducer.passes
        if progress.figures is None:
            progress.figures = self._survey(awake=sum(param.requires_grad for _, param in self._dormant))
        if progress.figures.woken:
            self._wake_in_step()
            progress.figures = self._survey()
        norm = progress.figures.square**0.5 / self.loss_scale
        unused = unused_everywhere(self.reducer.stores, self._group) if progress.figures.unseen else []
        if self.options.refuse_unused:
            refuse(unused)
        self.overflow = not norm < float("inf")  # true for inf and for NaN
        self._grad_norm = norm
        scaler = self.options.scaler
        if self.overflow and (scaler is not None or self.options.skip_nonfinite):
            self.last_nonfinite = None if self.reducer.watch is None else self.reducer.watch.find()
            self._end_step()
            self.reducer.clear()
            if scaler is not None:
                scaler.update_scale(True, self.last_nonfinite)
            return False
        self.overflow = False
        if self.options.clip > 0:
            clip = float(clip_coefficient(norm, self.options.clip))
        else:
            clip = 1.0
        factor = clip / self.loss_scale
        if self._own is not None and self.reducer.keeps_own():
            progress.update = self._stepping.own_update(self._own, self.reducer.stores, factor)
        else:
            progress.update = self._stepping.update(self.reducer.stores, factor, unused)
        self.reducer.use()
        return True

    def _survey(self, awake: int = 0) -> Figures:
        # A norm that decides nothing, neither a clip factor nor whether the step is taken, may be off by a rounding.
        decides = self.options.clip > 0 or self.options.scaler is not None or self.options.skip_nonfinite
        groups = (self._group, self.options.model_group, self.options.replicas)
        return survey(
            self.reducer.stores, *groups, self.options.counts, decides, self.reducer.keeps_own(), awake
        )

    def _end_step(self) -> None:
        self._progress = None
        self.reducer.unuse()

    def forget_step(self) -> None:
        """Give up a step that raised, whatever it has changed: what it would have written is about to be replaced."""
        self._end_step()
        self.reducer.clear()

    def wake(self) -> None:
        """Before a forward of stage 3: take in parameters that were frozen and now require gradients.

        At the other stages that happens in ``step``, where all ranks can compare what they would take in.
        """
        for partition in self.partitions:
            partition.values.check_dtypes()
        if self.policy.shards_parameters and any(param.requires_grad for _, param in self._dormant):
            self._wake()

    def _wake(self) -> None:
        dormant, self._dormant = self._dormant, []
        for index in range(len(self._given)):
            self._adopt(index, [param for i, param in dormant if i == index])

    def _wake_in_step(self) -> None:
        """Take in what was unfrozen in this window, whose gradients are still whole; collective.

        Raises DesyncError, on every rank, unless it is the same on all.
        """
        woken = [self._names[param] for _, param in self._dormant if param.requires_grad]
        agree({"the parameters unfrozen since the last step": ", ".join(woken) or "none"}, self._group)
        known = len(self.reducer.stores)
        self._wake()
        for store in self.reducer.stores[known:]:
            self.reducer.reduce_late(store)

    def destroy(self) -> None:
        """Remove every hook and give the torch optimizer back its own parameters, without state."""
        self.reducer.arrivals.remove()
        remove_zero_grad(self.optimizer)
        self.forget_step()
        for partition in self.partitions:
            partition.values.release()
            for param in partition.params:
                one, shards = trained_of(param), shards_at(param)
                if one is not None and one.partition is partition:
                    carry(param, None if shards is None else ZeroParam(shards.name, shards=shards))
        for param_group, params in zip(self.optimizer.param_groups, self._given, strict=True):
            param_group["params"] = params
        self.optimizer.state.clear()
        self.partitions.clear()
        self.reducer.stores.clear()
        self._dormant.clear()
        self.offload.close()

    def state_dict(self) -> dict[str, Any]:
        """This rank's state: references, not copies; ``load_state_dict`` takes it at the same layout."""
        return {
            "zero_stage": self.policy.stage,
            "layouts": self._layouts(),
            "loss_scaler": None if self.options.scaler is None else self.options.scaler.state_dict(),
            "overflow": self.overflow,
            "fp32_masters": [partition.master.detach() for partition in self.partitions],
            "base_optimizer_state": self.optimizer.state_dict(),
            "apart": [dict(partition.state.apart) for partition in self.partitions],
        }

    def load_state_dict(self, state: dict[str, Any], load_optimizer_states: bool = True) -> None:
        """Raises UsageError when ``state`` was made with other layouts."""
        if state["layouts"] != self._layouts():
            raise UsageError(
                "this optimizer state belongs to other parameters, or to another number of ranks. "
                "Fix: use engine.load_checkpoint, which reads any layout"
            )
        if load_optimizer_states:
            self.optimizer.load_state_dict(state["base_optimizer_state"])
            for partition, apart in zip(self.partitions, state["apart"], strict=True):
                partition.state.apart = {
                    i: own if own is None else {key: copy_of(value) for key, value in own.items()}
                    for i, own in apart.items()
                }
        for partition, master in zip(self.partitions, state["fp32_masters"], strict=True):
            partition.master.detach().copy_(master)
            partition.values.publish()
        if self.options.scaler is not None and state["loss_scaler"] is not None:
            self.options.scaler.load_state_dict(state["loss_scaler"])

    def _layouts(self) -> list[dict[str, Any]]:
        return [layout.to_json() for partition in self.partitions for _, layout, _, _ in partition.flats()]

    def take_edits(self) -> None:
        """Let what was written to parameters in place since the last step reach the masters; not collective."""
        for partition in self.partitions:
            partition.values.take_edits()

    def _adopt(self, index: int, params: list[torch.nn.Parameter]) -> None:
        """Make partitions of the parameters of param group ``index``, one per dtype; frozen ones wait."""
        param_group = self.optimizer.param_groups[index]
        taken = set(map(id, params))
        masters = [p for p in param_group["params"] if id(p) not in taken]
        by_dtype: dict[torch.dtype, list[torch.nn.Parameter]] = {}
        for param in params:
            if param not in self._names:
                raise UsageError(
                    f"the optimizer's param group {index} holds a parameter of shape {tuple(param.shape)} that the "
                    "model does not have. Fix: build the optimizer from this model's parameters()"
                )
            if param.requires_grad:
                by_dtype.setdefault(param.dtype, []).append(param)
            else:
                self._dormant.append((index, param))
        for members in by_dtype.values():
            names = [self._names[param] for param in members]
            values: FlatValues | ShardValues
            if self.policy.shards_parameters:
                values = ShardValues(members, self._group, self.options.replicas, self.offload)
            else:
                values = FlatValues(names, members, self._group, self.policy)
            partition = Partition(names, members, index, values, self.offload, self.optimizer, self._flat)
            partition.state.adopt()
            self.partitions.append(partition)
            self._know(partition, self.reducer.add(partition))
            masters += partition.stepped
            if isinstance(self.optimizer, ShardAware):
                self.optimizer.bind_shards(partition.views())
        param_group["params"] = masters

    def _know(self, partition: Partition, store: GradStore) -> None:
        """Let each parameter know who trains it."""
        for index, (name, param) in enumerate(zip(partition.names, partition.params, strict=True)):
            one = Trained(name, index, partition, store, self.reducer, lambda: self.loss_scale)
            carry(param, ZeroParam(name, one, shards_at(param)))


# ``zero_grad`` of the torch optimizer that the user still holds clears what the engine has taken over too: its param
# groups hold the masters by now, whose gradients exist only in the middle of a step. The method is kept in the
# optimizer's own ``__dict__``, so that its class stays as it is.
_ZERO_GRAD = "zero_grad"


def install_zero_grad(optimizer: torch.optim.Optimizer, reducer: Reducer) -> None:
    """Let ``optimizer.zero_grad`` forget the window's gradients."""
    if _ZERO_GRAD not in optimizer.__dict__:
        # Users keep the optimizer longer than the engine.
        optimizer.__dict__[_ZERO_GRAD] = partial(_zero_grad, weakref.ref(optimizer), weakref.ref(reducer))


def remove_zero_grad(optimizer: torch.optim.Optimizer) -> None:
    """Undo ``install_zero_grad``."""
    if getattr(optimizer.__dict__.get(_ZERO_GRAD), "func", None) is _zero_grad:
        del optimizer.__dict__[_ZERO_GRAD]


def _zero_grad(
    optimizer_of: weakref.ref[torch.optim.Optimizer],
    reducer_of: weakref.ref[Reducer],
    set_to_none: bool = True,
) -> None:
    optimizer, reducer = optimizer_of(), reducer_of()
    if optimizer is not None:
        type(optimizer).zero_grad(optimizer, set_to_none)
    if reducer is not None:
        reducer.clear()
