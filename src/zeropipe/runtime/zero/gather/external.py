"""Parameters that a module's forward uses although another module owns them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from zeropipe.errors import UsageError
from zeropipe.runtime.zero.gather.shards import Shards, shards_of
from zeropipe.runtime.zero.param import zero_param

_EXTERNAL = "_zero_external"  # in a module's __dict__: the list of its external parameters
_LISTING = "ds_external_parameters"  # the method that other libraries call


def register_external_parameter(module: torch.nn.Module, parameter: torch.nn.Parameter) -> None:
    """Have ``parameter`` gathered for every forward and backward of ``module``; may be repeated.

    Needed only where the automatic detection comes too late: it sees a parameter that is away when a torch
    function meets it, which an extension or a compiled region may not be. Works before and after ``initialize``.
    """
    if not isinstance(module, torch.nn.Module) or not isinstance(parameter, torch.nn.Parameter):
        found = f"{type(module).__name__} and {type(parameter).__name__}"
        raise UsageError("register_external_parameter", expected="a module and a parameter", found=found)
    listed: list[torch.nn.Parameter] = module.__dict__.setdefault(_EXTERNAL, [])
    if not any(parameter is known for known in listed):
        listed.append(parameter)
    show_external_parameters(module)


def unregister_external_parameter(module: torch.nn.Module, parameter: torch.nn.Parameter) -> None:
    """Undo ``register_external_parameter``; raises UsageError where it was not done."""
    listed = module.__dict__.get(_EXTERNAL, [])
    kept = [known for known in listed if known is not parameter]
    if len(kept) == len(listed):
        raise UsageError(f"this parameter is not registered with {type(module).__name__}")
    module.__dict__[_EXTERNAL] = kept


def external_parameters(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of those registered with ``module`` itself."""
    for index, param in enumerate(module.__dict__.get(_EXTERNAL, ())):
        known = zero_param(param)
        yield f"external_{index}" if known is None else known.name, param


def external_shards(module: torch.nn.Module) -> list[Shards]:
    """The shards of the parameters registered with ``module``; those that are not sharded (yet) are left out."""
    listed: Any = module.__dict__.get(_EXTERNAL)
    found = (shards_of(param) for param in listed or ())
    return [shards for shards in found if shards is not None]


def show_external_parameters(module: torch.nn.Module) -> None:
    """Give ``module`` the method ``ds_external_parameters()``, by which other libraries ask."""
    module.__dict__.setdefault(_LISTING, partial(external_parameters, module))


def hide_external_parameters(module: torch.nn.Module) -> None:
    module.__dict__.pop(_LISTING, None)
