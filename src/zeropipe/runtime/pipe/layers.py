"""The layers of a `PipelineModule` on one rank: built, found, called, and tied to those of other ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zeropipe.comm.collectives import all_gather_object
from zeropipe.comm.group import Group, new_group
from zeropipe.errors import UsageError
from zeropipe.runtime.pipe.specs import LayerSpec, TiedLayerSpec
from zeropipe.runtime.pipe.tied import Tie, TiePlan

if TYPE_CHECKING:
    from zeropipe.runtime.pipe.module import PipelineModule


def layer_name(layer: Any) -> str:
    """The name of a layer's class or function."""
    if isinstance(layer, LayerSpec):
        return layer.name
    if isinstance(layer, nn.Module):
        return type(layer).__name__
    return getattr(layer, "__name__", type(layer).__name__)


class Layers:
    """The list that the user gave, and what this rank built of it. ``seed(index)`` runs before a layer is built."""

    def __init__(self, given: Sequence[Any], seed: Callable[[int], None]) -> None:
        for index, layer in enumerate(given):
            if not callable(layer) and not isinstance(layer, LayerSpec):
                raise UsageError(
                    f"layer {index} cannot be run",
                    expected="a torch.nn.Module, a LayerSpec or a callable",
                    found=type(layer).__name__,
                )
        self.given = list(given)
        self._seed = seed
        self._calls: dict[int, Callable[[Any], Any]] = {}
        self._modules: dict[int, nn.Module] = {}

    def build(self, index: int, parent: PipelineModule) -> None:
        """Build layer ``index`` and register it: under its number, a tied one under that of its first use."""
        layer = self.given[index]
        if isinstance(layer, TiedLayerSpec):
            if layer.key not in parent.tied_modules:
                first = next(
                    i for i, other in enumerate(self.given) if getattr(other, "key", None) == layer.key
                )
                self._seed(first)
                parent.tied_modules[layer.key] = layer.build()
                parent.add_module(str(first), parent.tied_modules[layer.key])
            module = parent.tied_modules[layer.key]
            function = layer.forward_fn
            self._calls[index] = module if function is None else _Bound(function, module)
            self._modules[index] = module
            return
        if isinstance(layer, LayerSpec):
            self._seed(index)
            layer = layer.build()
        self._calls[index] = layer
        if isinstance(layer, nn.Module):
            parent.add_module(str(index), layer)
            self._modules[index] = layer

    def forget_values(self, index: int) -> None:
        """Keep only the form of a built module that runs elsewhere."""
        if isinstance(self.given[index], nn.Module):
            self.given[index] = deepcopy(self.given[index]).to("meta")

    def call(self, index: int, value: Any) -> Any:
        return self._calls[index](value)

    def module(self, index: int) -> nn.Module | None:
        """The module of layer ``index`` on this rank; None for a plain function."""
        return self._modules.get(index)

    def tied_names(self, modules: Mapping[str, nn.Module], pipe: Group) -> dict[str, list[str]]:
        """The names of all parameters of each tied module, by key; collective over the pipeline.

        Raises UsageError, on every rank, where a ``tied_weight_attr`` is no parameter.
        """
        specs = [layer for layer in self.given if isinstance(layer, TiedLayerSpec)]
        if not specs:
            return {}
        mine = {
            key: (
                [name for name, _ in module.named_parameters()],
                [
                    (f"{type(module).__name__}.{path}", type(found).__name__)
                    for path, found in _attributes(specs, key, module)
                ],
            )
            for key, module in modules.items()
        }
        names: dict[str, list[str]] = {}
        for theirs in all_gather_object(mine, pipe, label="tied modules"):
            for key, (parameters, strange) in theirs.items():
                for path, kind in strange:
                    raise UsageError(
                        f"tied weight {key!r}: {path} is not a parameter",
                        expected="a torch.nn.Parameter",
                        found=kind,
                        fix="set tied_weight_attr to the attribute that holds the weight",
                    )
                names[key] = parameters
        return names

    def plans(
        self, stage_of: Callable[[int], int], rank_of: Callable[[int], int], tied: Mapping[str, Sequence[str]]
    ) -> list[tuple[TiePlan, str, int]]:
        """Every shared parameter as (plan, path in the layer, a layer that has it), in one order on all ranks.

        ``tied``: the names of each tied module's parameters.
        """
        uses: dict[str, list[tuple[int, str]]] = {}
        first_use: dict[int, str] = {}
        for index, layer in enumerate(self.given):
            if isinstance(layer, TiedLayerSpec):
                for name in tied[layer.key]:
                    uses.setdefault(f"{layer.key}.{name}", []).append((index, name))
            elif isinstance(layer, nn.Module):
                for name, param in layer.named_parameters():
                    key = first_use.setdefault(id(param), f"{index}.{name}")
                    uses.setdefault(key, []).append((index, name))
        found = []
        for key, places in uses.items():
            if len(places) < 2:
                continue
            stages = tuple(sorted({stage_of(index) for index, _ in places}))
            ranks = tuple(sorted({rank_of(index) for index, _ in places}))
            found += [(TiePlan(key, stages, ranks), path, index) for index, path in places]
        return found

    def ties(self, parent: PipelineModule) -> list[Tie]:
        """The shared weights that this rank holds and another rank too; makes their groups, so collective."""
        grid = parent.grid
        groups: dict[tuple[int, ...], Group] = {}
        found: dict[str, Tie] = {}
        for plan, path, index in parent.tie_plans():
            if len(plan.ranks) < 2:
                continue
            if plan.ranks not in groups:
                for pipeline in grid.topology().get_axis_comm_lists("pipe"):
                    group = new_group([pipeline[rank] for rank in plan.ranks])
                    if group is not None and grid.global_rank in pipeline:
                        groups[plan.ranks] = group
                groups.setdefault(plan.ranks, Group((grid.global_rank,), 0))
            module = self._modules.get(index)
            if module is None or plan.key in found:
                continue
            owner = grid.stage_id == plan.ranks[0]
            found[plan.key] = Tie(plan, module.get_parameter(path), groups[plan.ranks], owner)
        return list(found.values())


class _Bound:
    """``forward_fn`` of a tied layer with its module; an object, so that it can be pickled and shown."""

    def __init__(self, function: Callable[[nn.Module, Any], Any], module: nn.Module) -> None:
        self.function, self.module = function, module

    def __call__(self, value: Any) -> Any:
        return self.function(self.module, value)


def _attributes(specs: Sequence[TiedLayerSpec], key: str, module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What stands under each ``tied_weight_attr`` of ``key`` and is no parameter."""
    for path in dict.fromkeys(path for spec in specs if spec.key == key for path in spec.tied_weight_attr):
        found: Any = module
        for name in path.split("."):
            found = getattr(found, name, None)
        if not isinstance(found, nn.Parameter):
            yield path, found


def on_meta(spec: LayerSpec) -> nn.Module | None:
    """``spec`` built without memory, None where its constructor does not allow that."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return spec.build()
        except Exception:  # whatever a user's constructor raises on tensors without values
            return None
