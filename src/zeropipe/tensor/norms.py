"""Norms of flat tensors whose squares may not fit the tensor's own dtype, and clipping from them.

Squares are accumulated in fp64. That has three uses. No finite fp16, bf16 or fp32 value overflows when
squared, so a squared norm is finite exactly when every element is: one pass gives both the norm and the
overflow flag. The order of the sum (shards, buckets, threads) moves the result by less than 1e-11, so the
clipping factor, once rounded to fp32, is in practice the same however the tensors are cut. And long sums
keep their small terms: fp32 loses 1e-3 of the norm of 17 M normal values on CPU.

The work is cut into chunks that stay in cache: converting a whole shard would need twice its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import inf, isfinite

import torch

from zeropipe.layout.flat import FlatShards

# torch adds the same amount in clip_grad_norm_: the factor stays finite for a zero gradient.
CLIP_EPS = 1e-6

# Elements converted at a time: 1 MiB of fp64 on CPU (fits L2), 32 MiB elsewhere (few kernels).
_CPU_CHUNK = 128 * 1024
_ROUGH_RUN = 32 * 1024  # elements whose squares are added in fp32: the rounding errors of many runs cancel
_DEVICE_CHUNK = 4 * 1024 * 1024


def _chunk_numel(device: torch.device) -> int:
    return _CPU_CHUNK if device.type == "cpu" else _DEVICE_CHUNK


def _chunk_norms(x: torch.Tensor, p: float) -> torch.Tensor:  # 1D fp64, one norm per chunk
    flat = x.detach().reshape(-1)
    chunks = flat.split(_chunk_numel(x.device))
    return torch.stack([torch.linalg.vector_norm(c, p, dtype=torch.float64) for c in chunks])


def squared_norm(x: torch.Tensor, read: Callable[[torch.Tensor], None] | None = None) -> torch.Tensor:
    """Sum of squares of ``x`` (any shape, floating), as a 0-d fp64 tensor on its device.

    Finite if and only if every element of ``x`` is (for dtypes up to fp32). Never waits for the device. ``read`` is
    told, on CPU, of each run of elements that is done with.
    """
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=x.device)
    if x.device.type != "cpu":
        return _chunk_norms(x, 2.0).square_().sum()
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
    """``squared_norm`` to about seven digits, for fp32 on CPU in a quarter of its time; elsewhere ``squared_norm``.

    How the tensor is cut shows in the last of these digits. Waits for the device.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return squared_norm(x, read).item()
    total = 0.0
    flat = x.detach().view(-1)
    for run in flat.split(_ROUGH_RUN) if flat.numel() > _ROUGH_RUN else (flat,):
        total += torch.dot(run, run).item()
        if read is not None:
            read(run)
    # A square may overflow where its root does not.
    return total if isfinite(total) else squared_norm(x).item()


def norm_term(x: torch.Tensor, p: float = 2.0) -> torch.Tensor:
    """What one shard adds to a p-norm, 0-d fp64: the sum of ``|x|**p``, or ``max |x|`` for ``p = inf``.

    Reduce the terms of all shards with :func:`norm_op`, then take :func:`norm_from_term`.
    Raises ValueError unless ``p`` is positive.
    """
    if not p > 0:
        raise ValueError(f"a norm's order must be positive, found {p}")
    if p == 2.0:
        return squared_norm(x)
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=x.device)
    if p == inf:
        low, high = torch.aminmax(x.detach())  # one pass, NaN stays NaN
        return torch.maximum(low.abs(), high.abs()).double()
    return _chunk_norms(x, p).pow_(p).sum()


def norm_op(p: float = 2.0) -> str:
    """The reduction ("sum" or "max") that combines the terms of shards."""
    return "max" if p == inf else "sum"


def norm_from_term(term: torch.Tensor, p: float = 2.0) -> torch.Tensor:
    """The p-norm (0-d fp64) of the combined ``term``."""
    if p == inf:
        return term
    return term.sqrt() if p == 2.0 else term.pow(1.0 / p)


def combine_terms(terms: Iterable[torch.Tensor], p: float = 2.0) -> torch.Tensor:
    """One term (0-d fp64, on the first one's device) out of several, in the order given; 0 for none."""
    listed = list(terms)
    if not listed:
        return torch.zeros((), dtype=torch.float64)
    stacked = torch.stack([term.to(listed[0].device) for term in listed])
    return stacked.amax() if p == inf else stacked.sum()


def total_norm(tensors: Iterable[torch.Tensor], p: float = 2.0) -> torch.Tensor:
    """The p-norm (0-d fp64) of all ``tensors`` as if they were one; 0 for none."""
    return norm_from_term(combine_terms((norm_term(t, p) for t in tensors), p), p)


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


class SegmentNorms:
    """Per-tensor squared norms of one shard of a layout, for optimizers that scale each tensor (Lamb).

    The cut is computed once; each call is one split, one multi-tensor norm and one segmented sum.
    A tensor cut across shards gets its whole square by adding the vectors of all shards.
    """

    def __init__(self, layout: FlatShards, shard: int, device: torch.device | str = "cpu") -> None:
        device = torch.device(device)
        chunk = _chunk_numel(device)
        self.num_tensors = len(layout.tensors)
        self.shard_numel = layout.shard_numel
        counts = [0] * self.num_tensors
        self._sizes: list[int] = []  # of the chunks, in shard order; padding last
        for piece in layout.pieces(shard):
            for size in _cuts(piece.numel, chunk):
                self._sizes.append(size)
                counts[piece.tensor] += 1
        self._used = len(self._sizes)
        self._sizes.append(layout.shard_numel - sum(self._sizes))
        self._counts = torch.tensor(counts, dtype=torch.int64, device=device)  # 1D, chunks per tensor

    def squared(self, shard: torch.Tensor) -> torch.Tensor:
        """1-D fp64, ``num_tensors`` long: squared norm of each tensor's pieces in ``shard`` (1-D).

        Tensors with no piece here have 0. Raises ValueError for a shard of another size.
        """
        if shard.dim() != 1 or shard.numel() != self.shard_numel:
            raise ValueError(
                f"expected a 1-D shard of {self.shard_numel} elements, found shape {tuple(shard.shape)}"
            )
        if self._used == 0:
            return torch.zeros(self.num_tensors, dtype=torch.float64, device=shard.device)
        views = list(shard.detach().split(self._sizes)[: self._used])
        norms = torch._foreach_norm(views, 2, dtype=torch.float64)
        squares = torch.stack(list(norms)).square_()
        return torch.segment_reduce(squares, "sum", lengths=self._counts, unsafe=True)


def _cuts(numel: int, chunk: int) -> Iterator[int]:
    while numel > 0:
        yield min(numel, chunk)
        numel -= chunk
