"""Steps a schedule wholly or not at all: one that raised can be stepped again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch


def step_schedule(schedule: Any, param_groups: Sequence[dict[str, Any]], arguments: dict[str, Any]) -> None:
    """``schedule.step(**arguments)``; where that raises, it and ``param_groups`` are as they were."""
    # Shallow: schedules replace what they count, and a copy of all would cost every step.
    before = [(vars(part), dict(vars(part))) for part in _parts(schedule)]
    options = [{k: _held(v) for k, v in group.items() if k != "params"} for group in param_groups]
    try:
        schedule.step(**arguments)
    except BaseException:
        for now, then in before:
            now.clear()
            now.update(then)
        for group, values in zip(param_groups, options, strict=True):
            for key, value in values.items():
                if torch.is_tensor(value) and torch.is_tensor(group[key]):
                    group[key].copy_(value)  # a learning rate that compiled code reads
                else:
                    group[key] = value
        raise


def _held(value: Any) -> Any:
    return value.clone() if torch.is_tensor(value) else value


def _parts(schedule: Any) -> Iterator[Any]:
    """The schedule and those that it is made of."""
    waiting, seen = [schedule], set[int]()
    while waiting:
        part = waiting.pop()
        if id(part) in seen or not hasattr(part, "__dict__"):
            continue
        seen.add(id(part))
        yield part
        for value in vars(part).values():
            for inner in value if isinstance(value, (list, tuple)) else (value,):
                if (
                    hasattr(inner, "state_dict")
                    and hasattr(inner, "step")
                    and not hasattr(inner, "param_groups")
                ):
                    waiting.append(inner)
