"""What users say of single modules at stage 3, where zeropipe cannot see it: which run as one (leaves), and which use
parameters that another module owns (external ones).

The marks are attributes of the modules themselves, under names by which other libraries find them, so they are copied
with a module and may be made before there is an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from functools import partial

import torch

from zeropipe.config.schema_zero import LeafModule
from zeropipe.errors import UsageError
from zeropipe.runtime.zero.param import zero_param

_LEAF = "_z3_leaf"
_EXTERNAL = "_zero_external"  # in a module's __dict__: the list of its external parameters
_LISTING = "ds_external_parameters"  # the method that other libraries call

# ---- leaves: fetched whole, because which of their children run depends on the data (experts) ----


def set_z3_leaf_modules(
    model: torch.nn.Module, leaf_module_classes: Iterable[type[torch.nn.Module] | str]
) -> list[torch.nn.Module]:
    """Mark every module of ``model`` that is of one of the classes (or class names); returns them.

    Raises UsageError when there is none.
    """
    wanted = list(leaf_module_classes)
    found = [module for module in model.modules() if _is_one(module, wanted)]
    if not found:
        names = ", ".join(cls if isinstance(cls, str) else cls.__name__ for cls in wanted)
        raise UsageError(
            f"set_z3_leaf_modules: the model has no module of class {names}", fix="check the class"
        )
    for module in found:
        set_z3_leaf_module(module, True)
    return found


def set_z3_leaf_modules_by_name(
    model: torch.nn.Module, module_names: Sequence[str], flag: bool = True, raise_if_not_found: bool = True
) -> tuple[list[torch.nn.Module], list[str]]:
    """Mark the modules of these full names (``flag`` False: take the mark off); returns them and the names of none.

    Raises UsageError for a name of none, unless ``raise_if_not_found`` is False.
    """
    return _mark(model, module_names, flag, raise_if_not_found, "name", str.__eq__)


def set_z3_leaf_modules_by_suffix(
    model: torch.nn.Module,
    module_name_suffixes: Sequence[str],
    flag: bool = True,
    raise_if_not_found: bool = True,
) -> tuple[list[torch.nn.Module], list[str]]:
    """As ``set_z3_leaf_modules_by_name``, of all modules whose full names end so."""
    return _mark(model, module_name_suffixes, flag, raise_if_not_found, "suffix", str.endswith)


def _mark(
    model: torch.nn.Module,
    wanted: Sequence[str],
    flag: bool,
    refuses: bool,
    kind: str,
    fits: Callable[[str, str], bool],
) -> tuple[list[torch.nn.Module], list[str]]:
    named = dict(model.named_modules(remove_duplicate=False))
    missing = [want for want in wanted if not any(fits(name, want) for name in named)]
    if missing and refuses:
        near = [match for want in missing for match in get_close_matches(want, named, n=1)]
        raise UsageError(
            f"set_z3_leaf_modules_by_{kind}: the model has no such module",
            expected="names as model.named_modules() gives them",
            found=", ".join(missing),
            fix=f"did you mean {', '.join(near)}?" if near else None,
        )
    found = {module: None for name, module in named.items() if any(fits(name, want) for want in wanted)}
    for module in found:
        set_z3_leaf_module(module, flag)
    return list(found), missing


def unset_z3_leaf_modules(
    model: torch.nn.Module, leaf_module_classes: Iterable[type[torch.nn.Module] | str]
) -> list[torch.nn.Module]:
    """Take the mark off again; returns the modules that had it."""
    wanted = list(leaf_module_classes)
    found = [module for module in get_z3_leaf_modules(model) if _is_one(module, wanted)]
    for module in found:
        set_z3_leaf_module(module, False)
    return found


def set_z3_leaf_module(module: torch.nn.Module, flag: bool = True) -> None:
    """Mark one module; it has effect on engines that are made afterwards."""
    # An engine makes its units once; ranks compare marks in ``initialize``, as they must be equal on all.
    setattr(module, _LEAF, flag)


def z3_leaf_module(module: torch.nn.Module) -> bool:
    """Whether the module is marked."""
    return bool(getattr(module, _LEAF, False))


def get_z3_leaf_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if z3_leaf_module(module)]


def z3_leaf_parameter(param: torch.nn.Parameter) -> bool:
    """Whether the parameter belongs to a marked module of a model under stage 3."""
    known = zero_param(param)
    return known is not None and known.shards is not None and known.shards.in_leaf


def leaf_modules(model: torch.nn.Module, keys: LeafModule) -> list[torch.nn.Module]:
    """The marked modules and those that the config names."""
    suffixes = tuple(keys.name_suffixes)
    return [
        module
        for name, module in model.named_modules()
        if z3_leaf_module(module)
        or name in keys.names
        or name.endswith(suffixes)
        or _is_one(module, keys.classes)
    ]


def _is_one(module: torch.nn.Module, wanted: Iterable[type[torch.nn.Module] | str]) -> bool:
    # By name too: a configuration cannot hold a class, and a script need not import what it may not use.
    kind = type(module)
    names = (kind.__name__, f"{kind.__module__}.{kind.__qualname__}")
    return any(cls in names if isinstance(cls, str) else isinstance(module, cls) for cls in wanted)


# ---- external parameters: gathered for a module's forward and backward although another module owns them ----


def register_external_parameter(module: torch.nn.Module, parameter: torch.nn.Parameter) -> None:
    """Have ``parameter`` gathered for every forward and backward of ``module``; may be repeated.

    Needed only where the automatic detection comes too late: it sees a parameter that is away when a torch
    function meets it, which an extension or a compiled region may not be. Works before and after ``initialize``.
    """
    if not isinstance(module, torch.nn.Module) or not isinstance(parameter, torch.nn.Parameter):
        found = f"{type(module).__name__} and {type(parameter).__name__}"
        raise UsageError("register_external_parameter", expected="a module and a parameter", found=found)
    # By way of ``__dict__``: as an attribute a list of parameters would be looked for among the module's own.
    listed: list[torch.nn.Parameter] = module.__dict__.setdefault(_EXTERNAL, [])
    if not any(parameter is known for known in listed):
        listed.append(parameter)
    show_external_parameters(module)


def unregister_external_parameter(module: torch.nn.Module, parameter: torch.nn.Parameter) -> None:
    """Undo ``register_external_parameter``; raises UsageError where it was not done."""
    listed = externals_of(module)
    kept = [known for known in listed if known is not parameter]
    if len(kept) == len(listed):
        raise UsageError(f"this parameter is not registered with {type(module).__name__}")
    module.__dict__[_EXTERNAL] = kept


def externals_of(module: torch.nn.Module) -> Sequence[torch.nn.Parameter]:
    """The parameters registered with ``module`` itself, sharded (yet) or not."""
    listed: Sequence[torch.nn.Parameter] = module.__dict__.get(_EXTERNAL, ())
    return listed


def show_external_parameters(module: torch.nn.Module) -> None:
    """Give ``module`` the method ``ds_external_parameters()``, by which other libraries ask."""
    # On every hooked module, marked or not: clients call it without asking (trl, before it generates).
    module.__dict__.setdefault(_LISTING, partial(_external_parameters, module))


def hide_external_parameters(module: torch.nn.Module) -> None:
    module.__dict__.pop(_LISTING, None)


def _external_parameters(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of those registered with ``module`` itself."""
    for index, param in enumerate(externals_of(module)):
        known = zero_param(param)
        yield f"external_{index}" if known is None else known.name, param
