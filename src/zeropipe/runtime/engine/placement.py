"""Where a model trains: this rank's place among those that train together, its device, and at first rank 0's values.

With model parallelism the place is what the user's ``mpu`` says it is: ours (the grid of a pipeline) or Megatron's,
whose methods have had several names.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from zeropipe.checkpoint.save.records import Grid
from zeropipe.comm.collectives import broadcast
from zeropipe.comm.group import SELF, Group, from_process_group, group_of, with_words, world
from zeropipe.config.schema import Config
from zeropipe.config.schema_zero import ZeroOptimization
from zeropipe.errors import ConfigError
from zeropipe.given import Mesh, Mpu, Namespace
from zeropipe.runtime.pipe.module import PipelineModule
from zeropipe.runtime.sequence_parallel.place import (
    initialize_sequence_parallel,
    ranks_of_a_sequence,
)
from zeropipe.runtime.zero.param import is_sharded, is_trained
from zeropipe.runtime.zero.replication import Replication, replicated, shard_size, with_hops

_SLICE_RANK = ("get_tensor_model_parallel_rank", "get_slice_parallel_rank")
_TABLES = torch.nn.Embedding | torch.nn.EmbeddingBag
_SEQUENCE = "sequence_parallel"  # the axis of a device mesh
_SLICES = ("get_tensor_model_parallel_world_size", "get_slice_parallel_world_size")


def divided_sequences(mpu: Mpu, mesh: Mesh, config: Config) -> tuple[Mpu, Mesh]:
    """``mpu`` and ``mesh`` where sequences are divided as any of them, or the config, says. Collective where they are.

    Raises ConfigError where two of them say different things.
    """
    said: dict[str, int] = {}
    if "sequence_parallel_size" in config.model_fields_set:
        said["config key 'sequence_parallel_size'"] = config.sequence_parallel_size
    pair = isinstance(mesh, tuple | list)
    axis = not pair and mesh is not None and _SEQUENCE in (getattr(mesh, "mesh_dim_names", None) or ())
    if pair or axis:
        said["initialize: mesh_param"] = mesh[1] if pair else mesh[_SEQUENCE].size()
    if mpu is not None:
        said["initialize: mpu"] = ranks_of_a_sequence(mpu)
    if len(set(said.values())) > 1:
        raise ConfigError(
            "how many ranks share a sequence",
            expected="one number",
            found=", ".join(f"{size} by {who}" for who, size in said.items()),
            fix="say it in one place; a PipelineModule does not divide sequences",
        )
    size = next(iter(said.values()), 1)
    given = {"config key 'data_parallel_size'": config.data_parallel_size}
    if pair:
        given["initialize: mesh_param"] = mesh[0]
    for who, samples in given.items():
        if samples is not None and samples * size != world().size:
            raise ConfigError(
                who,
                expected=f"{world().size // size}, so that with {size} ranks to a sequence they are {world().size}",
                found=samples,
            )
    if size > 1:
        mpu = initialize_sequence_parallel(size) if mpu is None else mpu
        if axis and tuple(from_process_group(mesh.get_group(_SEQUENCE)).ranks) != mpu.sequence_group.ranks:
            raise ConfigError(
                "initialize: mesh_param",
                expected="consecutive ranks along its axis 'sequence_parallel'",
                found=from_process_group(mesh.get_group(_SEQUENCE)).ranks,
                fix="make it the last axis of the mesh",
            )
    return mpu, None if pair or axis else mesh


def data_parallel_group(mpu: Mpu, mesh: Mesh) -> Group:
    """The ranks that hold replicas of this rank's part of the model: from ``mpu``, a device mesh, or all."""
    return with_words(_data_parallel_group(mpu, mesh))


def _data_parallel_group(mpu: Any, mesh: Any) -> Group:
    if mpu is not None:
        return group_of(mpu)
    if mesh is None or not hasattr(mesh, "get_group"):
        return world()
    pair = _mesh_pair(mesh)
    if pair is not None:
        both = world() if mesh.size() == world().size else mesh[pair]._flatten().get_group()
        return both if isinstance(both, Group) else from_process_group(both)
    names = mesh.mesh_dim_names or ()
    if "data_parallel" not in names and mesh.ndim > 1:
        raise ConfigError(
            "initialize: mesh_param",
            expected="an axis named 'data_parallel', or two whose names end in 'replicate' and 'shard'",
            found=f"axes {names} of sizes {tuple(mesh.shape)}",
            fix="name the mesh's axes: init_device_mesh(..., mesh_dim_names=('data_parallel', ...))",
        )
    return from_process_group(mesh.get_group("data_parallel" if "data_parallel" in names else 0))


def replication(zero: ZeroOptimization, group: Group, mesh: Mesh) -> Replication:
    """Which ranks of ``group`` share one copy of the shards at stage 3, from the config or a 2-D mesh; collective."""
    size = shard_size(zero)
    pair = None if mesh is None or not hasattr(mesh, "get_group") else _mesh_pair(mesh)
    if pair is None:
        return replicated(group, zero).with_lanes()
    replicas, shard = (with_words(from_process_group(mesh.get_group(name))) for name in pair)
    if size is not None and size != shard.size:
        raise ConfigError(
            "config key 'zero_optimization.mics_shard_size' and the device mesh differ",
            expected=f"{shard.size}, as the mesh's axis {pair[1]!r}",
            found=size,
            fix="remove the key, or make the mesh of that shape",
        )
    shard = with_hops(shard) if zero.mics_hierarchical_params_gather else shard
    return Replication(shard, replicas).with_lanes()


def _mesh_pair(mesh: Any) -> tuple[str, str] | None:
    """The names of a mesh's axes for replicas and for shards; None where it has no such two."""
    names = mesh.mesh_dim_names or ()
    found = [next((n for n in names if n.endswith(end)), None) for end in ("replicate", "shard")]
    return (found[0], found[1]) if found[0] is not None and found[1] is not None else None


@dataclass(frozen=True, slots=True)
class Samples:
    """Which share of the samples is this rank's: that of ``rank`` among ``size``. Ranks that share a sequence have the
    same."""

    rank: int
    size: int


def samples_of(group: Group, mpu: Mpu) -> Samples:
    ranks = ranks_of_a_sequence(mpu)
    if ranks == 1:
        return Samples(group.rank, group.size)
    return Samples(_ask(mpu, "get_data_parallel_rank", default=group.rank // ranks), group.size // ranks)


def check_slots(config: Config, module: torch.nn.Module, ranks: int, samples: int, mesh: Mesh) -> None:
    """Raise ConfigError where the results of this model would follow the number of ranks, and must not."""
    if config.reproducible.slots is None:
        return
    crossing = (
        [tie.key for tie in module.tie_plans() if tie.crosses] if isinstance(module, PipelineModule) else []
    )
    if crossing:
        raise ConfigError(
            f"config key 'reproducible.slots' and weights that pipeline stages share ({', '.join(crossing)}): a stage "
            "sums the gradients of its own uses first, so that the number of stages would show",
            fix="run it on one stage, untie the weights, or remove 'reproducible'",
        )
    if samples < ranks:
        raise ConfigError(
            "config key 'reproducible.slots' with sequences that ranks share: their number shows in the sums",
            fix="remove one of the two",
        )
    if config.zero_optimization.stage == 3 and hasattr(mesh, "get_group") and _mesh_pair(mesh) is not None:
        raise ConfigError(
            "config key 'reproducible.slots' with a mesh that shards inside groups of ranks: sums would go by groups",
            fix="give a mesh of one axis, or remove 'reproducible'",
        )
    for name, child in module.named_modules():
        # Each forward shortens rows that the next one on this rank reads: which that is depends on the ranks.
        if getattr(child, "max_norm", None) is not None and isinstance(child, _TABLES):
            raise ConfigError(
                f"config key 'reproducible.slots' and module '{name}', whose forward writes to its weight",
                expected="an embedding without max_norm",
                found=f"max_norm {child.max_norm}",
                fix="normalise in forward, without changing the weight, or remove one of the two",
            )


def model_parts(
    module: torch.nn.Module, mpu: Mpu
) -> tuple[Group, Callable[[torch.nn.Parameter], bool] | None]:
    """The ranks that hold the other parts of this replica, and which parameters count here in a norm over them."""
    if mpu is None:
        return SELF, None
    group = getattr(mpu, "model_group", None)
    if not isinstance(group, Group):
        pg = mpu.get_model_parallel_group() if hasattr(mpu, "get_model_parallel_group") else None
        group = SELF if pg is None else with_words(from_process_group(pg))
    if group.size == 1:
        return SELF, None
    # Parts are pipeline stages and tensor-parallel slices. A parameter that several ranks hold whole counts on one of
    # them: a slice is marked by ``tensor_model_parallel``; of tied weights the module knows which are copies.
    first_slice = _ask(mpu, *reversed(_SLICE_RANK), "get_model_parallel_rank") == 0
    is_copy = getattr(module, "is_tied_copy", lambda param: False)

    def counts(param: torch.nn.Parameter) -> bool:
        sliced = getattr(param, "tensor_model_parallel", False) or getattr(param, "model_parallel", False)
        return (sliced or first_slice) and not is_copy(param)

    return group, counts


def grid_of(group: Group, mpu: Mpu) -> Grid:
    """This rank's place, as checkpoints name it."""
    if mpu is None:
        return Grid(group.rank, group.size, group.rank, group.size)
    pp = _ask(mpu, "get_pipe_parallel_world_size", "get_pipeline_model_parallel_world_size", default=1)
    pp_rank = _ask(mpu, "get_pipe_parallel_rank", "get_pipeline_model_parallel_rank")
    # Who says nothing of slices counts them and the stages together.
    tp = _ask(mpu, *_SLICES, default=_ask(mpu, "get_model_parallel_world_size", default=1) // pp)
    tp_rank = _ask(mpu, *_SLICE_RANK, default=_ask(mpu, "get_model_parallel_rank") % max(tp, 1))
    return Grid(world().rank, world().size, group.rank, group.size, tp_rank, tp, pp_rank, pp)


def _ask(mpu: Any, *names: str, default: int = 0) -> int:
    """What the first of these methods that there is says."""
    found = next((getattr(mpu, name) for name in names if hasattr(mpu, name)), None)
    return default if found is None else int(found())


def pick_device(args: Namespace = None) -> torch.device:
    """This rank's GPU if there is one, which is then the current one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = getattr(args, "device_rank", None)
    local = getattr(args, "local_rank", None) if local is None else local
    if local is None or local < 0:
        # Whoever started the world without torchrun has set the device, or has one.
        here = os.environ.get("LOCAL_RANK")
        local = torch.cuda.current_device() if here is None else int(here) % torch.cuda.device_count()
    # Where somebody else started the world nobody may have set it: NCCL, and objects that travel by it, would take
    # device 0 on every rank.
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def synchronize_module(module: torch.nn.Module, group: Group) -> None:
    """Give every rank rank 0's value of what no partition has broadcast: buffers and untrained parameters."""
    for tensor in (*module.parameters(), *module.buffers()):
        if is_trained(tensor) or is_sharded(tensor) or tensor.numel() == 0:
            continue
        data = tensor.detach()
        # What lies in pieces (an expanded buffer, a transposed weight) travels as a copy.
        whole = data.contiguous()
        broadcast(whole, 0, group, label="initial values")
        if whole.data_ptr() != data.data_ptr():
            data.copy_(whole)
