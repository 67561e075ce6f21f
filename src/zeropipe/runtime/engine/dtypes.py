"""What dtype every tensor of a model works in, and how torch's layers of one dtype take inputs of another.

A table that stays fp32 makes what is added to it fp32, and layers kept in fp32 get 16-bit inputs; torch refuses both.
Models that keep some tensors wide on purpose train all the same:

    layer in 16 bits    wide inputs are rounded to its dtype, as autocast does; it gives 16 bits
    layer kept wide     16-bit inputs are widened, and its output is rounded to what came in
    weighted loss       inputs are widened to its weights; the loss stays wide

Only where torch would raise: modules with a forward of their own, functions and norms that take the mix are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.loss import _WeightedLoss
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

from zeropipe.comm.collectives import all_reduce
from zeropipe.comm.group import Group
from zeropipe.config.schema import Config
from zeropipe.errors import UsageError
from zeropipe.runtime.zero.param import is_sharded, is_trained
from zeropipe.tensor.model import (
    HALVES,
    buffers_of_weights,
    free_tensors,
    keeps_dtype,
    overlapping,
    shared_memory,
    was_prepared,
    working_dtypes,
)

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_SHOWN = 8  # names of wide tensors in an error
_LAYERS = (
    nn.Linear, nn.Bilinear, _ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.PReLU, nn.EmbeddingBag
)  # fmt: skip
# Of a batch or instance norm torch widens 16-bit inputs itself; of these only on the CPU.
_NORMS = (nn.LayerNorm, nn.GroupNorm)


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype that a configuration names; None where it leaves it open."""
    return None if name is None else _DTYPES[name]


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
    """The dtypes of a run; in 16 bits collective over ``stages``, the ranks that hold other parts of this replica."""
    # Forced is what the user named for all; else those that the model keeps wide on purpose stay as they are.
    forced, buffers = dtype_of(config.data_types.param_dtype), dtype_of(config.data_types.buffer_dtype)
    params, modules = list(module.parameters()), list(module.modules())
    values = [p for p in params if p.dtype.is_floating_point and p.dtype.itemsize > 1]  # and no codes
    if config.precision == "fp32":
        return Dtypes(dict.fromkeys(values if forced is not None else (), torch.float32), buffers)
    wide = [any(t.dtype not in HALVES for t in tensors) for tensors in free_tensors(module)]
    anywhere = [was_prepared(params), *wide]
    # A stage of nothing but fp32 norms belongs to a prepared model if another stage holds 16-bit layers, and gets wide
    # values if another stage makes them.
    if stages.size > 1:
        flags = torch.tensor(anywhere, dtype=torch.int32, device=device)
        all_reduce(flags, stages, op="max", label="dtypes of the stages")
        anywhere = [bool(flag) for flag in flags.tolist()]
    prepared, wide_params, wide_buffers = anywhere
    if forced is not None:
        wanted = dict.fromkeys(values, forced)
    else:
        wanted = working_dtypes(modules, _DTYPES[config.precision], prepared, buffers)
    tensors: dict[torch.Tensor, torch.dtype] = dict(wanted.items())
    if buffers is None:
        tensors.update(buffers_of_weights(modules, wanted))
    wide_buffers = wide_buffers if buffers is None else buffers not in HALVES
    mixed = wide_buffers or (prepared and wide_params and forced is None)
    return Dtypes(tensors, buffers, mixed)


def refuse_shared_memory(module: torch.nn.Module) -> None:
    """Raise UsageError where a trained parameter lies on the memory of another tensor of the module."""
    # torch trains both through the address. Here values move, to a flat buffer, into shards or to another dtype, and
    # the two would part in silence.
    trained = {name for name, param in module.named_parameters() if param.requires_grad}
    for pair in overlapping((*module.named_parameters(), *module.named_buffers())):
        if trained.intersection(pair):
            raise UsageError(shared_memory("initialize", pair))


def place_module(
    module: torch.nn.Module, device: torch.device, dtypes: Dtypes, cut_later: bool = False
) -> None:
    """Move the module to ``device`` in ``dtypes``; parameters that are shards stay as they are, and those that are cut
    later (``cut_later``: all) where they are: a model that no device holds whole may come from the host."""
    lazy = [name for name, param in module.named_parameters(remove_duplicate=False) if is_lazy(param)]
    if lazy:
        raise UsageError(
            f"initialize: parameters {', '.join(map(repr, lazy))} of lazy modules have no shape yet. Fix: run the "
            "model once on a batch before initialize, under torch.no_grad(), which gives them their shapes and values"
        )
    # A gradient that is there already goes with its parameter: torch's ``_apply`` moves it as a tensor like any other.
    grads = {param.grad: dtypes.of(param) for param in module.parameters() if param.grad is not None}

    def place(tensor: torch.Tensor) -> torch.Tensor:
        # zero.Init has put shards where they belong, in the dtype of the run.
        if is_sharded(tensor):
            return tensor
        if tensor.is_meta:
            raise UsageError(
                f"initialize: a tensor of shape {tuple(tensor.shape)} is on the meta device and has no value. Fix: "
                "call zero.Init(module=model, config_dict_or_path=config) first, which makes it module by module, or "
                "model.to_empty(device=...) and initialize it"
            )
        stays = cut_later and (tensor in grads or isinstance(tensor, torch.nn.Parameter))
        place = tensor.device if stays else device
        placed = tensor.to(place, grads.get(tensor) or dtypes.of(tensor))
        if placed is not tensor and is_trained(tensor):
            raise UsageError(
                f"initialize: another engine trains this module in {tensor.dtype} on {tensor.device}, and this one "
                f"would make it {placed.dtype} on {placed.device}. Fix: use the same precision, or destroy() that "
                "engine first"
            )
        return placed

    module._apply(place)


@dataclass(frozen=True, slots=True)
class _Bridge:
    """Hooks of a layer that works in ``dtype``: ``cast`` before a forward, or ``widen`` before and ``narrow`` after."""

    dtype: torch.dtype
    # For each call under way the 16-bit dtype that was widened. Torch calls ``narrow`` after an exception too.
    came: list[torch.dtype | None] = field(default_factory=list)

    def cast(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # The usual call is not rebuilt.
        only = args[0] if len(args) == 1 and not kwargs else None
        if isinstance(only, torch.Tensor) and only.dtype == self.dtype:
            return None
        return tree_map_only(
            torch.Tensor, lambda t: t.to(self.dtype) if t.dtype.is_floating_point else t, (args, kwargs)
        )

    def widen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = (t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
        self.came.append(next((t.dtype for t in tensors if t.dtype in HALVES), None))
        return self.cast(module, args, kwargs)

    def narrow(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        came = self.came.pop()
        if came is None or output is None:
            return output
        return tree_map_only(torch.Tensor, lambda t: t.to(came) if t.dtype == self.dtype else t, output)


class MixedInputs(AbstractContextManager[Any]):
    """The hooks of one model. As a context around a forward it tells where an error about dtypes may come from."""

    def __init__(self, module: nn.Module) -> None:
        self._kept = sorted(
            f"'{name}' ({str(tensor.dtype).removeprefix('torch.')})"
            for name, tensor in (*module.named_buffers(), *module.named_parameters())
            if tensor.dtype.is_floating_point and tensor.dtype.itemsize > HALVES[0].itemsize
        )
        self._handles: list[RemovableHandle] = []
        for layer in module.modules():
            dtype, wide = _meets(layer)
            if dtype is not None:
                bridge = _Bridge(dtype)
                before = bridge.widen if wide else bridge.cast
                self._handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
                if wide:
                    self._handles.append(layer.register_forward_hook(bridge.narrow, always_call=True))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, RuntimeError) and ("dtype" in str(error) or "scalar type" in str(error)):
            shown = ", ".join(self._kept[:_SHOWN]) + (", ..." if len(self._kept) > _SHOWN else "")
            error.add_note(
                f"zeropipe: the model keeps these in the dtype that it gives them: {shown}. Fix: cast where they meet "
                "16-bit values (.to(x.dtype)), or set data_types.buffer_dtype or data_types.param_dtype"
            )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _meets(layer: nn.Module) -> tuple[torch.dtype | None, bool]:
    """(the dtype that the layer needs its inputs in, None for one to leave alone; whether it is kept wide)."""
    if isinstance(layer, _WeightedLoss):
        weights = (t.dtype for t in layer._buffers.values() if t is not None and t.dtype not in HALVES)
        return next(weights, None), False
    # A forward of the user's own may take the mix; one that somebody put on the object too.
    torchs_own = type(layer).forward.__module__.startswith("torch.nn.") and "forward" not in vars(layer)
    if not torchs_own or keeps_dtype(layer) or not isinstance(layer, (*_LAYERS, *_NORMS, _NormBase)):
        return None, False
    values = (p for p in layer.parameters() if p.dtype.is_floating_point and p.dtype.itemsize > 1)
    first = next(values, None)
    if first is None or first.dtype in HALVES:
        return (None if first is None else first.dtype), False
    refuses = isinstance(layer, _LAYERS) or (isinstance(layer, _NORMS) and first.device.type != "cpu")
    return (first.dtype if refuses else None), True
