"""``module.apply(fn)`` of a model of shards: ``fn`` finds and edits whole parameters, as under zero.Init.

Each module keeps the method in its own ``__dict__``, so that ``nn.Module`` stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from zeropipe.runtime.zero.gather.build import Build
from zeropipe.runtime.zero.gather.gather import GatheredParameters
from zeropipe.runtime.zero.gather.module_patch import Framed
from zeropipe.runtime.zero.gather.shards import Shards, shards_of
from zeropipe.runtime.zero.status import ZeroParamStatus

_APPLY = "apply"


def install_apply(module: torch.nn.Module) -> None:
    """Let ``module.apply`` see whole parameters. May be repeated."""
    module.__dict__.setdefault(_APPLY, partial(apply, module))


def remove_apply(module: torch.nn.Module) -> None:
    """Undo ``install_apply``."""
    if getattr(module.__dict__.get(_APPLY), "func", None) is apply:
        del module.__dict__[_APPLY]


def apply(module: torch.nn.Module, fn: Callable[[torch.nn.Module], Any]) -> torch.nn.Module:
    """``nn.Module.apply``: ``fn`` on every module below ``module``, children first; returns ``module``.

    What ``fn`` uses of a parameter that is away is gathered until ``fn`` returns, and what it wrote is cut into
    shards again: rank 0's values, on every rank. Collective where ``fn`` uses such a parameter, else free of
    communication but for parameters that are whole at rest. After an exception no parameter that was away is written.

    Raises:
        DesyncError: ranks used or wrote different parameters.
    """
    whole = type(module).apply
    shards = list({id(one): one for one in map(shards_of, module.parameters()) if one is not None}.values())
    if isinstance(fn, Framed) or not shards or any(one.building for one in shards):
        return whole(module, fn)
    with _edited(shards) as build:
        return whole(module, Framed(fn, build))


@contextmanager
def _edited(shards: list[Shards]) -> Iterator[Build]:
    """Have a use of any of ``shards`` fetch it, and edits of those that are whole already reach every rank."""
    first = shards[0]
    build = Build(first.everyone, first.group, first.full.device, None, None, None, what="Module.apply")
    here = [one for one in shards if one.status is ZeroParamStatus.AVAILABLE]
    before = [one.builder for one in shards]
    with ExitStack() as stack:
        for group in dict.fromkeys(one.everyone for one in here):
            members = [one.param for one in here if one.everyone == group]
            stack.enter_context(GatheredParameters(members, modifier_rank=group.ranks[0]))
        for one in shards:
            one.builder = build
        try:
            yield build
        except BaseException as error:
            if not here:  # else the context of those tells the peers
                build.abandon(error)
            raise
        finally:
            build.active = False
            for one, builder in zip(shards, before, strict=True):
                one.builder = builder
