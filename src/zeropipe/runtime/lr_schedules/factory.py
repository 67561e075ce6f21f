"""Makes a schedule from the name and the params of a configuration: ours, or any of torch's."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from torch.optim import lr_scheduler as torch_schedules
from torch.optim.lr_scheduler import LRScheduler

from zeropipe.errors import ConfigError
from zeropipe.runtime.lr_schedules.base import Schedule, get_torch_optimizer
from zeropipe.runtime.lr_schedules.constants import VALID_LR_SCHEDULES
from zeropipe.runtime.lr_schedules.cycles import LRRangeTest, OneCycle
from zeropipe.runtime.lr_schedules.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR

_OURS: Mapping[str, type[Schedule]] = {
    cls.__name__: cls for cls in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)
}
assert list(_OURS) == VALID_LR_SCHEDULES

# Schedules of torch that JSON cannot describe, or that step() without arguments cannot drive.
_NOT_FROM_JSON = {
    "LambdaLR": "it needs a function",
    "MultiplicativeLR": "it needs a function",
    "SequentialLR": "it needs other schedulers",
    "ChainedScheduler": "it needs other schedulers",
    "ReduceLROnPlateau": "its step() needs a metric",
    "LRScheduler": "it is the base class",
}


def _torch_names() -> list[str]:
    classes = inspect.getmembers(torch_schedules, inspect.isclass)
    return [n for n, c in classes if issubclass(c, LRScheduler) and n not in _NOT_FROM_JSON and n[0] != "_"]


def _find(name: str) -> type[Any]:
    if name in _OURS:
        return _OURS[name]
    if name in _NOT_FROM_JSON:
        raise ConfigError(
            f"scheduler.type {name!r} cannot be made from a configuration: {_NOT_FROM_JSON[name]}",
            fix="make it in your code and pass it as lr_scheduler= to initialize()",
        )
    names = _torch_names()
    if name in names:
        return getattr(torch_schedules, name)
    near = get_close_matches(name, [*_OURS, *names], n=1, cutoff=0.5)
    raise ConfigError(
        f"scheduler.type {name!r} is not known",
        expected=f"one of {', '.join(_OURS)}, or a class of torch.optim.lr_scheduler",
        fix=f"use {near[0]!r}" if near else "use one of these",
    )


def build(name: str, optimizer: Any, params: Mapping[str, Any] | None = None) -> Schedule | LRScheduler:
    """The schedule ``name`` on ``optimizer`` (a torch optimizer, or an object with one as ``.optimizer``).

    Raises ConfigError for a name or a parameter that is not known, and for one that is missing.
    """
    cls, given = _find(name), dict(params or {})
    known = [p for p in inspect.signature(cls).parameters.values() if p.name != "optimizer"]
    names = [p.name for p in known]
    for key in given:
        if key not in names:
            near = get_close_matches(key, names, n=1, cutoff=0.5)
            raise ConfigError(
                f"scheduler.params.{key} is not a parameter of {name}",
                expected=f"one of {', '.join(names)}",
                fix=f"use {near[0]!r}" if near else f"remove {key!r}",
            )
    missing = [p.name for p in known if p.default is inspect.Parameter.empty and p.name not in given]
    if missing:
        raise ConfigError(
            f"scheduler {name} lacks parameters",
            expected=", ".join(missing),
            found=", ".join(given) or "none of them",
            fix=f'add them to "scheduler": {{"type": "{name}", "params": {{...}}}}',
        )
    try:
        return cls(get_torch_optimizer(optimizer), **given)
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"scheduler {name} refuses its parameters: {error}", found=given) from error
