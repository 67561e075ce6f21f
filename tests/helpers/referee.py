"""The judge of numbers: exact comparison with a readable report, and plain training in fp64 to measure against.

Strictest first (see the ladder in ``docs/architecture.md``): ``assert_bitwise`` wherever the arithmetic is the
same; ``assert_within_referee`` where only the order of additions differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests.helpers.data import Batch

OURS_OVER_PLAIN = 2.0  # our error may be this many times plain PyTorch's: the order of additions is free
MAX_SHOWN = 8  # differences that a report lists

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(slots=True)
class Trained:
    """What a reference run leaves. All tensors are detached copies."""

    weights: dict[str, torch.Tensor]  # by name, frozen ones too, tied ones once
    losses: list[float] = field(default_factory=list)  # mean over the step's micro-batches
    grad_norms: list[float] = field(default_factory=list)  # before clipping


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train_plain(
    factory: Callable[[], nn.Module],
    batches: Callable[[int], Sequence[Batch]],
    optimizer: OptimizerFactory,
    steps: int,
    *,
    clip: float | None = None,
    dtype: torch.dtype | None = torch.float64,
) -> Trained:
    """Train one model in one process with nothing but PyTorch.

    ``batches(step)`` gives all micro-batches of a step (of all ranks); their mean loss is the step's loss, and
    each one's gradient is accumulated in order. ``dtype`` converts every floating-point parameter, buffer and
    input (fp64: the referee); None leaves the model as the factory made it.
    """
    model = factory()
    if dtype is not None:
        model = model.to(dtype)
    opt = optimizer([p for p in model.parameters() if p.requires_grad])
    trained = Trained({})
    for step in range(steps):
        micros = batches(step)
        total = 0.0
        for batch in micros:
            loss = model(*(_cast(x, dtype) for x in batch)) / len(micros)
            loss.backward()
            total += loss.item()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        trained.grad_norms.append(torch.nn.utils.get_total_norm(grads).item())
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        opt.zero_grad()
        trained.losses.append(total)
    trained.weights = weights_of(model)
    return trained


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    floating = isinstance(value, torch.Tensor) and value.is_floating_point() and dtype is not None
    return value.to(dtype) if floating else value


# ---- exact comparison ----


def assert_bitwise(ours: Any, expected: Any, what: str = "") -> None:
    """Assert that two trees (tensors, mappings, sequences, numbers) are equal bit for bit.

    NaN equals the same NaN; -0.0 differs from 0.0. The report names each difference: where, how many
    elements, the first index, both values and the distance in units in the last place.
    """
    __tracebackhide__ = True
    found = list(_differences(ours, expected, what or "value"))
    if found:
        more = [f"... and {len(found) - MAX_SHOWN} more"] if len(found) > MAX_SHOWN else []
        raise AssertionError("\n".join(["not bit-equal:", *found[:MAX_SHOWN], *more]))


def _differences(ours: Any, expected: Any, path: str) -> Iterable[str]:
    if isinstance(ours, torch.Tensor) and isinstance(expected, torch.Tensor):
        yield from _tensor_difference(ours.detach().cpu(), expected.detach().cpu(), path)
    elif isinstance(ours, Mapping) and isinstance(expected, Mapping):
        for key in expected.keys() - ours.keys():
            yield f"{path}[{key!r}]: missing"
        for key in ours.keys() - expected.keys():
            yield f"{path}[{key!r}]: not expected"
        for key in (k for k in expected if k in ours):
            yield from _differences(ours[key], expected[key], f"{path}[{key!r}]")
    elif isinstance(ours, list | tuple) and isinstance(expected, list | tuple):
        if len(ours) != len(expected):
            yield f"{path}: {len(ours)} items, expected {len(expected)}"
        for i, (a, b) in enumerate(zip(ours, expected, strict=False)):
            yield from _differences(a, b, f"{path}[{i}]")
    elif isinstance(ours, float) and isinstance(expected, float):
        if ours.hex() != expected.hex():
            yield f"{path}: {ours!r}, expected {expected!r}"
    elif type(ours) is not type(expected) or ours != expected:
        yield f"{path}: {ours!r}, expected {expected!r}"


def _tensor_difference(ours: torch.Tensor, expected: torch.Tensor, path: str) -> Iterable[str]:
    if ours.dtype != expected.dtype or ours.shape != expected.shape:
        yield (f"{path}: {ours.dtype} {tuple(ours.shape)}, expected {expected.dtype} {tuple(expected.shape)}")
        return
    a, b = _bits(ours), _bits(expected)
    wrong = (a != b).nonzero().flatten()
    if not len(wrong):
        return
    flat = int(wrong[0])
    element = flat // (a.numel() // ours.numel())  # complex numbers are two floats
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(element), ours.shape))
    text = f"{path}: {len(wrong)} of {ours.numel()} elements differ, first at {index}: "
    text += f"{ours.flatten()[element].item()!r}, expected {expected.flatten()[element].item()!r}"
    if ours.is_floating_point():
        distance = (_ordered(a, ours.dtype) - _ordered(b, ours.dtype)).abs()
        text += f" ({int(distance[flat])} ulp there, {int(distance.max())} ulp at most)"
    yield text


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as a flat integer tensor."""
    flat = tensor.resolve_conj().resolve_neg().contiguous().flatten()
    flat = torch.view_as_real(flat).flatten() if flat.is_complex() else flat
    return flat.view(_INTEGERS[flat.element_size()])


def _ordered(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Integers in the order of the floats that they encode, so that a difference counts ulps (64-bit wraps)."""
    width = bits.element_size() * 8
    wide = bits.to(torch.int64)
    if width == 8:
        wide = torch.where(wide > 127, wide - 256, wide)
    magnitude = wide & ((1 << (width - 1)) - 1)
    return torch.where(wide < 0, -magnitude, magnitude)


# ---- against the referee ----


def assert_within_referee(
    ours: Mapping[str, torch.Tensor],
    plain: Mapping[str, torch.Tensor],
    referee: Mapping[str, torch.Tensor],
    factor: float = OURS_OVER_PLAIN,
) -> None:
    """Assert that our error against the fp64 run is at most ``factor`` times plain PyTorch's.

    Errors are relative L2 norms, over all tensors together and for each. A tensor on which plain PyTorch was
    lucky is allowed plain's overall error, and half an ulp of our dtype, which merely storing the exact
    result costs.
    """
    __tracebackhide__ = True
    assert set(ours) == set(plain) == set(referee), "the three runs have different parameters"
    ours_all, plain_all = _relative(ours, referee, list(referee)), _relative(plain, referee, list(referee))
    rows = []
    for names in ([name] for name in referee):
        floor = torch.finfo(ours[names[0]].dtype).eps / 2
        limit = factor * max(_relative(plain, referee, names), plain_all, floor)
        error = _relative(ours, referee, names)
        if not error <= limit:  # NaN too
            rows.append(f"{names[0]}: error {error:.3e}, allowed {limit:.3e}")
    floor = max(torch.finfo(tensor.dtype).eps for tensor in ours.values()) / 2
    if not ours_all <= factor * max(plain_all, floor):
        rows.insert(0, f"all: error {ours_all:.3e}, allowed {factor * max(plain_all, floor):.3e}")
    if rows:
        raise AssertionError(
            "\n".join([f"further from the fp64 referee than {factor} x plain PyTorch:", *rows])
        )


def _relative(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], names: Sequence[str]) -> float:
    for name in names:
        assert a[name].shape == b[name].shape, f"{name}: {a[name].shape} against {b[name].shape}"
    error = sum((a[n].double() - b[n].double()).square().sum().item() for n in names) ** 0.5
    size = sum(b[n].double().square().sum().item() for n in names) ** 0.5
    return error / size if size else error
