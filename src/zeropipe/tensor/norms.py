"""Norms of flat tensors whose squares may not fit the tensor's own dtype, clipping from them, and inf and NaN.

Squares are accumulated in fp64. That has three uses. No finite fp16, bf16 or fp32 value overflows when
squared, so a squared norm is finite exactly when every element is: one pass gives both the norm and the
overflow flag. The order of the sum (shards, buckets, threads) moves the result by less than 1e-11, so the
clipping factor, once rounded to fp32, is in practice the same however the tensors are cut. And long sums
keep their small terms: fp32 loses 1e-3 of the norm of 17 M normal values on CPU.

The work is cut into chunks that stay in cache: converting a whole shard would need twice its memory.

Where no norm is wanted, ``all_finite`` is an exact test for every step and ``NonFinite`` the report of a bad one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf, isfinite

import torch

from zeropipe.tensor.host import HOST, Number

# torch adds the same amount in clip_grad_norm_: the factor stays finite for a zero gradient.
CLIP_EPS = 1e-6

# Elements converted at a time: 1 MiB of fp64 on CPU (fits L2), 32 MiB elsewhere (few kernels).
_CPU_CHUNK = 128 * 1024
_DEVICE_CHUNK = 4 * 1024 * 1024
EXACT_BITS = 53  # of a square in an exact sum
_EXACT_CHUNK = 64 * 1024  # the fastest of 4 to 64 thousand
# Elements whose squares are added in fp32: the rounding errors of many runs cancel.
_ROUGH_RUN = 32 * 1024


def _chunk_norms(x: torch.Tensor, p: float) -> torch.Tensor:  # 1D fp64, one norm per chunk
    flat = x.detach().reshape(-1)
    chunks = flat.split(_CPU_CHUNK if HOST.sees(x) else _DEVICE_CHUNK)
    norms = [torch.linalg.vector_norm(chunk, p, dtype=torch.float64) for chunk in chunks]
    return norms[0].view(1) if len(norms) == 1 else torch.stack(norms)


def squared_norm(x: torch.Tensor, read: Callable[[torch.Tensor], None] | None = None) -> torch.Tensor:
    """Sum of squares of ``x`` (any shape, floating), as a 0-d fp64 tensor on its device.

    Finite if and only if every element of ``x`` is (for dtypes up to fp32). Never waits for the device. ``read`` is
    told, on CPU, of each run of elements that is done with.
    """
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=x.device)
    if not HOST.sees(x):
        norms = _chunk_norms(x, 2.0).square_()
        return norms[0] if norms.numel() == 1 else norms.sum()
    # On CPU a conversion into one buffer and a dot product take half the time of a norm that converts.
    flat = x.detach().reshape(-1)
    buffer = torch.empty(min(flat.numel(), _CPU_CHUNK), dtype=torch.float64)
    parts = []
    for chunk in flat.split(_CPU_CHUNK):
        wide = buffer[: chunk.numel()].copy_(chunk)
        parts.append(torch.dot(wide, wide))
        if read is not None:
            read(chunk)
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def rough_squared_norm(x: torch.Tensor, read: Callable[[torch.Tensor], None] | None = None) -> float:
    """``squared_norm`` of what the host sees to about seven digits, for fp32 in a quarter of its time.

    How the tensor is cut shows in the last of these digits.
    """
    if x.dtype != torch.float32:
        return squared_norm(x, read).item()
    total = 0.0
    flat = x.detach().view(-1)
    for run in flat.split(_ROUGH_RUN) if flat.numel() > _ROUGH_RUN else (flat,):
        total += torch.dot(run, run).item()
        if read is not None:
            read(run)
    # A square may overflow where its root does not.
    return total if isfinite(total) else squared_norm(x).item()


def exact_squares(x: torch.Tensor, exponent: int, read: Callable[[torch.Tensor], None] | None = None) -> int:
    """The sum of squares of ``x`` (any shape, floating), whose magnitudes are below 2 ** ``exponent``, in units of
    2 ** (2 * exponent - EXACT_BITS): an integer, so that sums are the same however tensors are cut and in any order.

    Each square is rounded to that unit. The host reads the result.
    """
    # A square of fp32 has 48 bits, so fp64 holds it. Adding and taking away a large power of two leaves the bits above
    # a place, then those below: sums of either over a chunk are below 2 ** 53 of their units, so no addition rounds.
    #
    #     square / 4 ** exponent     0 . hhhhhhhhhhhhhhhhhhhhhhhhhh lllllllllllllllllllllllllll | dropped
    #                                    26 bits, of 2 ** -26        27 bits, of 2 ** -53
    sums, flat = [], x.detach().reshape(-1)
    numel = _EXACT_CHUNK if HOST.sees(x) else _DEVICE_CHUNK
    rooms = torch.empty((2, min(numel, flat.numel())), dtype=torch.float64, device=x.device)
    for chunk in flat.split(numel):
        square, high = rooms[:, : chunk.numel()]
        square.copy_(chunk).mul_(2.0**-exponent).square_()
        torch.add(square, 1.5 * 2.0**26, out=high).sub_(1.5 * 2.0**26)
        low = square.sub_(high).add_(0.75).sub_(0.75)
        sums += [high.sum(), low.sum()]
        if read is not None:
            read(chunk)
    found = torch.stack(sums).tolist() if sums else []
    return sum(int(one * 2.0**26) << 27 for one in found[::2]) + sum(
        int(one * 2.0**53) for one in found[1::2]
    )


def total_norm(tensors: Iterable[torch.Tensor], p: float = 2.0) -> torch.Tensor:
    """The p-norm (0-d fp64, on the first one's device) of all ``tensors`` as if they were one; 0 for none.

    Raises ValueError unless ``p`` is positive.
    """
    if not p > 0:
        raise ValueError(f"a norm's order must be positive, found {p}")
    terms = []
    for x in tensors:
        if p == 2.0 or x.numel() == 0:
            terms.append(squared_norm(x))
        elif p == inf:
            low, high = torch.aminmax(x.detach())  # one pass, NaN stays NaN
            terms.append(torch.maximum(low.abs(), high.abs()).double())
        else:
            terms.append(_chunk_norms(x, p).pow_(p).sum())
    if not terms:
        return torch.zeros((), dtype=torch.float64)
    stacked = torch.stack([term.to(terms[0].device) for term in terms])
    if p == inf:
        return stacked.amax()
    return stacked.sum().sqrt() if p == 2.0 else stacked.sum().pow(1.0 / p)


def clip_coefficient(norm: torch.Tensor | float, max_norm: float) -> torch.Tensor:
    """The factor (0-d fp64, at most 1) that brings a gradient of ``norm`` down to ``max_norm``.

    ``max_norm / (norm + 1e-6)`` clamped to 1, as ``torch.nn.utils.clip_grad_norm_`` has it; exactly 1 when
    ``max_norm`` is 0 or negative, which means "do not clip". A non-finite norm must be handled before: it
    gives 0 or NaN. Never waits for the device.
    """
    value = torch.as_tensor(norm, dtype=torch.float64)
    if max_norm <= 0:
        return torch.ones_like(value)
    return (max_norm / (value + CLIP_EPS)).clamp(max=1.0)


def clip_factor(norm: Number, max_norm: float) -> Number:
    """``clip_coefficient``, where ``norm`` is: on the host or on the device. 1.0 where there is nothing to clip."""
    if max_norm <= 0:
        return 1.0
    factor = clip_coefficient(norm, max_norm)
    return factor if isinstance(norm, torch.Tensor) else factor.item()


def all_finite(x: torch.Tensor) -> torch.Tensor:
    """Whether no element of ``x`` is inf or NaN: a 0-d bool tensor on its device, without waiting for it."""
    if x.numel() == 0 or not (x.is_floating_point() or x.is_complex()):
        return torch.ones((), dtype=torch.bool, device=x.device)
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    # One pass, no temporary, no arithmetic that could itself overflow, and NaN carries through it. A sum is not exact:
    # fp16 elements that are all finite may sum to inf. And this is 70 times faster than isfinite().all() on a CPU.
    low, high = torch.aminmax(x.detach())
    return torch.isfinite(low) & torch.isfinite(high)


def overflow_flag(tensors: Iterable[torch.Tensor | None], device: torch.device | str = "cpu") -> torch.Tensor:
    """1.0 if any of ``tensors`` (None is passed over) has an inf or NaN, else 0.0: 0-d fp32 on ``device``.

    Reduced with "max" over ranks it is the one decision for all of them.
    """
    flags = [all_finite(t).to(device) for t in tensors if t is not None]
    if not flags:
        return torch.zeros((), device=device)
    return 1.0 - torch.stack(flags).all().float()


@dataclass(frozen=True, slots=True)
class NonFinite:
    """Where inf or NaN was first seen. None: a rank or micro-step that is not known, a count that was not taken."""

    name: str
    num_inf: int | None
    num_nan: int | None
    numel: int  # elements looked at: the whole gradient, or this rank's piece of it
    rank: int | None = None
    micro_step: int | None = None

    def __str__(self) -> str:
        counts = [f"{n} {word}" for n, word in ((self.num_inf, "inf"), (self.num_nan, "NaN")) if n]
        where = [
            f"{word} {n}"
            for word, n in (("rank", self.rank), ("micro-step", self.micro_step))
            if n is not None
        ]
        found = " and ".join(counts) or "inf or NaN"
        text = f"gradient of parameter '{self.name}' has {found} in {self.numel} elements"
        return text if not where else f"{text} ({', '.join(where)})"


def earliest(reports: Iterable[NonFinite | None]) -> NonFinite | None:
    """The report to show when several ranks have one: lowest micro-step, then lowest rank; None for none.

    The same on every rank that is given the same reports. An unknown micro-step or rank sorts last.
    """
    known = [report for report in reports if report is not None]
    return min(
        known, key=lambda r: tuple(inf if n is None else n for n in (r.micro_step, r.rank)), default=None
    )
