"""Packs what one stage hands to the next into one flat message, and unpacks it.

The tensors of a value, of any dtype, go end to end into one byte buffer; all else (`containers`) is the *form*, which
the other side is told once, or with every message where shapes may change::

    payload  | state, 64 bytes | tensor 0 | pad | tensor 1 | pad | ...      each tensor starts on 64 bytes
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

ALIGN = 64  # bytes; enough for any vector load
HEAD = 64  # bytes before the first tensor; the first byte says whether this is a value or a farewell
VALUE, FAILED = 0, 1


@dataclass(frozen=True, slots=True)
class TensorForm:
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: str  # torch's name without the prefix
    needs_grad: bool

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Form:
    """The shape of a message: the containers as JSON, and its tensors in order."""

    tree: str
    tensors: tuple[TensorForm, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor starts, then where the message ends; bytes."""
        at, found = HEAD, []
        for tensor in self.tensors:
            found.append(at)
            at += -(-tensor.nbytes // ALIGN) * ALIGN
        return (*found, at)

    @property
    def nbytes(self) -> int:
        return self.offsets[-1]

    def to_bytes(self) -> bytes:
        rows = [[list(t.shape), t.dtype, t.needs_grad] for t in self.tensors]
        return json.dumps([self.tree, rows]).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Form:
        tree, rows = json.loads(data.decode())
        return cls(tree, tuple(TensorForm(tuple(shape), dtype, grad) for shape, dtype, grad in rows))

    def __str__(self) -> str:
        return ", ".join(f"{t.dtype}{list(t.shape)}" for t in self.tensors) or "no tensors"


def form_of(tree: str, tensors: Sequence[torch.Tensor]) -> Form:
    return Form(
        tree,
        tuple(
            TensorForm(tuple(t.shape), str(t.dtype).removeprefix("torch."), t.requires_grad) for t in tensors
        ),
    )


def pack(form: Form, tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """One byte buffer (1D, form.nbytes) with all values."""
    buffer = torch.empty(form.nbytes, dtype=torch.uint8, device=device)
    buffer[:HEAD].zero_()
    for tensor, view in zip(tensors, views(form, buffer), strict=True):
        view.copy_(tensor.detach())
    return buffer


def views(form: Form, buffer: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of a message, as views of its buffer."""
    return [
        buffer[start : start + t.nbytes].view(getattr(torch, t.dtype)).view(t.shape)
        for start, t in zip(form.offsets, form.tensors, strict=False)
    ]


def farewell(nbytes: int, device: torch.device) -> torch.Tensor:
    """A message of the expected size that says: the sender has failed."""
    buffer = torch.zeros(max(nbytes, HEAD), dtype=torch.uint8, device=device)
    buffer[0] = FAILED
    return buffer
