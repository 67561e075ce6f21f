"""What differs between two checkpoints, whatever the layouts that they were saved in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from zeropipe.checkpoint.sources.data import Checkpoint
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
    # [1] What is read at once.
    one, other = left.train_state(0), right.train_state(0)
    for name in ("global_steps", "global_samples", "skipped_steps", "lr_scheduler", "loss_scaler"):
        yield from _plain(name, "counter", getattr(one, name), getattr(other, name))
    groups = left.hyperparameters, right.hyperparameters
    if len(groups[0]) != len(groups[1]):
        found = " | ".join(f"{len(side)} groups" for side in groups)
        yield Difference("param groups", "hyperparameters", found)
    for number, (x, y) in enumerate(zip(*groups, strict=False)):
        yield from _entries(f"param group {number}", "hyperparameter", x, y)
    yield from _entries("client state", "client state", one.client_state, other.client_state)
    # [2] Tensors, one of each side in memory. A tied one may be kept under another of its names.
    weight, twin = ({w.name: w for w in weights(side)} for side in (left, right))
    for name, only in _both(weight, twin):
        if not only:
            yield from _values(name, "weight", weight[name].read(), twin[name].read())
            progress(1)
        elif right.tied.get(name) not in weight and left.tied.get(name) not in twin:
            yield Difference(name, "weight", only)
    # [3] The optimizer's state, of what was ever stepped.
    mine, theirs = (
        {n: f for n, f in side.trained.items() if f.moments and f.numbers_of(n) is not None}
        for side in (left, right)
    )
    for name, only in _both(mine, theirs):
        if only:
            yield Difference(name, "optimizer state", only)
            continue
        a, b = mine[name], theirs[name]
        for key, lone in _both(a.moments, b.moments):
            if lone:
                yield Difference(name, key, lone)
            else:
                yield from _values(name, key, a.whole(name, key), b.whole(name, key))
        numbers, others = (flat.shared | flat.own(name) for flat in (a, b))
        for key, _ in _both(numbers, others):
            yield from _plain(name, key, numbers.get(key), others.get(key))


def _both(left: Mapping[str, object], right: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """The keys of both, each with which side alone has it, or ""."""
    for key in dict.fromkeys((*left, *right)):
        yield key, "" if key in left and key in right else "only left" if key in left else "only right"


def _entries(name: str, what: str, a: Mapping[str, object], b: Mapping[str, object]) -> Iterator[Difference]:
    for key, only in _both(a, b):
        if only:
            yield Difference(f"{name}: {key}", what, only)
        else:
            yield from _plain(f"{name}: {key}", what, a[key], b[key])


def _plain(name: str, what: str, a: object, b: object) -> Iterator[Difference]:
    if not same(a, b):
        yield Difference(name, what, f"{_short(a)} | {_short(b)}")


def _values(name: str, what: str, a: torch.Tensor, b: torch.Tensor) -> Iterator[Difference]:
    if a.shape != b.shape:
        yield Difference(name, what, f"shape {tuple(a.shape)} | {tuple(b.shape)}")
    elif a.dtype != b.dtype and not torch.equal(a.double(), b.double()):
        yield Difference(name, what, f"dtype {a.dtype} | {b.dtype}", _largest(a, b))
    # ``same`` is asked last: it is slower, and only a NaN makes a difference to it.
    elif not torch.equal(a, b) and not same(a, b):
        count = int((a != b).sum())
        yield Difference(name, what, f"{count} of {a.numel()} elements", _largest(a, b))


def _largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).abs().max())


def same(a: object, b: object) -> bool:
    """Equal bit for bit, through containers; NaN equals NaN."""
    # A step count is a tensor in one format and a number in another.
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
