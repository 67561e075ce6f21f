"""Keeps weights that several stages share equal: one starting value, one summed gradient.

The layers of one `TiedLayerSpec` key are one module, whatever the cut: all its parameters are tied. Every rank that
holds a tied weight has its own copy of it. The copies start equal (the first stage's value), get
the same gradient (the sum over all uses, computed to the same bits on every rank) and the same update, so they stay
equal without ever being sent again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zeropipe.comm.collectives import all_gather_object, all_reduce, broadcast
from zeropipe.comm.group import Group, new_group
from zeropipe.errors import UsageError
from zeropipe.runtime.pipe.layers import TiedLayerSpec
from zeropipe.runtime.pipe.topology import PipelineParallelGrid


@dataclass(frozen=True, slots=True)
class TiePlan:
    """One shared parameter: where it lives; the same on all ranks."""

    key: str  # the user's key and the parameter's name, or the name of the first use
    uses: tuple[tuple[int, str], ...]  # (layer, the parameter's path in the layer's module)
    stages: tuple[int, ...]  # of these uses, ascending
    ranks: tuple[int, ...]  # the pipeline ranks of those stages, ascending

    @property
    def crosses(self) -> bool:
        """Whether several ranks have copies, which must be kept equal."""
        return len(self.ranks) > 1


@dataclass(slots=True)
class Tie:
    """One shared weight as this rank has it."""

    plan: TiePlan
    param: nn.Parameter
    group: Group  # the ranks of plan.ranks, in that order
    owner: bool  # this rank's copy is the one that counts in norms and is saved


def plan_ties(
    layers: Sequence[Any],
    modules: Mapping[str, nn.Module],
    pipe: Group,
    stage_of: Callable[[int], int],
    rank_of: Callable[[int], int],
) -> list[TiePlan]:
    """Every shared parameter, in one order on all ranks; collective over the pipeline.

    ``modules``: the tied ones that this rank has built, by key. Raises UsageError, on every rank, where a
    ``tied_weight_attr`` is no parameter.
    """
    specs = {index: layer for index, layer in enumerate(layers) if isinstance(layer, TiedLayerSpec)}
    # A rank knows the modules that it has built, and every rank has to know them all: names, and what is no parameter.
    mine = {
        key: (
            [name for name, _ in module.named_parameters()],
            list(_strange([spec for spec in specs.values() if spec.key == key], module)),
        )
        for key, module in modules.items()
    }
    names: dict[str, list[str]] = {}
    for theirs in all_gather_object(mine, pipe, label="tied modules") if specs else ():
        for key, (parameters, strange) in theirs.items():
            for path, kind in strange:
                raise UsageError(
                    f"tied weight {key!r}: {path} is not a parameter",
                    expected="a torch.nn.Parameter",
                    found=kind,
                    fix="set tied_weight_attr to the attribute that holds the weight",
                )
            names[key] = parameters
    uses: dict[str, list[tuple[int, str]]] = {}
    first_use: dict[int, str] = {}
    for index, layer in enumerate(layers):
        if index in specs:
            for name in names[specs[index].key]:
                uses.setdefault(f"{specs[index].key}.{name}", []).append((index, name))
        elif isinstance(layer, nn.Module):
            # Modules of a plain model share parameters by being the same object.
            for name, param in layer.named_parameters():
                key = first_use.setdefault(id(param), f"{index}.{name}")
                uses.setdefault(key, []).append((index, name))

    def places(where: Callable[[int], int], used: Sequence[tuple[int, str]]) -> tuple[int, ...]:
        return tuple(sorted({where(index) for index, _ in used}))

    return [
        TiePlan(key, tuple(used), places(stage_of, used), places(rank_of, used))
        for key, used in uses.items()
        if len(used) > 1
    ]


def _strange(specs: Sequence[TiedLayerSpec], module: nn.Module) -> Iterator[tuple[str, str]]:
    """What stands under each ``tied_weight_attr`` and is no parameter: (path, class)."""
    for path in dict.fromkeys(path for spec in specs for path in spec.tied_weight_attr):
        found: Any = module
        for name in path.split("."):
            found = getattr(found, name, None)
        if not isinstance(found, nn.Parameter):
            yield f"{type(module).__name__}.{path}", type(found).__name__


def make_ties(
    plans: Iterable[TiePlan], modules: Mapping[int, nn.Module | None], grid: PipelineParallelGrid
) -> list[Tie]:
    """The weights that this rank and another share, with the first rank's value; makes their groups, so collective.

    ``modules``: those of this rank, by layer.
    """
    groups: dict[tuple[int, ...], Group] = {}
    ties = []
    for plan in plans:
        if not plan.crosses:
            continue
        if plan.ranks not in groups:
            groups[plan.ranks] = Group((grid.global_rank,), 0)
            # Every rank takes part in making every group, its own or not.
            for pipeline in grid.topology().get_axis_comm_lists("pipe"):
                group = new_group([pipeline[rank] for rank in plan.ranks])
                if group is not None and grid.global_rank in pipeline:
                    groups[plan.ranks] = group
        here = [(module, path) for index, path in plan.uses if (module := modules.get(index)) is not None]
        if here:
            module, path = here[0]
            # Of the copies, that of the first rank counts in norms and is saved: one, or sums would have it twice.
            owner = grid.stage_id == plan.ranks[0]
            ties.append(Tie(plan, module.get_parameter(path), groups[plan.ranks], owner))
    for tie in ties:
        if tie.param.numel():
            value = tie.param.detach().contiguous()
            broadcast(value, 0, tie.group, label=f"tied {tie.plan.key}")
            if value.data_ptr() != tie.param.data_ptr():
                tie.param.detach().copy_(value)
    return ties


def sum_gradients(
    ties: Iterable[Tie],
    has: Callable[[nn.Parameter], bool],
    gradient: Callable[[nn.Parameter], torch.Tensor],
) -> None:
    """Sum the copies' gradients in place; collective over each tie's group.

    ``has``: whether a parameter was used here. ``gradient``: the tensor to be changed in place, zeros if there was
    none. A parameter that no copy has used gets none, so that the optimizer passes over it as in one process.
    """
    by_group: dict[Group, list[Tie]] = {}
    for tie in ties:
        if tie.param.numel():
            by_group.setdefault(tie.group, []).append(tie)
    for group, shared in by_group.items():
        # Whether anybody used it is agreed first: a sum in which one rank takes no part would hang the others.
        here = [has(tie.param) for tie in shared]
        used = torch.tensor(here, dtype=torch.int32, device=shared[0].param.device)
        all_reduce(used, group, op="max", label="tied weights in use")
        for tie, somewhere in zip(shared, used.tolist(), strict=True):
            if somewhere:
                all_reduce(gradient(tie.param), group, label=f"tied {tie.plan.key}")
