"""The one optimizer of all ZeRO stages: it owns the partitions and turns reduced gradients into a step.

    backward -> Reducer (grads.py) -> shard of gradients -> norm, overflow, clip -> torch's step on the master
             -> Partition.publish: the new values on every rank

It wraps the very torch optimizer that the user gave, whose param-group dicts stay the same objects; only
their ``params`` lists now hold the masters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from zeropipe.comm.agree import agree
from zeropipe.comm.collectives import all_reduce
from zeropipe.comm.group import SELF, Group
from zeropipe.errors import UsageError
from zeropipe.runtime.base_optimizer import DeepSpeedOptimizer
from zeropipe.runtime.optimizers.registry import classify
from zeropipe.runtime.optimizers.shard_view import ShardAware
from zeropipe.runtime.zero.client_optimizer import install_zero_grad, remove_zero_grad
from zeropipe.runtime.zero.offload import Offload
from zeropipe.runtime.zero.offload_step import step_in_pieces
from zeropipe.runtime.zero.overlapped_step import can_overlap, step_and_publish
from zeropipe.runtime.zero.own_gradients import bind, hand_over, own_squares
from zeropipe.runtime.zero.partition import Partition
from zeropipe.runtime.zero.policy import Policy
from zeropipe.runtime.zero.reducer import Reducer
from zeropipe.runtime.zero.sharded_partition import ShardedPartition
from zeropipe.runtime.zero.types import AnyPartition, AnyStore
from zeropipe.runtime.zero.untouched import untouched
from zeropipe.runtime.zero.watch import Watch
from zeropipe.tensor.norms import clip_coefficient, rough_squared_norm, squared_norm
from zeropipe.tensor.overflow import NonFinite

if TYPE_CHECKING:
    from zeropipe.runtime.zero.parameter_offload import ParameterOffload


class Scaler(Protocol):
    """What a loss scaler must offer; the classes are in ``runtime/fp16``."""

    @property
    def loss_scale(self) -> float: ...
    def update_scale(self, overflow: bool, diagnosis: object = None) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


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
    replicas: Group = SELF  # stage 3: the ranks that hold the same shards as this one (MiCS)


class ZeroOptimizer(DeepSpeedOptimizer):
    """A torch optimizer on shards.

    ``names``: dotted name of every parameter of the module. ``is_boundary`` and ``micro_step``: the engine's
    clock. Raises UsageError for a parameter that is not in ``names``.
    """

    parameter_offload: ParameterOffload  # at stage 3 only: clients ask with hasattr

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
        self.partitions: list[AnyPartition] = []
        self._names = names
        self._group = group
        self._grad_norm: float | None = None
        self._given = [list(param_group["params"]) for param_group in optimizer.param_groups]
        self._dormant: list[tuple[int, torch.nn.Parameter]] = []  # frozen: (param group, parameter)
        watch = Watch(group, micro_step) if options.scaler is not None else None
        self.reducer = Reducer(policy, is_boundary, watch, options.replicas)
        install_zero_grad(optimizer, self.reducer)
        self._own = bind(optimizer, policy.stage, group)
        if self._own is not None:
            self.reducer.keeps_own = self._own.wants_local_gradients
        kind = classify(optimizer)
        self._elementwise = kind == "elementwise"
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
        """Forget all gradients, reduced ones too; ``.grad`` is None afterwards."""
        self.reducer.clear()

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
        result = None if closure is None else closure()
        self.reducer.finish_window()
        norm, unused, woken = self._survey()
        if woken:
            self._wake_in_step()
            norm, unused, _ = self._survey()
        if self.options.refuse_unused:
            _refuse(unused)
        self.overflow = not norm < float("inf")  # true for inf and for NaN
        self._grad_norm = norm
        scaler = self.options.scaler
        if self.overflow and (scaler is not None or self.options.skip_nonfinite):
            self.last_nonfinite = None if self.reducer.watch is None else self.reducer.watch.find()
            self.reducer.clear()
            if scaler is not None:
                scaler.update_scale(True, self.last_nonfinite)
            return result
        self.overflow = False
        if self.options.clip > 0:
            clip = float(clip_coefficient(norm, self.options.clip))
        else:
            clip = 1.0
        self._update(clip / self.loss_scale, unused)
        self.reducer.clear()
        if scaler is not None:
            scaler.update_scale(False)
        return result

    def wake(self) -> None:
        """Before a forward of stage 3: take in parameters that were frozen and now require gradients.

        At the other stages that happens in ``step``, where all ranks can compare what they would take in.
        """
        for partition in self.partitions:
            partition.check_dtypes()
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
        self.reducer.clear()
        for partition in self.partitions:
            partition.release()
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
        for partition, master in zip(self.partitions, state["fp32_masters"], strict=True):
            partition.master.detach().copy_(master)
            partition.publish()
        if self.options.scaler is not None and state["loss_scaler"] is not None:
            self.options.scaler.load_state_dict(state["loss_scaler"])

    def _layouts(self) -> list[dict[str, Any]]:
        return [layout.to_json() for partition in self.partitions for _, layout, _, _ in partition.flats()]

    def take_edits(self) -> None:
        """Let what was written to parameters in place since the last step reach the masters; not collective."""
        for partition in self.partitions:
            partition.take_edits()

    def store_of(self, partition: AnyPartition) -> AnyStore:
        return self.reducer.stores[self.partitions.index(partition)]

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
        make = ShardedPartition if self.policy.shards_parameters else Partition
        for members in by_dtype.values():
            names = [self._names[param] for param in members]
            partition = make(names, members, index, self._group, self.policy, self, self._flat)
            partition.state.adopt()
            self.partitions.append(partition)
            self.reducer.add(partition)
            masters += partition.stepped
            if isinstance(self.optimizer, ShardAware):
                self.optimizer.bind_shards(partition.views())
        param_group["params"] = masters

    def _survey(self) -> tuple[float, list[tuple[AnyPartition, list[int]]], bool]:
        """The unscaled global gradient norm, the parameters that no rank used, and whether some rank unfroze one:
        one small collective, two when some rank left a parameter out."""
        stores = self.reducer.stores
        device = stores[0].partition.params[0].device if stores else torch.device("cpu")
        # A norm that decides nothing, neither a clip factor nor whether the step is taken, may be off by a rounding.
        decides = self.options.clip > 0 or self.options.scaler is not None or self.options.skip_nonfinite
        square = squared_norm if decides or device.type != "cpu" else rough_squared_norm
        own = self.reducer.keeps_own()
        unseen = 0 if own else sum(len(store.partition.params) - len(store.seen) for store in stores)
        awake = sum(param.requires_grad for _, param in self._dormant)
        squares: torch.Tensor | float = 0.0
        if own:
            squares = own_squares(stores, self._group.size, self.options.counts)
        for store in () if own else stores:
            holder = self.options.replicas if store.partition.sharded else self._group
            counted_once = holder.rank == 0
            if counted_once:
                squares = squares + square(store.shard, store.let_go) - self._not_counted(store)
        if self._group.size == 1 and self.options.model_group.size == 1:
            unused = self._unused_everywhere(device) if unseen else []
            return float(squares) ** 0.5 / self.loss_scale, unused, bool(awake)
        figures = torch.tensor([0.0, unseen, awake], dtype=torch.float64, device=device)
        figures[0] = squares
        all_reduce(figures, self._group, label="gradient norm")
        if self.options.model_group.size > 1:
            all_reduce(figures[:1], self.options.model_group, label="gradient norm of all stages")
        total, missing, woken = figures.tolist()
        unused = self._unused_everywhere(device) if missing else []
        return total**0.5 / self.loss_scale, unused, bool(woken)

    def _not_counted(self, store: AnyStore) -> torch.Tensor | float:
        """The squared norm of this rank's pieces of parameters whose copy on another rank counts."""
        counts = self.options.counts
        if counts is None:
            return 0.0
        partition = store.partition
        copies = [i for i, param in enumerate(partition.params) if not counts(param)]
        return sum((squared_norm(partition.local(store.shard, i)) for i in copies), start=0.0)

    def _unused_everywhere(self, device: torch.device) -> list[tuple[AnyPartition, list[int]]]:
        stores = self.reducer.stores
        flags = [index in store.seen for store in stores for index in range(len(store.partition.params))]
        used = torch.tensor(flags, dtype=torch.int32, device=device)
        all_reduce(used, self._group, op="max", label="used parameters")
        counts = [len(store.partition.params) for store in stores]
        found = []
        for store, marks in zip(stores, used.split(counts), strict=True):
            indices = [index for index, mark in enumerate(marks.tolist()) if not mark]
            if indices:
                found.append((store.partition, indices))
        return found

    def _update(self, factor: float, unused: list[tuple[AnyPartition, list[int]]]) -> None:
        """Step on ``factor`` times the reduced gradients, or this rank's own."""
        self.take_edits()
        if self._own is not None and self.reducer.keeps_own():
            hand_over(self._own, self.reducer.stores, factor)
            self.optimizer.step()
            for partition in self.partitions:
                partition.publish()
            return
        idle = {id(partition) for partition, indices in unused if len(indices) == len(partition.params)}
        busy = [
            (partition, store.shard)
            for partition, store in zip(self.partitions, self.reducer.stores, strict=True)
            if id(partition) not in idle
        ]
        for partition, gradient in () if self.offload.pages_state else busy:
            partition.load_gradient(gradient, factor)
        rest = [(partition, indices) for partition, indices in unused if id(partition) not in idle]
        for partition, indices in rest:
            partition.drop_gradients(indices)
        stepped = [partition for partition, _ in busy]
        if self._elementwise and not rest and can_overlap(self.optimizer, stepped):
            step_and_publish(self.optimizer, stepped)
            for partition in self.partitions:
                partition.drop_gradients()
            return
        with untouched(self.optimizer, rest if self._flat else ()):
            if not self.offload.pages_state:
                self.optimizer.step()
            else:
                for partition, gradient in busy:
                    assert isinstance(partition, ShardedPartition)
                    step_in_pieces(self.optimizer, partition, gradient, factor)
        for partition in self.partitions:
            partition.drop_gradients()
            if id(partition) not in idle:
                partition.publish()


def _refuse(unused: list[tuple[AnyPartition, list[int]]]) -> None:
    """Raise UsageError, on every rank alike, for parameters that require a gradient and got none."""
    pairs = [(partition, index) for partition, indices in unused for index in indices]
    names = [f"'{p.names[index]}'" for p, index in pairs if p.params[index].requires_grad]
    if names:
        raise UsageError(
            f"parameters {', '.join(names)} got no gradient on any rank in this step. Fix: use them in the loss, "
            "freeze them with requires_grad_(False), or set zero_optimization.ignore_unused_parameters to true"
        )
