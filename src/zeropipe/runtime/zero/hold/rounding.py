"""Stochastic rounding of masters and moments that are kept in bf16 and stepped in fp32.

An update is often smaller than half the distance to the next bf16, and would be rounded away in every step. Rounded up
with the probability of what is cut off, it arrives on average (arXiv 2010.06192)::

    fp32   | sign exponent 7 bits |  16 bits to cut  |  + 16 random bits, then cut: a carry goes up with
    bf16   | sign exponent 7 bits |                       the probability of the cut bits / 2^16

The random bits are a hash of what they are for: the parameter's name, the element's place in it, the key of the state,
and the count of updates, which stands in the param group and so in checkpoints. Nobody's generator is drawn from, so
the bits are the same at every stage, on any number of ranks, in a step that is tried again and in a resumed run.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from zeropipe.runtime.zero.hold.values import Segment

COUNT = "stochastic_rounding_step"  # in a param group: updates so far
_WORD = 0xFFFFFFFF
_CUT = -(1 << 16)  # a mask of the upper 16 bits


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """A hash of each element (int32): each bit of it depends on all bits (a finalizer of two rounds)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32))):
        # torch's shift keeps the sign; the product overflows, which is meant.
        bits = bits ^ ((bits >> shift) & ((1 << (32 - shift)) - 1))
        bits = bits * factor
    return bits ^ ((bits >> 16) & 0xFFFF)


def _signed(word: int) -> int:
    """The int32 of 32 bits."""
    word &= _WORD
    return word - (1 << 32) if word >> 31 else word


class Rounding:
    """Of one partition; ``segments``: this rank's elements of each parameter in its master."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self._names = [zlib.crc32(segment.name.encode()) for segment in segments]

    def elements(self, where: slice | torch.Tensor, device: torch.device) -> torch.Tensor:
        """A hash of name and place for each element of the master in ``where``: 1D, int32."""
        if not isinstance(where, slice):
            low = int(where.min())
            return self.elements(slice(low, int(where.max()) + 1), device)[where - low]
        found = torch.zeros(where.stop - where.start, dtype=torch.int32, device=device)
        for segment, name in zip(self._segments, self._names, strict=True):
            a, b = max(segment.start, where.start), min(segment.stop, where.stop)
            if segment.piece is None or a >= b:
                continue
            first = segment.piece.start + a - segment.start
            # Of a parameter with more elements than a word has values, they begin again.
            place = torch.arange(first, first + b - a, device=device).to(torch.int32)
            found[a - where.start : b - where.start] = _mix(place ^ _signed(name))
        return found

    def rounded(self, values: torch.Tensor, elements: torch.Tensor, key: str, count: int) -> torch.Tensor:
        """``values`` (fp32, 1D) as bf16: one of the two neighbours. inf and NaN stay, what is exact stays."""
        salt = zlib.crc32(key.encode(), count & _WORD)
        random = _mix(elements ^ _signed(salt)) & 0xFFFF
        return ((values.view(torch.int32) + random) & _CUT).view(torch.float32).to(torch.bfloat16)
