"""Embeddings with ``max_norm`` at stages 0 to 2: rows that one rank's batch shortened are shortened on all.

Such a forward writes to the table, each rank's to the rows of its own batch, so that replicas would part. At the
boundary every rank takes a row from the first rank that read it; all that did have the same value, as shortening a row
depends on nothing else. That is what one process makes of all batches. (At stage 3 see ``edits.py``.)
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from zeropipe.comm.collectives import all_gather, all_reduce
from zeropipe.comm.group import Group


class RowNorms:
    """Notes which rows of which tables forwards read; ``join`` is collective."""

    def __init__(self, module: torch.nn.Module, group: Group) -> None:
        self._group = group
        self._tables = [
            child
            for child in module.modules()
            if isinstance(child, torch.nn.Embedding | torch.nn.EmbeddingBag) and child.max_norm is not None
        ]
        self._read: dict[int, torch.Tensor] = {}  # by place in _tables: 1D, uint8, whether the row was read
        self._handles = [
            table.register_forward_pre_hook(partial(self._note, place))
            for place, table in enumerate(self._tables if group.size > 1 else ())
        ]

    def remove_hooks(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _note(self, place: int, table: Any, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], torch.Tensor):
            self._rows(place)[args[0].detach().reshape(-1).long()] = 1

    def _rows(self, place: int) -> torch.Tensor:
        weight = self._tables[place].weight
        if place not in self._read:
            self._read[place] = torch.zeros(weight.shape[0], dtype=torch.uint8, device=weight.device)
        return self._read[place]

    def join(self) -> None:
        """Give every rank the rows that any has shortened since the last call."""
        if self._group.size == 1:
            return
        for place, table in enumerate(self._tables):
            self._join_one(table.weight, self._rows(place))
        self._read.clear()

    @torch.no_grad()
    def _join_one(self, weight: torch.Tensor, mine: torch.Tensor) -> None:
        every = mine.new_empty((self._group.size, mine.numel()))
        all_gather(every.view(-1), mine, self._group, label="rows that forwards read")
        rows = every.amax(0).nonzero().view(-1)
        if not rows.numel():
            return
        first = every.argmax(0)[rows]  # the first rank that read each
        # Bits, summed with zeros: the same everywhere, whatever the values are. Not all backends sum 16-bit integers.
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
        bits = weight[rows].view(kind) * (first == self._group.rank)[:, None].to(kind)
        wide = bits.int() if kind is torch.int16 else bits
        all_reduce(wide, self._group, label="rows that forwards shortened")
        weight[rows] = wide.to(kind).view(weight.dtype)
