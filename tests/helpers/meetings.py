"""Steps that are taken as on a GPU, on CPUs, and what each of their parts asked of the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from benchmarks.counts.counting import Counting, Counts

from zeropipe.tensor.host import HOST

PARTS = ("forward", "backward", "step")


def of_host(engine: Any) -> list[torch.Tensor]:
    """Counts of steps, which lie in host memory unless a kernel of the device reads them."""
    groups, states = engine.optimizer.param_groups, engine.optimizer.state
    unfused = (param for group in groups if not group.get("fused") for param in group["params"])
    counts = [states.get(param, {}).get("step") for param in unfused]
    return [count for count in counts if torch.is_tensor(count)]


@contextmanager
def as_on_device(engine: Any, counted: bool = True) -> Iterator[dict[str, Counts]]:
    """Inside, all tensors count as a GPU's; what is yielded is filled by part of the engine's step."""
    found: dict[str, Counts] = {}

    def part(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **kwargs: Any) -> Any:
            counting: Any = Counting(of_host(engine)) if counted else nullcontext(Counts())
            with counting as counts:
                made = call(*args, **kwargs)
            known = found.setdefault(name, Counts())
            for key, value in counts.figures().items():
                setattr(known, key, getattr(known, key) + value)
            known.where += counts.where
            return made

        return inside

    originals = {name: getattr(engine, name) for name in PARTS}
    for name, call in originals.items():
        object.__setattr__(engine, name, part(name, call))
    try:
        with HOST.afar():
            yield found
    finally:
        for name in PARTS:
            vars(engine).pop(name, None)


def either(afar: bool) -> AbstractContextManager[None]:
    return HOST.afar() if afar else nullcontext()


def meetings(found: dict[str, Counts]) -> list[str]:
    """All of a step, for a message that says who asked."""
    return [f"{name}: {line}" for name in PARTS for line in found.get(name, Counts()).where]


def bits_of(values: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: value.view(-1).view(torch.uint8).numpy().tobytes() for name, value in values.items()}
