"""Which old (pipeline, tensor) ranks make up each new one when the two degrees change.

Ranks are numbered tensor-first: rank = pp_index * tp_degree + tp_index.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from zeropipe.checkpoint.reshape_utils import share
from zeropipe.errors import CheckpointError

_log = logging.getLogger("zeropipe")


def log_table(table: Mapping[Any, Any], title: str) -> None:
    _log.info(title)
    for key, value in table.items():
        _log.info("%s = %s", key, value)


class meg_2d_parallel_map:
    """A grid of lists: what belongs to each (pp_index, tp_index)."""

    def __init__(self, pp_degree: int, tp_degree: int) -> None:
        if pp_degree < 1 or tp_degree < 1:
            raise CheckpointError(
                "degrees of a 2-D map", expected="at least 1 each", found=(pp_degree, tp_degree)
            )
        self.pp_degree = pp_degree
        self.tp_degree = tp_degree
        self.map: dict[tuple[int, int], list[Any]] = {}

    def simple_init(self) -> None:
        """Give each cell its own rank."""
        self.map = {
            (pp, tp): [pp * self.tp_degree + tp]
            for pp in range(self.pp_degree)
            for tp in range(self.tp_degree)
        }

    def add_data(self, pp_index: int, tp_index: int, data: Sequence[Any]) -> None:
        """Append ``data`` (a list) to a cell."""
        if not isinstance(data, list):
            raise CheckpointError("add_data: data", expected="a list", found=type(data).__name__)
        self.map.setdefault(self._cell(pp_index, tp_index), []).extend(data)

    def get_data(self, pp_index: int | None = None, tp_index: int | None = None) -> list[Any]:
        """A cell's list; with an index left out, all cells along it, in order of (pp, tp)."""
        pps = range(self.pp_degree) if pp_index is None else [pp_index]
        tps = range(self.tp_degree) if tp_index is None else [tp_index]
        return [item for pp in pps for tp in tps for item in self.map[self._cell(pp, tp)]]

    def print_data(self, tag: str) -> None:
        """Log every cell."""
        log_table({f"(pp {pp}, tp {tp})": data for (pp, tp), data in sorted(self.map.items())}, tag)

    def _cell(self, pp_index: int, tp_index: int) -> tuple[int, int]:
        if not (0 <= pp_index < self.pp_degree and 0 <= tp_index < self.tp_degree):
            raise CheckpointError(
                "index into a 2-D map",
                expected=f"pp below {self.pp_degree}, tp below {self.tp_degree}",
                found=(pp_index, tp_index),
            )
        return pp_index, tp_index


def reshape_meg_2d_parallel(
    old_pp_degree: int, old_tp_degree: int, new_pp_degree: int, new_tp_degree: int, verbose: bool = False
) -> meg_2d_parallel_map:
    """Old ranks by new (pp_index, tp_index).

    Fewer new ranks share the old ones out in runs, tensor degree first. More new ranks than old: several new
    ones list the same old rank, of which each needs a part. Raises CheckpointError for degrees that divide
    neither way.
    """
    old = meg_2d_parallel_map(old_pp_degree, old_tp_degree)
    old.simple_init()
    if verbose:
        old.print_data("original_2d_map:")
    return reshape_2d_map(old, new_pp_degree, new_tp_degree, verbose)


def reshape_2d_map(
    old: meg_2d_parallel_map, new_pp_degree: int, new_tp_degree: int, verbose: bool = False
) -> meg_2d_parallel_map:
    """The same for a map with any data in it."""
    for what, degree, wanted in (
        ("tensor", old.tp_degree, new_tp_degree),
        ("pipeline", old.pp_degree, new_pp_degree),
    ):
        if wanted < 1 or (degree % wanted and wanted % degree):
            raise CheckpointError(
                f"the {what} degree cannot be reshaped",
                expected=f"a divisor or a multiple of {degree}",
                found=wanted,
            )
    # Each axis is shared out by itself, so a new cell is a block of old ones, read row by row:
    #
    #        tp 0 1 2 3                 tp  0        1
    #   pp 0    a b c d     ->  pp 0       a b e f  c d g h
    #      1    e f g h
    new = meg_2d_parallel_map(new_pp_degree, new_tp_degree)
    for pp, rows in enumerate(share(range(old.pp_degree), new_pp_degree)):
        for tp, columns in enumerate(share(range(old.tp_degree), new_tp_degree)):
            new.add_data(pp, tp, [x for row in rows for column in columns for x in old.get_data(row, column)])
    if verbose:
        new.print_data("after_2d_reshape:")
    return new


def get_mpu_ranks(
    tp_size: int = 1, pp_size: int = 1, dp_size: int = 1, virtual_pp_size: int | None = None
) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Megatron's rank lists: (tensor groups, pipeline groups, data groups).

    Ranks are numbered tensor-first, then data, then pipeline.
    """
    # In a stage data-parallel ranks follow one another, each as a run of its tensor-parallel ones.
    world = tp_size * pp_size * dp_size
    per_stage = tp_size * dp_size
    tensor = [list(range(i, i + tp_size)) for i in range(0, world, tp_size)]
    pipeline = [list(range(i, world, per_stage)) for i in range(per_stage)]
    data = [
        list(range(stage * per_stage + tp, (stage + 1) * per_stage, tp_size))
        for stage in range(pp_size)
        for tp in range(tp_size)
    ]
    return tensor, pipeline, data
