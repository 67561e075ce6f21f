"""What zeropipe has made of each parameter, as rows that print as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from zeropipe.runtime.zero.gather.shards import shards_of
from zeropipe.runtime.zero.param import ZeroParamStatus, ZeroParamType, is_trained


@dataclass(frozen=True, slots=True)
class ParameterRow:
    """One parameter on this rank. Bytes count its value only, not gradients and optimizer state."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    numel: int
    bytes_here: int  # shard, and whole value while gathered
    bytes_whole: int  # of one whole value
    trained: bool  # an optimizer of zeropipe holds its master

    # How it is divided; these are the words for one that is not.
    kind: ZeroParamType = ZeroParamType.NORMAL
    state: ZeroParamStatus = ZeroParamStatus.AVAILABLE
    layout: str = "whole"  # how it is cut
    holders: tuple[int, ...] = ()  # ranks that have a shard; () where every rank has it whole
    persistent: bool = True  # stays gathered between uses

    @property
    def held_by(self) -> str:
        if not self.holders:
            return "every rank"
        # A run of ranks, or each by its number, as where the stages of a pipeline lie between them.
        first, last = self.holders[0], self.holders[-1]
        if self.holders == tuple(range(first, last + 1)):
            return f"ranks {first}-{last}" if last > first else f"rank {first}"
        return "ranks " + " ".join(map(str, self.holders))


@dataclass(frozen=True, slots=True)
class Description:
    """The parameters of one model on this rank, in the order of ``named_parameters``; ``str`` is a table."""

    rows: tuple[ParameterRow, ...]

    def __iter__(self) -> Iterator[ParameterRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> ParameterRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    @property
    def bytes_here(self) -> int:
        return sum(row.bytes_here for row in self.rows)

    @property
    def bytes_whole(self) -> int:
        return sum(row.bytes_whole for row in self.rows)

    def __str__(self) -> str:
        head = ("parameter", "shape", "dtype", "state", "here", "whole", "layout", "held by")
        table = [head, *(_cells(row) for row in self.rows)]
        table.append(("all", "", "", "", _size(self.bytes_here), _size(self.bytes_whole), "", ""))
        widths = [max(len(line[column]) for line in table) for column in range(len(head))]
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def describe(model: torch.nn.Module) -> Description:
    """State, bytes, layout and holders of every parameter of ``model`` on this rank; nothing is communicated."""
    return Description(tuple(_row(name, param) for name, param in model.named_parameters()))


def _row(name: str, param: torch.nn.Parameter) -> ParameterRow:
    shards, trained = shards_of(param), is_trained(param)
    if shards is None:
        return ParameterRow(
            name, tuple(param.shape), param.dtype, param.numel(), param.nbytes, param.nbytes, trained
        )
    # A value that is away has the storage of ``full`` at size zero, so this counts what is here now.
    here = shards.source.nbytes + shards.full.untyped_storage().nbytes()
    whole, spare = shards.numel * shards.full.element_size(), shards.layout.padding
    layout = f"{shards.layout.num_shards} x {shards.shard_numel}" + (f" (pad {spare})" if spare else "")
    cut = shards.own.kind, shards.state.status, layout, shards.group.ranks, shards.persist
    return ParameterRow(name, tuple(shards.shape), shards.dtype, shards.numel, here, whole, trained, *cut)


def _cells(row: ParameterRow) -> tuple[str, ...]:
    # A whole parameter stays anyway; the word is for one that might go.
    state = row.state.name.lower().replace("_", " ")
    if row.persistent and row.kind is not ZeroParamType.NORMAL:
        state += ", stays"
    shape = " x ".join(map(str, row.shape)) or "scalar"
    dtype = str(row.dtype).removeprefix("torch.")
    sizes = _size(row.bytes_here), _size(row.bytes_whole)
    return row.name, shape, dtype, state, *sizes, row.layout, row.held_by


def _size(nbytes: int) -> str:
    unit = min(max(nbytes.bit_length() - 1, 0) // 10, 4)
    return f"{nbytes / 1024**unit:.{min(unit, 1)}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"
