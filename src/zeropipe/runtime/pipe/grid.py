"""Process groups for a topology, and the questions that model code asks of them (the ``mpu`` interface)."""

from __future__ import annotations

from typing import Any

from zeropipe.comm.group import Group, new_group, new_groups, world
from zeropipe.errors import ConfigError
from zeropipe.runtime.pipe.p2p import Links
from zeropipe.runtime.pipe.topology import PipeDataParallelTopology, ProcessTopology


class PipelineParallelGrid:
    """This rank's place on the grid and its group along every axis; collective over the world.

    Groups: ``data_group`` (replicas of the same layers), ``pipe_group`` (the stages of one pipeline; a member's
    index is its pipeline rank), ``slice_group`` (ranks that share each layer: the ``model`` axis), and
    ``model_group`` (all ranks that hold one replica of the model: pipe x model).
    """

    def __init__(self, topology: ProcessTopology | None = None, process_group: Any = None) -> None:
        everyone = world()
        self._topo = topology or PipeDataParallelTopology(1, everyone.size)
        if self._topo.world_size() != everyone.size:
            raise ConfigError(
                f"the topology {self._topo} does not cover the world",
                expected=f"{everyone.size} ranks",
                found=self._topo.world_size(),
                fix="make pipe x data x model equal the number of processes",
            )
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

        self.pipe_group = self._along("pipe")
        self.data_group = self._along("data")
        self.slice_group = self._along("model")
        replicas = [
            sorted(self._topo.filter_match(**self._only("data", i))) for i in range(self.data_parallel_size)
        ]
        self.model_group = new_groups(replicas)
        self.links = Links(self.pipe_group, self._pairs())

    def _only(self, axis: str, index: int) -> dict[str, int]:
        return {axis: index} if axis in self._topo.axes else {}

    def _along(self, axis: str) -> Group:
        lists = self._topo.get_axis_comm_lists(axis) or [[rank] for rank in range(self.world_size)]
        return new_groups(lists)

    def _pairs(self) -> dict[tuple[int, int], Group]:
        """A group for each direction between two pipeline ranks, where the backend has no tags to tell them apart."""
        if "nccl" not in self.pipe_group.backend:
            return {}
        found: dict[tuple[int, int], Group] = {}
        size = self.pipe_parallel_size
        for ranks in self._topo.get_axis_comm_lists("pipe"):
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

    def get_pipe_parallel_rank(self) -> int:
        return self.stage_id

    def get_pipe_parallel_world_size(self) -> int:
        return self.pipe_parallel_size

    def get_pipe_parallel_group(self) -> Any:
        return self.pipe_group.pg

    def get_data_parallel_rank(self) -> int:
        return self.data_parallel_id

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
