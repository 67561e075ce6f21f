"""The one rule for an optimizer's state: what has one value per element of its parameter, and what is shared.

    state[p]   "exp_avg"   p's shape     per element: cut, gathered, moved, counted in bytes, saved as a tensor
               "step"      one number    shared: the same on all ranks, saved as a value

Every stage, offload, access, reports and checkpoints ask here. An optimizer class says it once: torch's in the table
below, ours by an attribute ``per_element_state``. What neither names is told by its shape, and of a parameter with one
element, whose step count has its shape, by what the same key is for larger parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

State = Mapping[str, Any]  # an optimizer's state of one parameter
Shapes = Mapping[str, tuple[int, ...] | None]  # by key of state; None: no tensor


@dataclass(frozen=True, slots=True)
class StateKinds:
    """What is known of one class. ``at_birth``: state that its constructor makes -> the option that fills it."""

    per_element: frozenset[str]
    shared: frozenset[str] = frozenset({"step"})
    at_birth: Mapping[str, str] = field(default_factory=dict)


def _kinds(per_element: str, shared: str = "step", **at_birth: str) -> StateKinds:
    return StateKinds(frozenset(per_element.split()), frozenset(shared.split()), at_birth)


_TABLE: Mapping[type[torch.optim.Optimizer], StateKinds] = MappingProxyType(
    {
        torch.optim.Adam: _kinds("exp_avg exp_avg_sq max_exp_avg_sq"),
        torch.optim.AdamW: _kinds("exp_avg exp_avg_sq max_exp_avg_sq"),
        torch.optim.SGD: _kinds("momentum_buffer"),
        torch.optim.Adagrad: _kinds("sum", sum="initial_accumulator_value"),
        torch.optim.RMSprop: _kinds("square_avg momentum_buffer grad_avg"),
        torch.optim.Adadelta: _kinds("square_avg acc_delta"),
        torch.optim.Adamax: _kinds("exp_avg exp_inf"),
        torch.optim.NAdam: _kinds("exp_avg exp_avg_sq", "step mu_product"),
        torch.optim.RAdam: _kinds("exp_avg exp_avg_sq"),
        torch.optim.ASGD: _kinds("ax", "step eta mu"),
        torch.optim.Rprop: _kinds("prev step_size"),
    }
)
_UNKNOWN = StateKinds(frozenset())


def kinds_of(optimizer: torch.optim.Optimizer | None) -> StateKinds:
    """What is declared for the optimizer's class or the nearest one that it extends."""
    for cls in type(optimizer).__mro__:
        if "per_element_state" in vars(cls):
            return StateKinds(frozenset(vars(cls)["per_element_state"]))
        if cls in _TABLE:
            return _TABLE[cls]
    return _UNKNOWN


def per_element_keys(
    optimizer: torch.optim.Optimizer | None, states: Iterable[tuple[tuple[int, ...], Shapes]]
) -> set[str]:
    """The keys with one value per element, among those of ``states``: (a parameter's shape, its state's shapes).

    ``optimizer`` None: not known, as in a file. What a key is for parameters of one element, others tell: give all.
    """
    kinds = kinds_of(optimizer)
    alike: dict[
        str, bool
    ] = {}  # key -> whether a parameter that has more or fewer elements than one shows it
    other: set[str] = set()  # keys that are not like their parameter somewhere
    for shape, state in states:
        for key, found in state.items():
            if found is None:
                continue
            if found == shape:
                alike[key] = alike.get(key, False) or any(size != 1 for size in shape)
            else:
                other.add(key)
    undeclared = {key for key in alike if key not in other and key not in kinds.per_element | kinds.shared}
    return {key for key in kinds.per_element if key in alike} | undeclared


def shapes_in(state: State) -> Shapes:
    return {key: tuple(v.shape) if torch.is_tensor(v) else None for key, v in state.items()}


def state_keys(optimizer: torch.optim.Optimizer) -> set[str]:
    """The keys with one value per element in the optimizer's state as it is now: one look at all of it."""
    return per_element_keys(optimizer, ((tuple(t.shape), shapes_in(s)) for t, s in optimizer.state.items()))


def split_state(state: State, keys: Set[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(state with one value per element, the rest) of one parameter; ``keys``: of ``state_keys``."""
    per_element = {key: value for key, value in state.items() if key in keys and torch.is_tensor(value)}
    return per_element, {key: value for key, value in state.items() if key not in per_element}


def born_state(
    optimizer: torch.optim.Optimizer, options: Mapping[str, Any], tensor: torch.Tensor
) -> dict[str, Any]:
    """The state that the optimizer's constructor makes of ``tensor``, whose param group is ``options``; {} for most."""
    fills = kinds_of(optimizer).at_birth
    if not fills:
        return {}
    # Newer torch makes it in the first step, older in the constructor alone.
    made: dict[str, Any] = {key: torch.full_like(tensor, options[fill]) for key, fill in fills.items()}
    return {"step": torch.zeros((), device=tensor.device if options.get("fused") else None)} | made
