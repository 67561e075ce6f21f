"""Modules that stage 3 fetches whole, because which of their children run depends on the data (experts)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch

from zeropipe.errors import UsageError

_MARK = "_z3_leaf"  # the name under which users of other libraries may find it


class LeafKeys(Protocol):
    """What the config section ``leaf_module`` offers."""

    classes: list[str]
    names: list[str]
    name_suffixes: list[str]


def set_z3_leaf_modules(
    model: torch.nn.Module, leaf_module_classes: Iterable[type[torch.nn.Module] | str]
) -> list[torch.nn.Module]:
    """Mark every module of ``model`` that is of one of the classes (or class names); returns them.

    Raises UsageError when there is none.
    """
    wanted = list(leaf_module_classes)
    found = [module for module in model.modules() if any(_is_a(module, cls) for cls in wanted)]
    if not found:
        names = ", ".join(cls if isinstance(cls, str) else cls.__name__ for cls in wanted)
        raise UsageError(
            f"set_z3_leaf_modules: the model has no module of class {names}. Fix: check the class"
        )
    for module in found:
        set_z3_leaf_module(module, True)
    return found


def unset_z3_leaf_modules(
    model: torch.nn.Module, leaf_module_classes: Iterable[type[torch.nn.Module] | str]
) -> list[torch.nn.Module]:
    """Take the mark off again; returns the modules that had it."""
    wanted = list(leaf_module_classes)
    found = [m for m in get_z3_leaf_modules(model) if any(_is_a(m, cls) for cls in wanted)]
    for module in found:
        set_z3_leaf_module(module, False)
    return found


def set_z3_leaf_module(module: torch.nn.Module, flag: bool = True) -> None:
    """Mark one module; it has effect on engines that are made afterwards."""
    setattr(module, _MARK, flag)


def z3_leaf_module(module: torch.nn.Module) -> bool:
    """Whether the module is marked."""
    return bool(getattr(module, _MARK, False))


def get_z3_leaf_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if z3_leaf_module(module)]


def z3_leaf_parameter(param: torch.nn.Parameter) -> bool:
    """Whether the parameter belongs to a marked module of a model under stage 3."""
    shards = getattr(getattr(param, "_zero", None), "shards", None)
    return bool(shards is not None and shards.in_leaf)


def leaf_modules(model: torch.nn.Module, keys: LeafKeys) -> list[torch.nn.Module]:
    """The marked modules and those that the config names."""
    found = []
    for name, module in model.named_modules():
        by_name = name in keys.names or any(name.endswith(suffix) for suffix in keys.name_suffixes)
        if z3_leaf_module(module) or by_name or any(_is_a(module, cls) for cls in keys.classes):
            found.append(module)
    return found


def _is_a(module: torch.nn.Module, cls: type[torch.nn.Module] | str) -> bool:
    if not isinstance(cls, str):
        return isinstance(module, cls)
    kind = type(module)
    return cls in (kind.__name__, f"{kind.__module__}.{kind.__qualname__}")
