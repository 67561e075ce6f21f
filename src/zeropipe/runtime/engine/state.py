"""An engine's state as plain data: what checkpoints are made of, and how what was read is taken over.

parts  --local_state-->  LocalState: flats of the optimizer and of frozen shards, the module, the rest of training
parts  <--adopt_...---   LoadedState: masters and moments were read in place; what is left is numbers and words
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from zeropipe.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO
from zeropipe.checkpoint.save.records import FP32, PARAM, FlatState, LoadedFlat, LocalState, TrainState
from zeropipe.checkpoint.universal_checkpoint import info_of, plain_info
from zeropipe.checkpoint.utils import clone_tensors_for_torch_save
from zeropipe.comm.group import SELF
from zeropipe.layout.flat import FlatShards, TensorSpec
from zeropipe.runtime.engine.module_state import capture, destination
from zeropipe.runtime.engine.parts import Parts
from zeropipe.runtime.engine.placement import grid_of
from zeropipe.runtime.optimizers.shard_view import Communicates
from zeropipe.runtime.optimizers.state_kinds import (
    Shared,
    named_numbers,
    numbers_by_tensor,
    same_shared,
    split_state,
    state_keys,
)
from zeropipe.runtime.zero.gather.shards import shards_of
from zeropipe.runtime.zero.hold.optimizer import ZeroOptimizer
from zeropipe.runtime.zero.hold.partition import Partition
from zeropipe.runtime.zero.param import ZeroParamStatus, is_sharded


def local_state(
    parts: Parts,
    client_state: Mapping[str, Any] | None = None,
    *,
    exclude_frozen: bool = False,
    saving: bool = True,
) -> LocalState:
    """What this rank holds, by reference: nothing is copied. ``saving=False``: only what a load fills in place."""
    optimizer, config = parts.optimizer, parts.config
    flats: list[FlatState] = []
    groups: list[dict[str, Any]] = []
    if optimizer is not None:
        flats += [held.flat for held in optimizer_flats(optimizer)]
        for index, group in enumerate(optimizer.param_groups):
            names = [n for p in optimizer.partitions if p.group_index == index for n in p.names]
            groups.append({k: v for k, v in group.items() if k != "params"} | {"param_names": names})
    flats += _frozen_flats(parts, exclude_frozen)
    # An engine without an optimizer holds what a plain module does, but for parameters that zero.Init has cut.
    stage = 0 if optimizer is None else config.zero_optimization.stage
    model = capture(parts.module, exclude_frozen) if saving else destination(parts.module)
    info = plain_info((client_state or {}).get(UNIVERSAL_CHECKPOINT_INFO)) or info_of(parts.module)
    return LocalState(
        grid=grid_of(parts.group, parts.mpu),
        stage=3 if any(PARAM in f.tensors for f in flats) else stage,
        dtype={"fp16": "float16", "bf16": "bfloat16"}.get(config.precision, "float32"),
        model=replace(model, universal_info=info),
        flats=tuple(flats),
        param_groups=tuple(groups),
        optimizer_name="" if optimizer is None else type(optimizer.optimizer).__name__,
        train=_train_state(parts, dict(client_state or {}), saving),
    )


# ---- flats: the optimizer's state, and shards that no optimizer holds ----


@dataclass(frozen=True, slots=True)
class Holding:
    """A flat, and where the torch optimizer keeps its state."""

    flat: FlatState
    owner: torch.nn.Parameter  # the key in ``optimizer.state``
    where: slice  # the flat's elements in the owner, in 1D
    partition: Partition

    def new_state(self, dtype: torch.dtype) -> torch.Tensor:
        """Zeros for one kind of state of the owner, where its state lives."""
        if self.owner is self.partition.master:
            return self.partition.new_state(dtype)
        return torch.zeros_like(self.owner, dtype=dtype, requires_grad=False)


def optimizer_flats(optimizer: ZeroOptimizer) -> Iterator[Holding]:
    """Every flat of the optimizer on this rank: per partition at stages 0 to 2, per parameter at stage 3."""
    keys = state_keys(optimizer.optimizer)
    for partition in optimizer.partitions:
        values, replicas = partition.values, partition.values.replicas
        whole = partition.flat
        # [1] What is stepped, and which of its elements: one master in runs, pieces of their own, or whole tensors.
        if whole or partition.sharded:
            owners = [partition.master] * len(partition.names) if whole else list(partition.stepped)
            held = [
                (name, layout, values.shard, owner, where if whole else slice(0, layout.shard_numel))
                for owner, (name, layout, where) in zip(
                    owners, values.flats(partition.group_index), strict=False
                )
            ]
        else:
            held = [
                (name, FlatShards((segment.layout.tensors[at],), 1), 0, owner, slice(0, owner.numel()))
                for at, (name, segment, owner) in enumerate(
                    zip(partition.names, partition.segments, partition.stepped, strict=True)
                )
            ]
        # [2] Its state: values per element by their place, and the numbers that its tensors share, or do not.
        _, main = partition.state.of_master() if whole else ({}, None)
        for number, (name, layout, shard, owner, where) in enumerate(held):
            moments, scalars = split_state(optimizer.state.get(owner, {}), keys)
            tensors = {FP32: owner.detach()} | moments
            tensors = {key: value.reshape(-1)[where] for key, value in tensors.items()}
            specs = layout.tensors
            if whole and (moments or main is not None):
                members = [number] if len(held) > 1 else range(len(specs))
                shared = [partition.state.apart.get(at, main) for at in members]
                scalars = named_numbers([s.name for s in specs], shared, [s.numel for s in specs])
            index = partition.group_index
            flat = FlatState(name, layout, shard, tensors, scalars, index, replicas.rank, replicas.size)
            yield Holding(flat, owner, where, partition)


def _frozen_flats(parts: Parts, exclude_frozen: bool) -> Iterator[FlatState]:
    """Sharded parameters that no optimizer holds: one flat each."""
    held = _held(parts)
    replicas = SELF if parts.sharded is None else parts.sharded.parts.replicas
    for name, param in parts.module.named_parameters():
        shards = shards_of(param)
        if shards is None or id(param) in held or (exclude_frozen and not param.requires_grad):
            continue
        spec = TensorSpec(name, tuple(shards.shape), str(shards.dtype).removeprefix("torch."))
        layout = FlatShards((spec,), shards.layout.num_shards, shards.layout.align)
        own = {PARAM: shards.source.detach()}
        yield FlatState(
            name, layout, shards.group.rank, own, replica=replicas.rank, num_replicas=replicas.size
        )


def _held(parts: Parts) -> set[int]:
    """Ids of the parameters that the optimizer holds."""
    partitions = () if parts.optimizer is None else parts.optimizer.partitions
    return {id(param) for partition in partitions for param in partition.params}


def adopt_flats(optimizer: ZeroOptimizer, loaded: Mapping[str, LoadedFlat]) -> None:
    """Give the torch optimizer the moments and scalars that were read; the masters are in place already."""
    base = optimizer.optimizer
    moments: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {}
    kinds: dict[torch.nn.Parameter, list[Shared]] = {}
    numbers: dict[torch.nn.Parameter, dict[str, Any]] = {}  # of single tensors
    partitions: dict[torch.nn.Parameter, Partition] = {}
    # [1] By what is stepped: several flats lie in one master, so it is put together before it is given.
    for held in optimizer_flats(optimizer):
        owner, found = held.owner, loaded[held.flat.name]
        partitions[owner] = held.partition
        names = [spec.name for spec in held.flat.layout.tensors]
        shared, further = numbers_by_tensor(found.scalars, names)
        kinds.setdefault(owner, []).extend(_as_made(base, own) for own in shared)
        numbers.setdefault(owner, {}).update(further)
        state = moments.setdefault(owner, {})
        for key, tensor in found.tensors.items():
            if key in (FP32, PARAM):
                continue
            if key in held.flat.tensors:  # read into the optimizer's own tensor
                state[key] = base.state[owner][key]
                continue
            if key not in state:
                state[key] = held.new_state(tensor.dtype)
            state[key].view(-1)[held.where].copy_(tensor)
    # [2] As the optimizer would have it, had it made these steps itself.
    for owner, state in moments.items():
        given, partition = kinds[owner], partitions[owner]
        base.state.pop(owner, None)
        partition.state.set_apart({})
        if all(own is None for own in given):  # saved before the first step
            continue
        if isinstance(base, Communicates):  # it counts for all its parameters together
            base.state[owner] = _merged(given) | numbers[owner] | state
        elif partition.flat:
            base.state[owner] = dict(state)
            partition.state.set_shared(given)
        else:
            base.state[owner] = (given[0] or {}) | state


def _as_made(base: torch.optim.Optimizer, shared: Shared) -> Shared:
    """As the optimizer would have made it: torch, and we, count in tensors, others in ints."""
    if shared is None:
        return None
    made = {key: clone_tensors_for_torch_save(value) for key, value in shared.items()}
    counts_in_tensors = type(base).__module__.startswith(("torch.", "zeropipe."))
    if counts_in_tensors and isinstance(made.get("step"), (int, float)):
        made["step"] = torch.tensor(float(made["step"]))
    return made


def _merged(kinds: Iterable[Shared]) -> dict[str, Any]:
    """One for all: of values that differ the largest."""
    merged: dict[str, Any] = {}
    for shared in kinds:
        for key, value in (shared or {}).items():
            known = merged.setdefault(key, value)
            if not same_shared({key: value}, {key: known}) and value > known:
                merged[key] = value
    return merged


def adopt_groups(optimizer: ZeroOptimizer, saved: tuple[dict[str, Any], ...]) -> str:
    """Set the hyperparameters of each param group in place; why not, or ""."""
    # In place: schedules and clients hold the very dicts.
    if not saved:
        return ""
    if len(saved) != len(optimizer.param_groups):
        return (
            f"the checkpoint has {len(saved)} param groups and the optimizer {len(optimizer.param_groups)}; "
            "learning rates and the like stay as configured"
        )
    for group, values in zip(optimizer.param_groups, saved, strict=True):
        for key, value in values.items():
            if key not in ("params", "param_names") and key in group:
                group[key] = clone_tensors_for_torch_save(value)
    return ""


def show_loaded_shards(parts: Parts) -> None:
    """Parameters that are shards, and gathered now, show what was read into the shards. Collective at stage 3."""
    for partition in parts.optimizer.partitions if parts.optimizer is not None else ():
        if is_sharded(partition.params[0]):
            partition.values.publish()
    held = _held(parts)
    for param in parts.module.parameters():
        shards = shards_of(param)
        if shards is not None and id(param) not in held and shards.state.status is ZeroParamStatus.AVAILABLE:
            settled = shards.settled().view(-1)
            shards.renewed()[: settled.numel()].copy_(settled)


# ---- what is no tensor of module or optimizer ----


def _train_state(parts: Parts, client_state: dict[str, Any], saving: bool) -> TrainState:
    schedule, loader = parts.lr_scheduler, parts.training_dataloader
    scaler = None if parts.optimizer is None else parts.optimizer.loss_scaler
    base = None if parts.optimizer is None else parts.optimizer.optimizer
    own: dict[str, Any] = {}
    if saving:
        own["rng"] = rng_state(parts.device)
        # What an optimizer that communicates by itself keeps on this rank alone, and of which tensor-parallel slices.
        if isinstance(base, Communicates):
            own |= {"optimizer": base.rank_state(), "slice": _slice_of(parts)}
    return TrainState(
        **parts.clock.state_dict(),
        lr_scheduler=schedule.state_dict() if hasattr(schedule, "state_dict") else None,
        loss_scaler=None if scaler is None else dict(scaler.state_dict()),
        per_rank=own,
        common={
            "data": loader.state_dict() if hasattr(loader, "state_dict") else None,
            **({} if parts.sharing is None else {"threads": torch.get_num_threads()}),
        },
        client_state=client_state,
        ds_config=_plain_config(parts.config.raw),
    )


def _slice_of(parts: Parts) -> list[int]:
    grid = grid_of(parts.group, parts.mpu)
    return [grid.tp_rank, grid.tp_degree]


def adopt_own_state(
    parts: Parts, own: Mapping[str, Any], everyone: Callable[[], Iterable[Mapping[str, Any]]]
) -> str:
    """Give such an optimizer what each rank kept: ``own`` is this rank's part of the file. What to log, or ""."""
    optimizer, here = parts.optimizer, _slice_of(parts)
    if optimizer is None or not isinstance(optimizer.optimizer, Communicates):
        return ""

    def of_our_slices(saved: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        # Ranks that held other tensor-parallel slices, or slices of another degree, are of no use to it.
        return [one["optimizer"] for one in saved if "optimizer" in one and one.get("slice", here) == here]

    notice = optimizer.optimizer.take_rank_states(
        next(iter(of_our_slices([own])), None), lambda: of_our_slices(everyone())
    )
    for partition in optimizer.partitions:  # masters may have moved to where this rank stood by itself
        partition.values.publish()
    return notice


def _plain_config(config: Any) -> Any:
    """The configuration without what JSON has no word for."""
    # A user's dict may hold dtypes and paths; what a file says of them is for people.
    if isinstance(config, Mapping):
        return {str(key): _plain_config(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [_plain_config(value) for value in config]
    return config if config is None or isinstance(config, (bool, int, float, str)) else str(config)


def rng_state(device: torch.device) -> dict[str, Any]:
    """Python's, NumPy's and torch's generators as plain values and tensors."""
    # NumPy only where the program has imported it: nobody else has drawn from it.
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (str(kind), [int(key) for key in keys], *map(float, rest))
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"].clone())
    if "numpy" in state:
        import numpy

        kind, keys, position, has_gauss, gauss = state["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, "uint32"), int(position), int(has_gauss), gauss))
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].clone(), device)
