"""Puts a model where it trains: this rank's device, the dtypes of the run, and at first everywhere rank 0's values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn.parameter import is_lazy

from zeropipe.comm.collectives import all_reduce, broadcast
from zeropipe.comm.group import Group
from zeropipe.config.schema import Config
from zeropipe.errors import UsageError
from zeropipe.runtime.zero.param import is_sharded, is_trained
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
