"""Where a model trains: which ranks share it, their devices and dtypes, and at first everywhere rank 0's values."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from zeropipe.comm.collectives import all_reduce, broadcast
from zeropipe.comm.group import SELF, Group, from_process_group, world
from zeropipe.config.schema import Config
from zeropipe.errors import ConfigError, UsageError
from zeropipe.runtime.zero.param import is_sharded, is_trained
from zeropipe.runtime.zero.replication import Replication, replicated, shard_size, with_hops
from zeropipe.tensor.model import (
    HALVES,
    buffers_of_weights,
    free_tensors,
    overlapping,
    shared_memory,
    was_prepared,
    working_dtypes,
)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def data_parallel_group(mpu: Any, mesh: Any) -> Group:
    """The ranks that hold replicas of this rank's part of the model: from ``mpu``, a device mesh, or all."""
    own = getattr(mpu, "data_group", None)
    if isinstance(own, Group):
        return own
    if mpu is not None:
        return from_process_group(mpu.get_data_parallel_group())
    if mesh is not None and hasattr(mesh, "get_group"):
        pair = _mesh_pair(mesh)
        if pair is not None:
            both = world() if mesh.size() == world().size else mesh[pair]._flatten().get_group()
            return both if isinstance(both, Group) else from_process_group(both)
        names = mesh.mesh_dim_names or ()
        if "data_parallel" not in names and mesh.ndim > 1:
            raise ConfigError(
                "initialize: mesh_param",
                expected="an axis named 'data_parallel', or two whose names end in 'replicate' and 'shard'",
                found=f"axes {names} of sizes {tuple(mesh.shape)}",
                fix="name the mesh's axes: init_device_mesh(..., mesh_dim_names=('data_parallel', ...))",
            )
        return from_process_group(mesh.get_group("data_parallel" if "data_parallel" in names else 0))
    return world()


def replication(config: Config, group: Group, mesh: Any) -> Replication:
    """Which ranks of ``group`` share one copy of the shards at stage 3, from the config or a 2-D mesh; collective."""
    zero = config.zero_optimization
    if zero.stage != 3:
        return Replication(group)
    size = shard_size(zero)
    pair = None if mesh is None or not hasattr(mesh, "get_group") else _mesh_pair(mesh)
    if pair is not None:
        replicas, shard = (from_process_group(mesh.get_group(name)) for name in pair)
        if size is not None and size != shard.size:
            raise ConfigError(
                "config key 'zero_optimization.mics_shard_size' and the device mesh differ",
                expected=f"{shard.size}, as the mesh's axis {pair[1]!r}",
                found=size,
                fix="remove the key, or make the mesh of that shape",
            )
        return Replication(with_hops(shard) if zero.mics_hierarchical_params_gather else shard, replicas)
    return replicated(group, zero)


def _mesh_pair(mesh: Any) -> tuple[str, str] | None:
    """The names of a mesh's axes for replicas and for shards; None where it has no such two."""
    names = mesh.mesh_dim_names or ()
    found = [next((n for n in names if n.endswith(end)), None) for end in ("replicate", "shard")]
    return (found[0], found[1]) if found[0] is not None and found[1] is not None else None


def model_parts(
    module: torch.nn.Module, mpu: Any
) -> tuple[Group, Callable[[torch.nn.Parameter], bool] | None]:
    """The ranks that hold the other parts of this replica, and which parameters count here in a norm over them.

    Parts are pipeline stages and tensor-parallel slices. A parameter that several ranks hold whole counts on one of
    them: a slice is marked by ``param.tensor_model_parallel`` (or ``model_parallel``); of tied weights the
    module's ``is_tied_copy`` knows which are copies.
    """
    if mpu is None:
        return SELF, None
    group = getattr(mpu, "model_group", None)
    if not isinstance(group, Group):
        pg = mpu.get_model_parallel_group() if hasattr(mpu, "get_model_parallel_group") else None
        group = SELF if pg is None else from_process_group(pg)
    if group.size == 1:
        return SELF, None
    slice_rank = next(
        (
            int(getattr(mpu, name)())
            for name in (
                "get_slice_parallel_rank",
                "get_tensor_model_parallel_rank",
                "get_model_parallel_rank",
            )
            if hasattr(mpu, name)
        ),
        0,
    )
    is_copy = getattr(module, "is_tied_copy", lambda param: False)

    def counts(param: torch.nn.Parameter) -> bool:
        sliced = getattr(param, "tensor_model_parallel", False) or getattr(param, "model_parallel", False)
        return (sliced or slice_rank == 0) and not is_copy(param)

    return group, counts


def pick_device(args: Any = None) -> torch.device:
    """This rank's GPU if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = getattr(args, "device_rank", None)
    local = getattr(args, "local_rank", None) if local is None else local
    if local is None or local < 0:
        local = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
    return torch.device("cuda", local)


@dataclass(frozen=True, slots=True)
class Dtypes:
    """What every tensor of a model works in: ``tensors`` those that are cast or kept by rule, ``buffers`` the other
    floating-point buffers (None: their own), and all else its own. ``mixed``: wide values may meet 16-bit layers."""

    tensors: Mapping[torch.Tensor, torch.dtype]
    buffers: torch.dtype | None = None
    mixed: bool = False

    def of(self, tensor: torch.Tensor) -> torch.dtype:
        known = self.tensors.get(tensor)
        if known is not None:
            return known
        cast = not isinstance(tensor, torch.nn.Parameter) and tensor.dtype.is_floating_point
        return self.buffers if cast and self.buffers is not None else tensor.dtype


def decide_dtypes(module: torch.nn.Module, device: torch.device, config: Config, stages: Group) -> Dtypes:
    """The dtypes of a run. In 16 bits collective over ``stages``, the ranks that hold the other parts of this replica:
    a stage of nothing but fp32 norms belongs to a prepared model if another stage holds 16-bit layers, and gets wide
    values if another stage makes them."""
    chosen = config.data_types
    buffers = None if chosen.buffer_dtype is None else DTYPES[chosen.buffer_dtype]
    params, modules = list(module.parameters()), list(module.modules())
    forced = None if chosen.param_dtype is None else DTYPES[chosen.param_dtype]
    values = [p for p in params if p.dtype.is_floating_point and p.dtype.itemsize > 1]  # and no codes
    if config.precision == "fp32":
        return Dtypes(dict.fromkeys(values if forced is not None else (), torch.float32), buffers)
    wide = [any(t.dtype not in HALVES for t in tensors) for tensors in free_tensors(module)]
    prepared, wide_params, wide_buffers = _anywhere([was_prepared(params), *wide], device, stages)
    if forced is not None:
        wanted = dict.fromkeys(values, forced)
    else:
        wanted = working_dtypes(modules, DTYPES[config.precision], prepared, buffers)
    tensors: dict[torch.Tensor, torch.dtype] = dict(wanted.items())
    if buffers is None:
        tensors.update(buffers_of_weights(modules, wanted))
    wide_buffers = wide_buffers if buffers is None else buffers not in HALVES
    mixed = wide_buffers or (prepared and wide_params and forced is None)
    return Dtypes(tensors, buffers, mixed)


def _anywhere(here: list[bool], device: torch.device, group: Group) -> list[bool]:
    """Which of ``here`` hold on any rank of ``group``."""
    if group.size == 1:
        return here
    flags = torch.tensor(here, dtype=torch.int32, device=device)
    all_reduce(flags, group, op="max", label="dtypes of the stages")
    return [bool(flag) for flag in flags.tolist()]


def refuse_shared_memory(module: torch.nn.Module) -> None:
    """Raise UsageError where a trained parameter lies on the memory of another tensor of the module.

    torch trains both through the address. Here values move, to a flat buffer, into shards or to another dtype, and the
    two would part in silence.
    """
    trained = {name for name, param in module.named_parameters() if param.requires_grad}
    for pair in overlapping((*module.named_parameters(), *module.named_buffers())):
        if trained.intersection(pair):
            raise UsageError(shared_memory("initialize", pair))


def place_module(module: torch.nn.Module, device: torch.device, dtypes: Dtypes) -> None:
    """Move the module to ``device`` in ``dtypes``; parameters that are shards stay as they are."""
    lazy = [name for name, param in module.named_parameters(remove_duplicate=False) if is_lazy(param)]
    if lazy:
        raise UsageError(
            f"initialize: parameters {', '.join(map(repr, lazy))} of lazy modules have no shape yet. Fix: run the "
            "model once on a batch before initialize, under torch.no_grad(), which gives them their shapes and values"
        )

    grads = {param.grad: dtypes.of(param) for param in module.parameters() if param.grad is not None}

    def place(tensor: torch.Tensor) -> torch.Tensor:
        if is_sharded(tensor):
            return tensor
        if tensor.is_meta:
            raise UsageError(
                f"initialize: a tensor of shape {tuple(tensor.shape)} is on the meta device and has no value. Fix: "
                "call zero.Init(module=model, config_dict_or_path=config) first, which makes it module by module, or "
                "model.to_empty(device=...) and initialize it"
            )
        placed = tensor.to(device, grads.get(tensor) or dtypes.of(tensor))
        if placed is not tensor and is_trained(tensor):
            raise UsageError(
                f"initialize: another engine trains this module in {tensor.dtype} on {tensor.device}, and this one "
                f"would make it {placed.dtype} on {placed.device}. Fix: use the same precision, or destroy() that "
                "engine first"
            )
        return placed

    module._apply(place)


def synchronize_module(module: torch.nn.Module, group: Group) -> None:
    """Give every rank rank 0's value of what no partition has broadcast: buffers and untrained parameters."""
    for tensor in (*module.parameters(), *module.buffers()):
        if is_trained(tensor) or is_sharded(tensor) or tensor.numel() == 0:
            continue
        data = tensor.detach()
        whole = data.contiguous()
        broadcast(whole, 0, group, label="initial values")
        if whole.data_ptr() != data.data_ptr():
            data.copy_(whole)
