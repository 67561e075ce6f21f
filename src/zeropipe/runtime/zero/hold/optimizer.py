"""The one optimizer of all ZeRO stages: it owns the partitions and turns reduced gradients into a step.

    backward -> Reducer (grads.py) -> shard of gradients -> norm, overflow, clip -> torch's step on the master
             -> Partition.publish: the new values on every rank

It wraps the very torch optimizer that the user gave, whose param-group dicts stay the same objects; only
their ``params`` lists now hold the masters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from zeropipe.comm.agreement import agree
from zeropipe.comm.group import Group
from zeropipe.errors import UsageError
from zeropipe.runtime.base_optimizer import DeepSpeedOptimizer
from zeropipe.runtime.optimizers.registry import classify
from zeropipe.runtime.optimizers.shard_view import Communicates, ShardAware
from zeropipe.runtime.zero.hold.access import Trained, trained_of
from zeropipe.runtime.zero.hold.autograd import Watch, no_engine
from zeropipe.runtime.zero.hold.offload import Offload
from zeropipe.runtime.zero.hold.partition import Partition
from zeropipe.runtime.zero.hold.policy import Policy, Scaler, StepOptions
from zeropipe.runtime.zero.hold.reducer import Reducer
from zeropipe.runtime.zero.hold.runs import Update
from zeropipe.runtime.zero.hold.shard_values import ShardValues
from zeropipe.runtime.zero.hold.stepping import Stepping, install_zero_grad, reduce_late
from zeropipe.runtime.zero.hold.values import FlatValues
from zeropipe.runtime.zero.param import ZeroParam, carry, shards_at
from zeropipe.runtime.zero.slots import Turn
from zeropipe.runtime.zero.survey import Figures, refuse, survey, unused_everywhere
from zeropipe.tensor.host import Number
from zeropipe.tensor.norms import NonFinite, clip_factor


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
        self._names = names
        self._group = group

        # What is trained: as the user gave it, by param group; what of it is frozen and waits, with its param group;
        # the rest, and where that lives.
        self._given = [list(param_group["params"]) for param_group in optimizer.param_groups]
        self._dormant: list[tuple[int, torch.nn.Parameter]] = []
        self.partitions: list[Partition] = []
        self.offload = Offload(policy)

        # How it is stepped. Stage 3 cuts each parameter by itself, so what needs whole tensors steps on the pieces.
        kind = classify(optimizer)
        self._elementwise = kind == "elementwise"
        self._flat = self._elementwise or (
            not policy.shards_parameters and (policy.shards_optimizer or kind != "whole")
        )
        self._stepping = Stepping(optimizer, self._elementwise, self.offload.pages_state)
        self._own = optimizer if isinstance(optimizer, Communicates) else None
        if self._own is not None:
            self._own.bind_communication(group)

        # What the last step found, and one that is under way, or raised.
        self.overflow = False
        self.last_nonfinite: NonFinite | None = None
        self.unread_norm: Number | None = None  # ``grad_norm`` where it is, perhaps still on its way
        self._progress: _Progress | None = None

        self._backward: Callable[[torch.Tensor, bool], object] = no_engine
        watch = Watch(group, micro_step) if options.scaler is not None else None
        keeps_own = (lambda: False) if self._own is None else self._own.wants_local_gradients
        share = policy.sharing
        self.turn = None if share is None else Turn(share, group, micro_step, next(iter(names)).device)
        given = policy, is_boundary, watch, options.replicas, keeps_own, self._give_up_step
        self.reducer = Reducer(*given, self.turn)
        self._zero_grad = install_zero_grad(optimizer, self.reducer.clear)
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
    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale follows overflows."""
        return self.options.scaler is not None and self.options.scaler.dynamic

    @property
    def clip_grad(self) -> float:
        """The norm that gradients are clipped to; 0: they are not."""
        return self.options.clip

    @property
    def loss_scaler(self) -> Scaler | None:
        return self.options.scaler

    @property
    def cpu_offload(self) -> bool:
        """Whether masters and optimizer state live in host memory, or in files."""
        return self.policy.offload_optimizer

    @property
    def grad_norm(self) -> float | None:
        """Global L2 norm of the last step's gradients before clipping, None before one; may wait for the device."""
        if isinstance(self.unread_norm, torch.Tensor):
            self.unread_norm = self.unread_norm.item()
        return self.unread_norm

    def backward(self, loss: torch.Tensor, retain_graph: bool = False) -> None:
        """As ``engine.backward``, of a loss that the caller has divided by the accumulation steps already."""
        self._backward(loss, retain_graph)

    def serve(self, backward: Callable[[torch.Tensor, bool], object]) -> None:
        """Have ``backward(loss, retain_graph)`` run what ``self.backward`` is asked for: the engine knows the scale."""
        self._backward = backward

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, reduced ones too; ``.grad`` is None afterwards.

        Raises UsageError after a step that raised when part of it was done: that is to be called again.
        """
        self.reducer.clear()

    def _give_up_step(self) -> None:
        """Before gradients are forgotten, whoever asks for it."""
        self.check_whole("zero_grad")
        self._progress = None
        self.reducer.use(False)

    def check_whole(self, call: str) -> None:
        """Raise UsageError where a step that raised has changed some of the parameters and not others."""
        update = None if self._progress is None else self._progress.update
        if update is not None and update.changed:
            raise UsageError(
                f"{call}: the last step raised after a part of the parameters was stepped",
                fix="call step() again, which goes on where it stopped, or load a checkpoint",
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
        for partition in self.partitions:
            partition.values.before_write()
        self._progress.update.run()
        self.forget_step()
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
        reducer, options = self.reducer, self.options
        # [1] Everything is reduced, and [2] all ranks know the same of it; each is collective, and done once.
        if not progress.reduced:
            reducer.refuse_broken()
            reducer.finish_window()
            progress.reduced, progress.passes = True, reducer.passes
        if progress.figures is None:
            awake = sum(param.requires_grad for _, param in self._dormant) if self._dormant else None
            progress.figures = survey(reducer.stores, self._group, options, reducer.keeps_own(), awake)
        if progress.figures.woken:
            self._wake(in_step=True)
            progress.figures = survey(reducer.stores, self._group, options, reducer.keeps_own(), 0)
        figures = progress.figures
        unused = unused_everywhere(reducer.stores, self._group, figures.used) if figures.unseen else {}
        if options.refuse_unused:
            refuse(unused)

        # [3] From here on each rank decides by itself, alike.
        scale, norm = self.loss_scale, figures.square**0.5
        norm = self.unread_norm = norm if scale == 1.0 else norm / scale
        # Not below infinity: inf or NaN. A norm that the host was not told skips no step.
        skips = options.scaler is not None or options.skip_nonfinite
        self.overflow = skips and not norm < float("inf")
        if self.overflow:
            self.last_nonfinite = None if reducer.watch is None else reducer.watch.find()
            self.forget_step()
            if options.scaler is not None:
                options.scaler.update_scale(True, self.last_nonfinite)
            return False
        clip = clip_factor(norm, options.clip)
        factor = clip if scale == 1.0 else clip / scale
        own = self._own if reducer.keeps_own() else None
        progress.update = self._stepping.update(reducer.stores, factor, unused, own)
        reducer.use(True)
        return True

    def forget_step(self) -> None:
        """A step is done, or given up although it may have changed something, which is about to be replaced."""
        self._progress = None
        self.reducer.clear()

    def wake(self) -> None:
        """Before a forward of stage 3: take in parameters that were frozen and now require gradients.

        At the other stages that happens in ``step``, where all ranks can compare what they would take in.
        """
        for partition in self.partitions:
            partition.values.check_dtypes()
        if self.policy.shards_parameters and any(param.requires_grad for _, param in self._dormant):
            self._wake()

    def _wake(self, in_step: bool = False) -> None:
        """``in_step``: their gradients of this window are still whole, and reduced now. Raises DesyncError, on every
        rank, unless they are the same on all."""
        if in_step:
            woken = [self._names[param] for _, param in self._dormant if param.requires_grad]
            agree({"the parameters unfrozen since the last step": ", ".join(woken) or "none"}, self._group)
        dormant, self._dormant = self._dormant, []
        known = len(self.reducer.stores)
        for index in range(len(self._given)):
            self._adopt(index, [param for i, param in dormant if i == index])
        for store in self.reducer.stores[known:] if in_step else ():
            if self.turn is None:
                reduce_late(store, self.reducer.watch)
            else:  # autograd has added up its slots: it is trained from the next step on
                store.clear()

    def destroy(self) -> None:
        """Remove every hook and give the torch optimizer back its own parameters, without state."""
        # Hooks first: none of what follows may be seen by a backward.
        self.reducer.arrivals.remove()
        self._backward = no_engine
        if vars(self.optimizer).get("zero_grad") is self._zero_grad:
            del vars(self.optimizer)["zero_grad"]
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
        # Layouts as JSON name every parameter, its shape and where it is cut.
        if state["layouts"] != self._layouts():
            raise UsageError(
                "this optimizer state belongs to other parameters, or to another number of ranks",
                fix="use engine.load_checkpoint, which reads any layout",
            )
        if load_optimizer_states:
            self.optimizer.load_state_dict(state["base_optimizer_state"])
            for partition, apart in zip(self.partitions, state["apart"], strict=True):
                partition.state.set_apart(apart)
        for partition, master in zip(self.partitions, state["fp32_masters"], strict=True):
            partition.take_master(master)
        if self.options.scaler is not None and state["loss_scaler"] is not None:
            self.options.scaler.load_state_dict(state["loss_scaler"])

    def _layouts(self) -> list[dict[str, Any]]:
        return [layout.to_json() for p in self.partitions for _, layout, _ in p.values.flats(p.group_index)]

    def show_hooks(self, parameter_offload: object) -> None:
        """Let clients find the hooks of stage 3."""
        self.parameter_offload = parameter_offload

    def take_edits(self) -> None:
        """Let what was written to parameters in place since the last step reach the masters; not collective."""
        for partition in self.partitions:
            partition.values.take_edits()

    refresh_fp32_params = take_edits  # nobody has to call it: a step does

    def _adopt(self, index: int, params: list[torch.nn.Parameter]) -> None:
        """Make partitions of the parameters of param group ``index``, one per dtype; frozen ones wait."""
        param_group = self.optimizer.param_groups[index]
        # Masters take the place of parameters in the param group, which stays the object that schedulers know.
        taken = set(map(id, params))
        masters = [p for p in param_group["params"] if id(p) not in taken]
        by_dtype: dict[torch.dtype, list[torch.nn.Parameter]] = {}
        for param in params:
            if param not in self._names:
                raise UsageError(
                    f"the optimizer's param group {index} holds a parameter of shape {tuple(param.shape)} that the "
                    "model does not have",
                    fix="build the optimizer from this model's parameters()",
                )
            if param.requires_grad:
                by_dtype.setdefault(param.dtype, []).append(param)
            else:
                self._dormant.append((index, param))
        # One partition for each dtype: its master is one tensor, and its values are one buffer.
        for members in by_dtype.values():
            names = [self._names[param] for param in members]
            values: FlatValues | ShardValues
            if self.policy.shards_parameters:
                values = ShardValues(members, self._group, self.options.replicas, self.offload)
            else:
                values = FlatValues(names, members, self._group, self.policy)
            moments = self.policy.state_dtype(values.dtype) if self._elementwise else None
            home = self.offload, self.optimizer
            partition = Partition(names, members, index, values, *home, self._flat, moments)
            partition.state.adopt()
            self.partitions.append(partition)
            masters += partition.stepped
            if isinstance(self.optimizer, ShardAware):
                self.optimizer.bind_shards(partition.views())
            store = self.reducer.add(partition)
            for at, (name, param) in enumerate(zip(names, members, strict=True)):
                one = Trained(name, at, partition, store, self.reducer, lambda: self.loss_scale)
                carry(param, ZeroParam(name, one, shards_at(param)))
        param_group["params"] = masters
