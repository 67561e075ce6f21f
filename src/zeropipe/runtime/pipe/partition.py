"""Decides which layers each stage gets."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from zeropipe.errors import ConfigError
from zeropipe.layout.balance import cut_balanced, cut_evenly

METHODS = "'uniform', 'parameters', 'type:REGEX', 'memory', 'profile' or a list of bounds"


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """What a partition method may weigh of one layer."""

    name: str  # class or function name, for ``type:REGEX``
    parameters: int = 0  # elements
    memory: int = 0  # bytes of parameters, gradients, optimizer state and saved activations
    nanoseconds: int = 0  # measured time of a forward


# stages + 1 ascending layer numbers: stage s has the layers [bounds[s], bounds[s + 1])
Bounds = tuple[int, ...]


def partition(
    method: str | Sequence[int],
    num_layers: int,
    stages: int,
    facts: Callable[[], Sequence[LayerFacts]],
) -> Bounds:
    """Bounds of ``stages`` runs of layers. ``facts`` is called only by methods that weigh layers.

    Raises `ConfigError` where there are too few layers, an unknown method, or bounds that do not fit.
    """
    if num_layers < stages:
        raise ConfigError(
            "a pipeline stage would be empty",
            expected=f"at least one layer for each of {stages} stages",
            found=f"{num_layers} layers",
            fix=f"use at most {num_layers} stages (pipeline ranks x chunks), or split layers",
        )
    if not isinstance(method, str):
        return _explicit(tuple(method), num_layers, stages)
    name, _, pattern = method.partition(":")
    name = name.strip().lower()
    if name == "uniform":
        return cut_evenly(num_layers, stages)
    if name == "type":
        return cut_balanced(_matches(pattern, facts(), stages), stages)
    if name == "parameters":
        return cut_balanced([f.parameters for f in facts()], stages)
    if name == "memory":
        return cut_balanced([f.memory for f in facts()], stages)
    if name == "profile":
        return cut_balanced([f.nanoseconds for f in facts()], stages)
    raise ConfigError("unknown partition_method", expected=METHODS, found=repr(method))


def _matches(pattern: str, facts: Sequence[LayerFacts], stages: int) -> list[int]:
    try:
        compiled = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ConfigError(
            "partition_method 'type:' needs a regular expression", found=f"{pattern!r} ({error})"
        ) from error
    weights = [int(compiled.search(f.name) is not None) for f in facts]
    if sum(weights) < stages:
        raise ConfigError(
            f"partition_method 'type:{pattern}' matches too few layers",
            expected=f"at least {stages}, one for each stage",
            found=f"{sum(weights)} of {sorted({f.name for f in facts})}",
            fix="correct the expression, or use 'parameters'",
        )
    return weights


def _explicit(bounds: Bounds, num_layers: int, stages: int) -> Bounds:
    ascending = all(a < b for a, b in pairwise(bounds))
    if len(bounds) != stages + 1 or bounds[0] != 0 or bounds[-1] != num_layers or not ascending:
        raise ConfigError(
            "partition bounds do not fit the model",
            expected=f"{stages + 1} ascending numbers from 0 to {num_layers}",
            found=list(bounds),
        )
    return bounds


def show(bounds: Bounds, facts: Sequence[LayerFacts]) -> str:
    """A table of which layers each stage has."""
    lines = []
    for stage, (first, last) in enumerate(pairwise(bounds)):
        total = sum(f.parameters for f in facts[first:last])
        names = ", ".join(f.name for f in facts[first:last])
        lines.append(f"stage {stage}: layers {first}-{last - 1}, {total:,} parameters: {names}")
    return "\n".join(lines)
