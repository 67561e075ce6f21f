"""Puts the stages of a pipeline back together: the whole model on every rank, with plain PyTorch alone."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zeropipe.comm.collectives import broadcast, broadcast_object
from zeropipe.errors import UsageError
from zeropipe.runtime.pipe.specs import LayerSpec, TiedLayerSpec

if TYPE_CHECKING:
    from zeropipe.runtime.pipe.module import PipelineModule


class _Function(nn.Module):
    """A plain function, or the ``forward_fn`` of a tied layer, as a child of a Sequential."""

    def __init__(self, function: Any, module: nn.Module | None = None) -> None:
        super().__init__()
        self.function = function
        self.module = module

    def forward(self, value: Any) -> Any:
        return self.function(value) if self.module is None else self.function(self.module, value)


def gather_sequential(pipeline: PipelineModule) -> nn.Sequential:
    """The layers of all stages on every rank, with their present values; collective over each pipeline."""
    group = pipeline.grid.pipe_group
    tied: dict[str, nn.Module] = {}
    shared: dict[str, nn.Parameter] = {}
    children: list[nn.Module] = []
    for index, layer in enumerate(pipeline.layer_list()):
        owner = pipeline.rank_of(index)
        mine = pipeline.layer_module(index)
        if isinstance(layer, TiedLayerSpec) and layer.key in tied:
            module: nn.Module | None = tied[layer.key]
        else:
            module = _copy_of(layer, mine)
            if module is not None:
                _fill(module, mine if owner == group.rank else None, owner, group, index)
        if isinstance(layer, TiedLayerSpec):
            assert module is not None
            tied[layer.key] = module
        if module is None:
            children.append(_Function(layer))
        elif isinstance(layer, TiedLayerSpec) and layer.forward_fn is not None:
            children.append(_Function(layer.forward_fn, module))
        else:
            children.append(module)
    for plan, path, index in pipeline.tie_plans():
        if isinstance(pipeline.layer_list()[index], TiedLayerSpec):
            continue
        holder: Any = children[index]
        *way, last = path.split(".")
        for name in way:
            holder = getattr(holder, name)
        setattr(holder, last, shared.setdefault(plan.key, getattr(holder, last)))
    return nn.Sequential(*children)


def _copy_of(layer: Any, mine: nn.Module | None) -> nn.Module | None:
    """A module of the right shapes, apart from the one that trains."""
    if isinstance(layer, LayerSpec):
        with torch.random.fork_rng(devices=[]):
            return layer.build()
    if isinstance(layer, nn.Module):
        return deepcopy(layer).to_empty(device="cpu")
    return None


def _fill(module: nn.Module, source: nn.Module | None, owner: int, group: Any, index: int) -> None:
    """Give ``module`` the values that the owner's ``source`` has, in the owner's dtype."""
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    forms = None
    if source is not None:
        values = dict((*source.named_parameters(), *source.named_buffers()))
        forms = {name: (values[name].dtype, tuple(values[name].shape)) for name in names}
    forms = broadcast_object(forms, owner, group, label="layer form")
    targets = dict((*module.named_parameters(), *module.named_buffers()))
    for name in names:
        dtype, shape = forms[name]
        if shape != tuple(targets[name].shape):
            raise UsageError(
                f"to_sequential: {name} of layer {index} is not whole on the rank that trains it",
                expected=tuple(targets[name].shape),
                found=shape,
                fix="gather the parameters first (zeropipe.zero.GatheredParameters)",
            )
        value = (
            torch.empty(shape, dtype=dtype) if source is None else values[name].detach().contiguous().clone()
        )
        if value.numel():
            broadcast(value, owner, group, label="layer values")
        targets[name].data = value.to(targets[name].device)
