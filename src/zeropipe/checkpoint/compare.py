"""What differs between two checkpoints, whatever the layouts that they were saved in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from zeropipe.checkpoint.sources.data import Checkpoint, Flat
from zeropipe.checkpoint.sources.parallel import joined, weights


@dataclass(frozen=True, slots=True)
class Difference:
    """``largest``: largest absolute difference of values, None where they cannot be compared."""

    name: str
    what: str  # "weight", "exp_avg", "step", ...
    text: str
    largest: float | None = None


def compare(
    left: Checkpoint, right: Checkpoint, progress: Callable[[int], None] = lambda done: None
) -> Iterator[Difference]:
    """Every difference in weights, moments, scalars, counters and hyperparameters; nothing if they are equal."""
    left, right = joined(left), joined(right)
    for name in ("global_steps", "global_samples", "skipped_steps", "lr_scheduler", "loss_scaler"):
        a, b = getattr(left.train_state(0), name), getattr(right.train_state(0), name)
        if not same(a, b):
            yield Difference(name, "counter", f"{_short(a)} | {_short(b)}")
    yield from _settings(left, right)
    mine = {w.name: w for w in weights(left)}
    theirs = {w.name: w for w in weights(right)}
    for name in dict.fromkeys((*mine, *theirs)):
        if name not in mine or name not in theirs:
            if right.tied.get(name) not in mine and left.tied.get(name) not in theirs:
                yield Difference(name, "weight", "only left" if name in mine else "only right")
            continue
        yield from _values(name, "weight", mine[name].read(), theirs[name].read())
        progress(1)
    yield from _moments(left, right)


def _settings(left: Checkpoint, right: Checkpoint) -> Iterator[Difference]:
    """Hyperparameters of the param groups and the client's own state."""
    a, b = (_hyperparameters(source) for source in (left, right))
    if len(a) != len(b):
        yield Difference("param groups", "hyperparameters", f"{len(a)} groups | {len(b)} groups")
    for number, (x, y) in enumerate(zip(a, b, strict=False)):
        yield from _entries(f"param group {number}", "hyperparameter", x, y)
    yield from _entries(
        "client state", "client state", left.train_state(0).client_state, right.train_state(0).client_state
    )


def _hyperparameters(source: Checkpoint) -> list[dict[str, object]]:
    """Without the parameters' names and numbers, which are not hyperparameters."""
    return [
        {k: v for k, v in group.items() if k not in ("params", "param_names")}
        for group in source.param_groups
    ]


def _entries(name: str, what: str, a: Mapping[str, object], b: Mapping[str, object]) -> Iterator[Difference]:
    for key in dict.fromkeys((*a, *b)):
        if key not in a or key not in b:
            yield Difference(f"{name}: {key}", what, "only left" if key in a else "only right")
        elif not same(a[key], b[key]):
            yield Difference(f"{name}: {key}", what, f"{_short(a[key])} | {_short(b[key])}")


def _moments(left: Checkpoint, right: Checkpoint) -> Iterator[Difference]:
    mine, theirs = _stepped(left), _stepped(right)
    for name in dict.fromkeys((*mine, *theirs)):
        if name not in mine or name not in theirs:
            yield Difference(name, "optimizer state", "only left" if name in mine else "only right")
            continue
        a, b = mine[name], theirs[name]
        for key in dict.fromkeys((*a.moments, *b.moments)):
            if key not in a.keys or key not in b.keys:
                yield Difference(name, key, "only left" if key in a.keys else "only right")
                continue
            yield from _values(name, key, a.whole(name, key), b.whole(name, key))
        scalars_a, scalars_b = (flat.shared | flat.own(name) for flat in (a, b))
        for key in dict.fromkeys((*scalars_a, *scalars_b)):
            if not same(scalars_a.get(key), scalars_b.get(key)):
                yield Difference(name, key, f"{_short(scalars_a.get(key))} | {_short(scalars_b.get(key))}")


def _stepped(source: Checkpoint) -> dict[str, Flat]:
    """Parameter -> the flat with its optimizer state."""
    return {
        spec.name: flat
        for flat in source.flats
        if flat.moments
        for spec in flat.layout.tensors
        if flat.numbers_of(spec.name) is not None
    }


def _values(name: str, what: str, a: torch.Tensor, b: torch.Tensor) -> Iterator[Difference]:
    if a.shape != b.shape:
        yield Difference(name, what, f"shape {tuple(a.shape)} | {tuple(b.shape)}")
    elif a.dtype != b.dtype and not torch.equal(a.double(), b.double()):
        yield Difference(name, what, f"dtype {a.dtype} | {b.dtype}", _largest(a, b))
    elif not torch.equal(a, b) and not same(a, b):
        count = int((a != b).sum())
        yield Difference(name, what, f"{count} of {a.numel()} elements", _largest(a, b))


def _largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).abs().max())


def same(a: object, b: object) -> bool:
    """Equal bit for bit, through containers; NaN equals NaN."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        return a.shape == b.shape and bool(
            torch.equal(a.double().nan_to_num(7e77), b.double().nan_to_num(7e77))
        )
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        x, y = np.asarray(a), np.asarray(b)
        return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
    return bool(a == b or (a != a and b != b))


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
