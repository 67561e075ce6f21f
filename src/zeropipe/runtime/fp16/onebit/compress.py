"""One bit per element with error feedback: what is sent, what is kept, and why nothing is lost on the way.

Per run of n elements (1-bit Adam, arXiv 2102.02888, section 4.2 and Algorithm 1; the scale keeps the norm):

    y = value + error            corrected value
    s = ||y||_2 / sqrt(n)        one fp32 number
    c = s * sign(y)              what every receiver computes
    error = y - c                kept, added to the next value

In which sense ``c + error = y``: ``error`` is the correctly rounded difference. In real arithmetic the sum is
exact wherever fp32 can hold the difference, in particular for all s/2 <= |y| <= 2s (Sterbenz); elsewhere it is
off by at most half a unit in the last place of ``error``, which is the best that an fp32 buffer can do. On an
fp64 buffer with values that came from fp32 it is exact, bit for bit, while |y| and s are within 2**28 of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zeropipe.tensor.signs import add_signs_, pack_signs, packed_numel, set_signs_, sign_table


@dataclass(frozen=True, slots=True)
class Run:
    """Elements of one buffer that share a scale."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Compressed:
    """A tensor as it travels."""

    signs: torch.Tensor  # uint8, 1-D, packed_numel(numel)
    scale: torch.Tensor  # float32, 0-D
    numel: int

    @property
    def nbytes(self) -> int:
        return self.signs.numel() + 4


def compress(tensor: torch.Tensor, error: torch.Tensor) -> Compressed:
    """Compress ``tensor + error`` and leave in ``error`` what one bit per element could not say.

    ``tensor``: any shape, floating point. ``error``: 1-D of the same numel, float32 or float64; the arithmetic
    runs in its dtype. Raises ValueError when the sizes differ.
    """
    if error.numel() != tensor.numel():
        raise ValueError(f"the error must have the tensor's {tensor.numel()} elements; found {error.numel()}")
    numel = tensor.numel()
    error.add_(tensor.reshape(-1))
    signs = torch.empty(packed_numel(numel), dtype=torch.uint8, device=error.device)
    scales = torch.zeros(1, dtype=torch.float32, device=error.device)
    if numel:
        compress_runs_(error, (Run(0, numel),), signs, scales, sign_table(error.dtype, error.device))
    return Compressed(signs, scales[0], numel)


def decompress(compressed: Compressed, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``scale * sign`` of each element: 1-D, ``compressed.numel``."""
    out = torch.empty(compressed.numel, dtype=dtype, device=compressed.signs.device)
    set_signs_(out, compressed.signs, 0, compressed.scale, sign_table(dtype, out.device))
    return out


def compress_runs_(
    values: torch.Tensor,
    runs: Sequence[Run],
    signs: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    counts: torch.Tensor | None = None,
) -> None:
    """Compress the corrected ``values`` (1-D) in place: they become the error that stays behind.

    ``signs``: uint8, ``packed_numel(values.numel())``, written. ``scales``: float32, one per run, written.
    ``counts``: float32, one per run: how many of its elements can be other than zero (default: all of them).
    Elements outside of every run keep their value; they must be zero if they are padding.
    """
    pack_signs(values, out=signs)
    if not runs:
        return
    norms = torch.stack([torch.linalg.vector_norm(values[run.start : run.stop]) for run in runs])
    if counts is None:
        counts = torch.tensor(
            [run.stop - run.start for run in runs], dtype=torch.float32, device=norms.device
        )
    scales.copy_(norms / counts.clamp(min=1).sqrt())
    for run, scale in zip(runs, scales.unbind(), strict=True):
        add_signs_(values[run.start : run.stop], signs, run.start, -scale, table)
