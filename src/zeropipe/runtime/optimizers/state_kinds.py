"""The one rule for an optimizer's state: what has one value per element of its parameter, and what is shared.

    state[p]   "exp_avg"   p's shape     per element: cut, gathered, moved, counted in bytes, saved as a tensor
               "step"      one number    shared: the same on all ranks, saved as a value

Every stage, offload, access, reports and checkpoints ask here. An optimizer class says it once: torch's in the table
below, ours by an attribute ``per_element_state``. What neither names is told by its shape, and of a parameter with one
element, whose step count has its shape, by what the same key is for larger parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from zeropipe.layout.numbers import NEVER_STEPPED, number_of, split_numbers

State = Mapping[str, Any]  # an optimizer's state of one parameter
Shared = dict[str, Any] | None  # a parameter's state that is not per element; None: it was never stepped
Shapes = Mapping[str, tuple[int, ...] | None]  # by key of state; None: no tensor


@dataclass(frozen=True, slots=True)
class StateKinds:
    """What is known of one class. ``at_birth``: state that its constructor makes -> the option that fills it."""

    per_element: frozenset[str]
    shared: frozenset[str] = frozenset({"step"})
    at_birth: Mapping[str, str] = field(default_factory=dict)


def _kinds(per_element: str, shared: str = "step", **at_birth: str) -> StateKinds:
    return StateKinds(frozenset(per_element.split()), frozenset(shared.split()), at_birth)


TORCHS: Mapping[type[torch.optim.Optimizer], StateKinds] = MappingProxyType(
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
    # The nearest class wins: one that brings a step of its own says what that keeps, or inherits what it keeps.
    for cls in type(optimizer).__mro__:
        if "per_element_state" in vars(cls):
            return StateKinds(frozenset(vars(cls)["per_element_state"]))
        if cls in TORCHS:
            return TORCHS[cls]
    return _UNKNOWN


def per_element_keys(
    optimizer: torch.optim.Optimizer | None, states: Iterable[tuple[tuple[int, ...], Shapes]]
) -> set[str]:
    """The keys with one value per element, among those of ``states``: (a parameter's shape, its state's shapes).

    ``optimizer`` None: not known, as in a file. What a key is for parameters of one element, others tell: give all.
    """
    kinds = kinds_of(optimizer)
    alike: dict[str, bool] = {}  # key -> whether a parameter that has not exactly one element shows it
    other: set[str] = set()  # keys that are not like their parameter somewhere
    for shape, state in states:
        for key, found in state.items():
            if found is None:
                continue
            if found == shape:
                alike[key] = alike.get(key, False) or any(size != 1 for size in shape)
            else:
                other.add(key)
    # What no table names is per element where it is like its parameter everywhere. A parameter of one element alone
    # proves nothing: a step count has that shape too, so what is declared as shared stays so.
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
    # Newer torch makes it in the first step, older in the constructor alone, where a master was not there yet.
    made: dict[str, Any] = {key: torch.full_like(tensor, options[fill]) for key, fill in fills.items()}
    return {"step": torch.zeros((), device=tensor.device if options.get("fused") else None)} | made


def split_shared(given: Sequence[Shared], numels: Sequence[int]) -> tuple[Shared, dict[int, Shared]]:
    """(what most elements share, what others have instead). None is the rule only where nothing was stepped."""
    # By elements and not by parameters: what is stepped apart costs a call, and copies of what shares its lines.
    kinds: list[tuple[dict[str, Any], int]] = []  # distinct values, elements that have them
    which: list[int | None] = []
    for shared, numel in zip(given, numels, strict=True):
        if shared is None:
            which.append(None)
            continue
        at = next((at for at, (kind, _) in enumerate(kinds) if same_shared(kind, shared)), len(kinds))
        kind, count = kinds[at] if at < len(kinds) else (shared, 0)
        kinds[at : at + 1] = [(kind, count + numel)]
        which.append(at)
    if not kinds:
        return None, {}
    most = max(range(len(kinds)), key=lambda at: kinds[at][1])
    apart = {i: None if at is None else kinds[at][0] for i, at in enumerate(which) if at != most}
    return kinds[most][0], apart


def same_shared(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two parameters share all that is not per element."""
    return one is other or (one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one))


# A count may be a tensor of one element or a number, on either device: by which version of torch it was made.
def _equal(one: Any, other: Any) -> bool:
    if torch.is_tensor(one) or torch.is_tensor(other):
        one, other = torch.as_tensor(one), torch.as_tensor(other)
        return one.shape == other.shape and bool(torch.equal(one, other.to(one.device, one.dtype)))
    return bool(one == other)


def named_numbers(names: Sequence[str], given: Sequence[Shared], numels: Sequence[int]) -> dict[str, Any]:
    """What the tensors of a flat share, each with its ``given``, as one dict; see ``layout.numbers``."""
    # What most share stands under its own name, as every reader of such files expects; the rest says whose it is.
    main, apart = split_shared(given, numels)
    numbers = dict(main or {})
    for index in range(len(names)) if main is None else apart:
        own = apart.get(index)
        for key, value in ({NEVER_STEPPED: True} if own is None else own).items():
            if key == NEVER_STEPPED or not same_shared({key: value}, {key: numbers.get(key)}):
                numbers[number_of(key, names[index])] = value
    return numbers


def numbers_by_tensor(
    numbers: Mapping[str, Any], names: Sequence[str]
) -> tuple[list[Shared], dict[str, Any]]:
    """(what ``named_numbers`` was given, numbers of one tensor that the others have not: by the names in the flat)."""
    shared, own = split_numbers(numbers, names)
    further = {
        number_of(key, name): value
        for name, values in own.items()
        for key, value in values.items()
        if key not in shared and key != NEVER_STEPPED
    }
    return [of_one(shared, own.get(name, {})) for name in names], further


def of_one(shared: Mapping[str, Any], own: Mapping[str, Any]) -> Shared:
    """What one tensor has of the numbers of its flat, some of which are its own; None if it was never stepped."""
    if NEVER_STEPPED in own:
        return None
    return {key: own.get(key, value) for key, value in shared.items()}
