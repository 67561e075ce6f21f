"""Packs the signs of a float tensor eight to a byte, in a handful of fused torch operations per chunk.

Element i of a tensor is bit i % 8 of byte i // 8; a set bit means negative (also -0.0, as ``torch.signbit``).
The trick on the way in: a boolean tensor read as int64 holds eight 0/1 bytes, and one multiplication moves
all eight into the top byte. On the way out: a table of 256 rows of eight factors, looked up by byte.
"""

from __future__ import annotations

import torch

# Byte k (counted from the low end) times this lands in bit k of the top byte.
_GATHER_BITS = 0x0102040810204080
# Elements: on a CPU the temporaries of a chunk stay in the cache.
_CHUNK = 1 << 18


def packed_numel(numel: int) -> int:
    """Bytes that the signs of ``numel`` elements take."""
    return -(-numel // 8)


def pack_signs(values: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The signs of ``values`` (1-D, floating point, any length), one bit each.

    ``out``: uint8, 1-D, ``packed_numel(values.numel())``. The unused bits of the last byte are 0.
    """
    numel = values.numel()
    if out is None:
        out = torch.empty(packed_numel(numel), dtype=torch.uint8, device=values.device)
    whole = numel - numel % 8
    step = _chunk(values, whole)
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        bits = torch.signbit(values[start:stop]).view(torch.int64)  # 1-D, (stop - start) / 8
        bits *= _GATHER_BITS
        # The shift keeps the sign, which the conversion to a byte drops.
        bits >>= 56
        out[start // 8 : stop // 8] = bits
    if whole < numel:
        tail = torch.zeros(8, dtype=torch.bool, device=values.device)
        tail[: numel - whole] = torch.signbit(values[whole:])
        out[whole // 8 :] = (tail.view(torch.int64) * _GATHER_BITS) >> 56
    return out


def sign_table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """+1 and -1 for each bit of each byte: (256, 8), the table that ``add_signs_`` looks bytes up in."""
    numbers = torch.arange(256, device=device).unsqueeze(1)
    bits = (numbers >> torch.arange(8, device=device)) & 1
    return (1 - 2 * bits).to(dtype)


def add_signs_(
    target: torch.Tensor, packed: torch.Tensor, start: int, scale: torch.Tensor, table: torch.Tensor
) -> None:
    """``target += scale * sign`` for the ``target.numel()`` signs of ``packed`` that begin at element ``start``.

    ``target``: 1-D, of the table's dtype. ``scale``: 0-D. Each product is exact, so each element is rounded once.
    """
    # Scaling the table, (256, 8), instead of the signs saves a pass.
    rows = table * scale
    _for_chunks(target, packed, start, rows, torch.Tensor.add_)


def set_signs_(
    target: torch.Tensor, packed: torch.Tensor, start: int, scale: torch.Tensor, table: torch.Tensor
) -> None:
    """``target = scale * sign``, as ``add_signs_``."""
    _for_chunks(target, packed, start, table * scale, torch.Tensor.copy_)


def _for_chunks(
    target: torch.Tensor, packed: torch.Tensor, start: int, rows: torch.Tensor, apply: object
) -> None:
    assert callable(apply)
    numel = target.numel()
    step = _chunk(target, numel)
    done = 0
    while done < numel:
        # Bits of the first byte that belong to the element before.
        skip = (start + done) % 8
        count = min(step - skip, numel - done)
        first = (start + done) // 8
        index = packed[first : first + packed_numel(skip + count)].to(torch.int32)
        signs = rows.index_select(0, index).view(-1)[skip : skip + count]
        apply(target[done : done + count], signs)
        done += count


def _chunk(tensor: torch.Tensor, numel: int) -> int:
    return _CHUNK if tensor.device.type == "cpu" else max(numel + 8, 8)
