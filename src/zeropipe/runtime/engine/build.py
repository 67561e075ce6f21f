"""Turns a parsed config into the objects that an engine is wired from: policy, scaler, optimizer, schedule."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch

from zeropipe.comm.group import SELF, Group, from_process_group, world
from zeropipe.config.schema import Config
from zeropipe.errors import ConfigError, UnsupportedOptimizerError, UsageError
from zeropipe.runtime import lr_schedules
from zeropipe.runtime.engine.placement import DTYPES, Dtypes
from zeropipe.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler, get_loss_scaler
from zeropipe.runtime.optimizers.registry import build_optimizer, require_shardable
from zeropipe.runtime.zero.gather.sharded_model import ShardedModel, Sharding
from zeropipe.runtime.zero.hold.offload import check_folders
from zeropipe.runtime.zero.hold.policy import AUTO_BUCKET_NUMEL, AUTO_SUB_GROUP_NUMEL, Place, Policy
from zeropipe.runtime.zero.hold.survey import Communicates
from zeropipe.runtime.zero.leaf import leaf_modules
from zeropipe.runtime.zero.param import is_sharded, is_trained
from zeropipe.runtime.zero.replication import Replication, replicated, shard_size, with_hops

Params = Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]]


def data_parallel_group(mpu: Any, mesh: Any) -> Group:
    """The ranks that hold replicas of this rank's part of the model: from ``mpu``, a device mesh, or all."""
    own = getattr(mpu, "data_group", None)
    if isinstance(own, Group):
        return own
    if mpu is not None:
        return from_process_group(mpu.get_data_parallel_group())
    if mesh is not None and hasattr(mesh, "get_group"):
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
    return world()


def replication(config: Config, group: Group, mesh: Any) -> Replication:
    """Which ranks of ``group`` share one copy of the shards at stage 3, from the config or a 2-D mesh; collective."""
    zero = config.zero_optimization
    if zero.stage != 3:
        return Replication(group)
    size = shard_size(zero)
    pair = None if mesh is None or not hasattr(mesh, "get_group") else _mesh_pair(mesh)
    if pair is not None:
        replicas, shard = (from_process_group(mesh.get_group(name)) for name in pair)
        if size is not None and size != shard.size:
            raise ConfigError(
                "config key 'zero_optimization.mics_shard_size' and the device mesh differ",
                expected=f"{shard.size}, as the mesh's axis {pair[1]!r}",
                found=size,
                fix="remove the key, or make the mesh of that shape",
            )
        return Replication(with_hops(shard) if zero.mics_hierarchical_params_gather else shard, replicas)
    return replicated(group, zero)


def _mesh_pair(mesh: Any) -> tuple[str, str] | None:
    """The names of a mesh's axes for replicas and for shards; None where it has no such two."""
    names = mesh.mesh_dim_names or ()
    found = [next((n for n in names if n.endswith(end)), None) for end in ("replicate", "shard")]
    return (found[0], found[1]) if found[0] is not None and found[1] is not None else None


def model_parts(
    module: torch.nn.Module, mpu: Any
) -> tuple[Group, Callable[[torch.nn.Parameter], bool] | None]:
    """The ranks that hold the other parts of this replica, and which parameters count here in a norm over them.

    Parts are pipeline stages and tensor-parallel slices. A parameter that several ranks hold whole counts on one of
    them: a slice is marked by ``param.tensor_model_parallel`` (or ``model_parallel``); of tied weights the
    module's ``is_tied_copy`` knows which are copies.
    """
    if mpu is None:
        return SELF, None
    group = getattr(mpu, "model_group", None)
    if not isinstance(group, Group):
        pg = mpu.get_model_parallel_group() if hasattr(mpu, "get_model_parallel_group") else None
        group = SELF if pg is None else from_process_group(pg)
    if group.size == 1:
        return SELF, None
    slice_rank = next(
        (
            int(getattr(mpu, name)())
            for name in (
                "get_slice_parallel_rank",
                "get_tensor_model_parallel_rank",
                "get_model_parallel_rank",
            )
            if hasattr(mpu, name)
        ),
        0,
    )
    is_copy = getattr(module, "is_tied_copy", lambda param: False)

    def counts(param: torch.nn.Parameter) -> bool:
        sliced = getattr(param, "tensor_model_parallel", False) or getattr(param, "model_parallel", False)
        return (sliced or slice_rank == 0) and not is_copy(param)

    return group, counts


def pick_device(args: Any = None) -> torch.device:
    """This rank's GPU if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = getattr(args, "device_rank", None)
    local = getattr(args, "local_rank", None) if local is None else local
    if local is None or local < 0:
        local = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
    return torch.device("cuda", local)


def policy_of(config: Config) -> Policy:
    zero = config.zero_optimization
    chosen = "reduce_bucket_size" in zero.model_fields_set
    wire = config.communication_data_type
    accumulate = config.data_types.grad_accum_dtype
    return Policy(
        stage=zero.stage,
        bucket_numel=zero.reduce_bucket_size if chosen else AUTO_BUCKET_NUMEL,
        publish_numel=min(zero.allgather_bucket_size, AUTO_BUCKET_NUMEL),
        overlap_comm=zero.overlap_comm,
        accumulate_dtype=None if accumulate is None else DTYPES[accumulate],
        scales_loss=config.fp16.enabled and config.fp16.loss_scale != 1,
        reduce_dtype=None if wire is None else DTYPES[wire],
        optimizer_place=Place(zero.offload_optimizer.device if zero.stage > 0 else "none"),
        param_place=Place(zero.offload_param.device if zero.stage == 3 else "none"),
        optimizer_folder=zero.offload_optimizer.nvme_path or "",
        param_folder=zero.offload_param.nvme_path or "",
        pin_memory=zero.offload_optimizer.pin_memory and zero.offload_param.pin_memory,
        sub_group_numel=max(zero.sub_group_size, 1)
        if "sub_group_size" in zero.model_fields_set
        else AUTO_SUB_GROUP_NUMEL,
    )


def scaler_of(config: Config) -> LossScaler | DynamicLossScaler | None:
    """The loss scaler of an fp16 run; None at other precisions."""
    fp16 = config.fp16
    if not fp16.enabled:
        return None
    return get_loss_scaler(
        torch.float16,
        static_loss_scale=fp16.loss_scale,
        dynamic_scaling=fp16.loss_scale == 0,
        dynamic_loss_args={
            "init_scale": 2.0**fp16.initial_scale_power,
            "scale_window": fp16.loss_scale_window,
            "min_scale": fp16.min_loss_scale,
            "delayed_shift": fp16.hysteresis,
            "consecutive_hysteresis": fp16.consecutive_hysteresis,
            "on_min_scale": fp16.on_min_scale,
        },
    )


def shard_model(
    module: torch.nn.Module,
    group: Group,
    device: torch.device,
    config: Config,
    dtypes: Dtypes,
    parts: Replication | None = None,
) -> ShardedModel | None:
    """At stage 3, make the module's parameters shards; None at the other stages."""
    zero = config.zero_optimization
    if zero.stage != 3:
        sharded = next((name for name, param in module.named_parameters() if is_sharded(param)), None)
        if sharded is not None:
            raise ConfigError(
                f"the model was built under zero.Init (or trained at stage 3): '{sharded}' is shards",
                expected="config key zero_optimization.stage 3",
                found=zero.stage,
                fix="use stage 3, or call zero.unshard_module(model) first",
            )
        return None
    given = zero.model_fields_set

    def chosen(key: str) -> int | None:
        """A budget that the user gave; None leaves it to the model's size."""
        return getattr(zero, key) if key in given else None

    sharding = Sharding(
        prefetch_bucket_size=chosen("stage3_prefetch_bucket_size"),
        max_live_parameters=chosen("stage3_max_live_parameters"),
        max_reuse_distance=chosen("stage3_max_reuse_distance"),
        param_persistence_threshold=zero.stage3_param_persistence_threshold,
        model_persistence_threshold=zero.stage3_model_persistence_threshold,
        apply_sees_whole=zero.override_module_apply,
    )
    leaves = leaf_modules(module, zero.leaf_module)
    return ShardedModel(module, group, sharding, device, dtypes.tensors, leaves, parts)


def check_offload(module: torch.nn.Module, group: Group, config: Config, dtypes: Dtypes) -> None:
    """Raise OffloadError unless the folders that the config names are there and have room for the state."""
    policy = policy_of(config)
    numels: Counter[torch.dtype] = Counter()
    for param in module.parameters():
        numels[dtypes.of(param)] += int(getattr(param, "ds_numel", param.numel()))
    size = policy.stage == 3 and shard_size(config.zero_optimization)
    check_folders(policy, numels, size or group.size)


def make_optimizer(
    given: torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None,
    params: Params | None,
    module: torch.nn.Module,
    config: Config,
    device: torch.device,
) -> torch.optim.Optimizer | None:
    """The torch optimizer: the given one in place, one from a callable, one from the config, or None.

    Raises ConfigError or UnsupportedOptimizerError when it cannot be built, or cannot step on shards.
    """
    if given is None and config.optimizer.type is None:
        return None
    wanted = list(module.parameters()) if params is None else list(params)
    if isinstance(given, torch.optim.Optimizer):
        optimizer = given
    elif callable(given):
        optimizer = given(wanted)
    elif given is None:
        step_on = (
            torch.device("cpu") if config.zero_optimization.offload_optimizer.device != "none" else device
        )
        if not wanted:
            return None
        optimizer = build_optimizer(str(config.optimizer.type), config.optimizer.params, wanted, step_on)
    else:
        raise ConfigError(
            "initialize: optimizer",
            expected="a torch.optim.Optimizer or a callable that takes the parameters",
            found=type(given).__name__,
            fix="pass one of these, or name an optimizer in the config",
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            "initialize: optimizer returned, when it was called, no optimizer",
            expected="a torch.optim.Optimizer",
            found=type(optimizer).__name__,
            fix="return one from the callable",
        )
    check_params(optimizer, module)
    kind = require_shardable(optimizer, config.zero_optimization.stage, config.zero_allow_untested_optimizer)
    if kind != "elementwise" and policy_of(config).optimizer_place is Place.FILE:
        raise UnsupportedOptimizerError(
            f"{type(optimizer).__name__} cannot step piece by piece on files",
            expected="an elementwise optimizer (AdamW, SGD, Lion, ...)",
            fix="set zero_optimization.offload_optimizer.device to 'cpu', or use such an optimizer",
        )
    if isinstance(optimizer, Communicates):
        optimizer.check_stage(config.zero_optimization.stage)
        tie_plans: Any = getattr(module, "tie_plans", list)
        ties = tie_plans()
        optimizer.check_ties([plan.key for plan, _, _ in ties if len(plan.ranks) > 1])
        schedule = config.scheduler.params or {}
        optimizer.check_run(schedule.get("total_num_steps"), schedule.get("warmup_num_steps"))
    return optimizer


def make_scheduler(given: Any, optimizer: torch.optim.Optimizer | None, config: Config) -> Any:
    """The schedule: the given one, one from a callable of the torch optimizer, one from the config, or None."""
    if optimizer is None:
        return None
    if given is not None:
        is_factory = isinstance(given, type) or (callable(given) and not hasattr(given, "step"))
        return given(optimizer) if is_factory else given
    if config.scheduler.type is None:
        return None
    return lr_schedules.build(config.scheduler.type, optimizer, config.scheduler.params)


def digest(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer | None, config: Config
) -> dict[str, str]:
    """What all ranks must agree on before the first step, most telling first."""
    items = {f"config key {key}": str(value) for key, value in config.settings().items()}
    names = {}
    for index, (name, param) in enumerate(module.named_parameters()):
        names[param] = name
        shape = tuple(getattr(param, "ds_shape", param.shape))
        items[f"parameter {index}"] = f"{name} {shape} {param.dtype} requires_grad={param.requires_grad}"
    for index, (name, buffer) in enumerate(module.named_buffers()):
        items[f"buffer {index}"] = f"{name} {tuple(buffer.shape)} {buffer.dtype}"
    zero = config.zero_optimization
    leaves = set(leaf_modules(module, zero.leaf_module)) if zero.stage == 3 else set()
    for name, child in module.named_modules():
        if child in leaves:
            items[f"whether module '{name}' is marked with set_z3_leaf_modules"] = "yes"
    if optimizer is not None:
        items["optimizer"] = type(optimizer).__name__
        for index, group in enumerate(optimizer.param_groups):
            plain = {k: v for k, v in group.items() if isinstance(v, int | float | str | tuple)}
            items[f"param group {index}"] = ", ".join(names[param] for param in group["params"])
            items[f"settings of param group {index}"] = str(plain)
    return items


def check_params(optimizer: torch.optim.Optimizer, module: torch.nn.Module) -> None:
    """Raise UsageError unless every parameter is the module's, of a dtype that trains, and no other engine's."""
    names = {param: name for name, param in module.named_parameters()}
    for index, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            where = f"param group {index} of the optimizer"
            if param not in names:
                raise UsageError(
                    f"{where} holds a parameter of shape {tuple(param.shape)} that the model does not have. "
                    "Fix: build the optimizer from this model's parameters()"
                )
            if is_trained(param):
                raise UsageError(
                    f"{where} holds '{names[param]}', which another engine trains. Fix: call destroy() on that "
                    "engine first, or give each engine parameters of its own"
                )
            if param.requires_grad and not param.is_floating_point():
                raise UsageError(
                    f"{where} holds '{names[param]}' of {param.dtype}; expected a floating-point dtype. "
                    "Fix: leave it out, or store it as two real tensors if it is complex"
                )
