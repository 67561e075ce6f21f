"""The process grid: which rank stands where along the named axes. Pure arithmetic; groups are made in `grid`."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from itertools import product
from typing import Any

from zeropipe.errors import UsageError
from zeropipe.names import lazy


class ProcessTopology:
    """A Cartesian grid of ranks. The first axis varies slowest: the ranks of the last axis are neighbours.

    >>> ProcessTopology(axes=["pipe", "data"], dims=[2, 2]).get_rank(pipe=1, data=0)
    2
    """

    def __init__(self, axes: Sequence[str], dims: Sequence[int]) -> None:
        if len(axes) != len(dims) or len(set(axes)) != len(axes) or any(d < 1 for d in dims) or not axes:
            raise UsageError(
                "a topology needs one size of at least 1 for each axis, and distinct axes",
                found=f"axes={list(axes)} dims={list(dims)}",
            )
        self.axes = list(axes)
        self.dims = list(dims)
        coord: Any = namedtuple("ProcessCoord", self.axes)  # type: ignore[misc]
        self.ProcessCoord = coord
        self.mapping: dict[Any, int] = {
            coord._make(where): rank for rank, where in enumerate(product(*map(range, dims)))
        }
        self._coords = list(self.mapping)

    def get_rank(self, **coord: int) -> int:
        """The rank at the coordinates of all axes."""
        if set(coord) != set(self.axes):
            raise UsageError(
                "get_rank needs a coordinate on every axis",
                expected=self.axes,
                found=sorted(coord),
                fix="use filter_match for a slice",
            )
        where = self.ProcessCoord(**coord)
        if where not in self.mapping:
            raise UsageError("no such place in the topology", expected=f"below {self.dims}", found=where)
        return self.mapping[where]

    def get_axis_names(self) -> list[str]:
        return self.axes

    def get_rank_repr(
        self,
        rank: int,
        omit_axes: Sequence[str] = ("data", "pipe"),
        inner_sep: str = "_",
        outer_sep: str = "-",
    ) -> str:
        """A name for files, such as ``model_00``; axes in ``omit_axes`` are left out."""
        where = self.get_coord(rank)
        return outer_sep.join(
            f"{axis}{inner_sep}{getattr(where, axis):02d}" for axis in self.axes if axis not in omit_axes
        )

    def get_dim(self, axis: str) -> int:
        """The size of ``axis``; 0 if there is no such axis."""
        return self.dims[self.axes.index(axis)] if axis in self.axes else 0

    def get_coord(self, rank: int) -> Any:
        """The place of ``rank``, as a named tuple with one field for each axis."""
        if not 0 <= rank < self.world_size():
            raise UsageError(
                "rank is not in the topology", expected=f"0 to {self.world_size() - 1}", found=rank
            )
        return self._coords[rank]

    def get_axis_comm_lists(self, axis: str) -> list[list[int]]:
        """The lists of ranks that differ only on ``axis``; none if there is no such axis."""
        if axis not in self.axes:
            return []
        others = [a for a in self.axes if a != axis]
        lists = []
        for where in product(*(range(self.get_dim(a)) for a in others)):
            fixed = dict(zip(others, where, strict=True))
            lists.append([self.get_rank(**fixed, **{axis: i}) for i in range(self.get_dim(axis))])
        return lists

    def filter_match(self, **coord: int) -> list[int]:
        """The ranks whose coordinates agree with those given, ascending."""
        wrong = sorted(set(coord) - set(self.axes))
        if wrong:
            raise UsageError("no such axis", expected=self.axes, found=wrong[0])
        return [
            rank
            for rank, where in enumerate(self._coords)
            if all(getattr(where, axis) == value for axis, value in coord.items())
        ]

    def get_axis_list(self, axis: str, idx: int) -> list[int]:
        """The ranks at place ``idx`` of ``axis``, ascending."""
        return self.filter_match(**{axis: idx})

    def world_size(self) -> int:
        return len(self._coords)

    def __str__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{a}={d}' for a, d in zip(self.axes, self.dims, strict=True))})"


class PipeDataParallelTopology(ProcessTopology):
    """Pipeline and data parallelism; data replicas of a stage are neighbours, because they exchange most."""

    def __init__(self, num_pp: int, num_dp: int) -> None:
        super().__init__(axes=["pipe", "data"], dims=[num_pp, num_dp])


class PipeModelDataParallelTopology(ProcessTopology):
    """Pipeline, data and tensor parallelism; the ranks that share a layer are neighbours."""

    def __init__(self, num_pp: int, num_mp: int, num_dp: int) -> None:
        super().__init__(axes=["pipe", "data", "model"], dims=[num_pp, num_dp, num_mp])


# Its users look for `PipelineParallelGrid` here, but it needs process groups.
__getattr__, __dir__ = lazy(__name__)
