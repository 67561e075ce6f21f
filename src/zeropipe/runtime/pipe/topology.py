"""The process grid: which rank stands where along the named axes, and the groups that ranks form along them."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from itertools import product
from typing import Any

from zeropipe.comm.group import Group, new_group, new_groups, world
from zeropipe.errors import ConfigError, UsageError
from zeropipe.given import ProcessGroup
from zeropipe.runtime.pipe.p2p import Links


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
        # Ranks come in the order of the grid, so they fall into their lists in the order of the axis.
        lists: dict[Any, list[int]] = {}
        for rank, where in enumerate(self._coords):
            lists.setdefault(where._replace(**{axis: 0}), []).append(rank)
        return list(lists.values())

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


class PipelineParallelGrid:
    """This rank's place on the grid and its group along every axis; collective over the world.

    Groups: ``data_group`` (replicas of the same layers), ``pipe_group`` (the stages of one pipeline; a member's
    index is its pipeline rank), ``slice_group`` (ranks that share each layer: the ``model`` axis), and
    ``model_group`` (all ranks that hold one replica of the model: pipe x model).
    """

    def __init__(self, topology: ProcessTopology | None = None, process_group: ProcessGroup = None) -> None:
        everyone = world()
        self._topo = topology or PipeDataParallelTopology(1, everyone.size)
        if self._topo.world_size() != everyone.size:
            raise ConfigError(
                f"the topology {self._topo} does not cover the world",
                expected=f"{everyone.size} ranks",
                found=self._topo.world_size(),
                fix="make pipe x data x model equal the number of processes",
            )

        # This rank's place, under the names that model code of DeepSpeed and Megatron reads.
        self.global_rank = everyone.rank
        self.world_size = everyone.size
        self.data_parallel_size = max(self._topo.get_dim("data"), 1)
        self.pipe_parallel_size = max(self._topo.get_dim("pipe"), 1)
        self.model_parallel_size = max(self._topo.get_dim("model"), 1)
        self.slice_parallel_size = self.model_parallel_size
        here = self._topo.get_coord(self.global_rank)
        self.stage_id: int = getattr(here, "pipe", 0)
        self.data_parallel_id: int = getattr(here, "data", 0)
        self.slice_parallel_id: int = getattr(here, "model", 0)
        self.is_first_stage = self.stage_id == 0
        self.is_last_stage = self.stage_id == self.pipe_parallel_size - 1

        # Its groups. Every rank takes part in making all of them, in one order.
        self.pipe_group = self._along("pipe")
        self.data_group = self._along("data")
        self.slice_group = self._along("model")
        # Without a data axis the whole grid is one replica.
        places = range(self.data_parallel_size) if "data" in self._topo.axes else ()
        replicas = [self._topo.get_axis_list("data", place) for place in places]
        self.model_group = new_groups(replicas or [range(self.world_size)])
        self.links = Links(self.pipe_group, self._pairs())

    def _along(self, axis: str) -> Group:
        return new_groups(self._topo.get_axis_comm_lists(axis) or [[r] for r in range(self.world_size)])

    def _pairs(self) -> dict[tuple[int, int], Group]:
        # A group for each direction between two pipeline ranks, where the backend has no tags to tell them apart.
        if self.pipe_group.has_tags:
            return {}
        found: dict[tuple[int, int], Group] = {}
        size = self.pipe_parallel_size
        for ranks in self._topo.get_axis_comm_lists("pipe"):
            # Neighbours in either direction, the last and the first too: stages may go round in a loop.
            for a in range(size):
                for b in {(a + 1) % size, (a - 1) % size} - {a}:
                    group = new_group([ranks[a], ranks[b]])
                    if group is not None:
                        found[a, b] = group
        return found

    # The mpu interface.

    def topology(self) -> ProcessTopology:
        return self._topo

    def get_global_rank(self) -> int:
        return self.global_rank

    def get_stage_id(self) -> int:
        return self.stage_id

    def get_data_parallel_id(self) -> int:
        return self.data_parallel_id

    def stage_to_global(self, stage_id: int, **kwargs: int) -> int:
        """The rank at pipeline place ``stage_id`` and otherwise this rank's coordinates, or those given."""
        here = self._topo.get_coord(self.global_rank)._asdict()
        return self._topo.get_rank(**{**here, "pipe": stage_id, **kwargs})

    get_pipe_parallel_rank = get_stage_id

    def get_pipe_parallel_world_size(self) -> int:
        return self.pipe_parallel_size

    def get_pipe_parallel_group(self) -> Any:
        return self.pipe_group.pg

    get_data_parallel_rank = get_data_parallel_id

    def get_data_parallel_world_size(self) -> int:
        return self.data_parallel_size

    def get_data_parallel_group(self) -> Any:
        return self.data_group.pg

    def get_model_parallel_rank(self) -> int:
        """The place on the ``model`` axis: which slice of each layer this rank holds."""
        return self.slice_parallel_id

    def get_model_parallel_world_size(self) -> int:
        return self.slice_parallel_size

    def get_model_parallel_group(self) -> Any:
        return self.slice_group.pg

    get_slice_parallel_rank = get_model_parallel_rank
    get_slice_parallel_world_size = get_model_parallel_world_size
    get_slice_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group
