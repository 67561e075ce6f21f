"""Builds an engine's parts from what a user gave and the configuration; ``build`` is the list of steps."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from zeropipe.comm.agreement import agree
from zeropipe.comm.group import SELF, Group, with_words, world
from zeropipe.comm.host.choosing import VARIABLE, choose_transport, way_asked
from zeropipe.config.batch import batch_of, check_world
from zeropipe.config.schema import Config
from zeropipe.errors import ConfigError, UnsupportedOptimizerError, UsageError
from zeropipe.given import DataLike, Mesh, Mpu, Namespace, OptimizerLike, ParametersLike, ScheduleLike
from zeropipe.layout.slots import Sharing
from zeropipe.runtime import lr_schedules
from zeropipe.runtime.data_pipeline.sampler import SampledLoader, sampled_loader
from zeropipe.runtime.dataloader import ZeroDataLoader
from zeropipe.runtime.engine.dtypes import (
    Dtypes,
    MixedInputs,
    decide_dtypes,
    dtype_of,
    place_module,
    refuse_shared_memory,
)
from zeropipe.runtime.engine.parts import Clock, Parts
from zeropipe.runtime.engine.placement import (
    Samples,
    check_slots,
    data_parallel_group,
    divided_sequences,
    model_parts,
    pick_device,
    replication,
    samples_of,
    synchronize_module,
)
from zeropipe.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler, get_loss_scaler
from zeropipe.runtime.optimizers.registry import build_optimizer, require_shardable
from zeropipe.runtime.optimizers.shard_view import Communicates
from zeropipe.runtime.pipe.module import PipelineModule
from zeropipe.runtime.sequence_parallel.place import take
from zeropipe.runtime.zero.gather.hooks import ParameterOffload
from zeropipe.runtime.zero.gather.sharded_model import ShardedModel
from zeropipe.runtime.zero.hold.offload import Offload, check_folders
from zeropipe.runtime.zero.hold.optimizer import ZeroOptimizer
from zeropipe.runtime.zero.hold.policy import (
    AUTO_BUCKET_NUMEL,
    AUTO_SUB_GROUP_NUMEL,
    Place,
    Policy,
    StepOptions,
)
from zeropipe.runtime.zero.marks import leaf_modules
from zeropipe.runtime.zero.param import is_sharded, is_trained
from zeropipe.runtime.zero.replication import shard_size

_log = logging.getLogger("zeropipe")
_OUTCOME = "the outcome of initialize"


def build(
    model: torch.nn.Module,
    config: Config,
    *,
    optimizer: OptimizerLike = None,
    model_parameters: ParametersLike = None,
    training_data: DataLike = None,
    lr_scheduler: ScheduleLike = None,
    mpu: Mpu = None,
    mesh: Mesh = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    args: Namespace = None,
) -> Parts:
    """The parts of an engine, of what a user gave ``initialize``; collective over all ranks."""
    stages = SELF
    if isinstance(model, PipelineModule):
        mpu, stages = model.mpu(), model.grid.pipe_group
    mpu, mesh = divided_sequences(mpu, mesh, config)
    group = data_parallel_group(mpu, mesh)
    samples = samples_of(group, mpu)
    for notice in config.notices if group.ranks[group.rank] == 0 else ():
        _log.log(notice.level, notice.text)

    # [1] Each rank by itself, and whatever one cannot do is told to the others before they wait for it.
    with shared_fate(group):
        device = pick_device(args)
        model_group, counts = model_parts(model, mpu)
        check_slots(config, model, group.size, samples.size, mesh)
        check_world(config, group.size)
        clock = Clock(batch_of(config, samples.size), config.managed_gradient_accumulation)
        dtypes = decide_dtypes(model, device, config, model_group)
        refuse_shared_memory(model)
        place_module(model, device, dtypes, cut_later=config.zero_optimization.stage == 3)
        policy = policy_of(config, group.size, isinstance(model, PipelineModule))
        base = make_optimizer(optimizer, model, model_parameters, config, policy, device)
        schedule = make_scheduler(lr_scheduler, base, config)
        check_room(model, group, config, policy, dtypes)
        given = training_data, config, clock, samples, collate_fn, policy.sharing
        loader = None if training_data is None else make_loader(*given)
        items = {f"the environment variable {VARIABLE}": way_asked(), **digest(model, base, config)}

    # [2] All ranks mean the same model and settings. From here on they do the same things in the same order.
    agree({_OUTCOME: "prepared", **items}, group)
    choose_transport(stages, agreed=group)
    if samples.size < group.size:
        take(mpu, model)

    # [3] Shards first: the optimizer takes the parameters as they are from then on.
    sharded = shard_model(model, group, mesh, device, config, dtypes)
    zero: ZeroOptimizer | None = None
    if base is not None:
        options = StepOptions(
            clip=config.gradient_clipping,
            scaler=scaler_of(config),
            skip_nonfinite=config.bf16.enabled and config.bf16.check_grad_overflow,
            exact=policy.sharing is not None,
            refuse_unused=not config.zero_optimization.ignore_unused_parameters,
            model_group=model_group,
            counts=counts,
            replicas=SELF if sharded is None else sharded.parts.replicas,
        )
        names = {param: name for name, param in model.named_parameters()}
        zero = ZeroOptimizer(
            base, names, group, policy, options, lambda: clock.is_boundary, lambda: clock.micro_steps
        )
    if sharded is not None:
        # The two wings meet here: gathers go in one order with reductions, and read where masters live.
        if zero is not None:
            sharded.conduct(zero.reducer)
            zero.show_hooks(ParameterOffload(sharded.hooks))
        sharded.place(Offload(policy) if zero is None else zero.offload)

    # [4] What neither shards nor masters have brought from rank 0 comes now.
    synchronize_module(model, group)
    return Parts(
        model,
        config,
        clock,
        group,
        device,
        mpu=mpu,
        samples=samples,
        collate_fn=collate_fn,
        stages=stages,
        optimizer=zero,
        sharded=sharded,
        mixed=MixedInputs(model) if dtypes.mixed else None,
        lr_scheduler=schedule,
        training_dataloader=loader,
    )


@contextmanager
def shared_fate(group: Group | None) -> Iterator[None]:
    """A rank that fails alone in here tells the others. ``group`` None: the world, if it has been started."""
    # They would wait for it in their next collective, which is ``agree``: there they read its error in its place.
    try:
        yield
    except Exception as error:
        with suppress(Exception):  # the error to raise is the first, also where nobody can be told
            agree({_OUTCOME: f"{type(error).__name__}: {error}"}, group or with_words(world()))
        raise


def policy_of(config: Config, ranks: int, in_batches: bool) -> Policy:
    """What the stage shards, and where it lives; ``in_batches``: a step is one call, which reduces once."""
    zero, slots = config.zero_optimization, config.reproducible.slots
    in_turn = zero.stage >= 2 and ranks > 1 and not in_batches
    bucket, sub_group = zero.chosen("reduce_bucket_size"), zero.chosen("sub_group_size")
    return Policy(
        stage=zero.stage,
        bucket_numel=AUTO_BUCKET_NUMEL if bucket is None else bucket,
        publish_numel=min(zero.allgather_bucket_size, AUTO_BUCKET_NUMEL),
        overlap_comm=zero.overlap_comm,
        accumulate_dtype=dtype_of(config.data_types.grad_accum_dtype),
        narrow_masters=config.bf16.enabled and config.bf16.bf16_master_weights_and_grads,
        narrow_state=config.bf16.enabled and config.bf16.bf16_optimizer_states,
        scales_loss=config.fp16.enabled and config.fp16.loss_scale != 1,
        reduce_dtype=dtype_of(config.communication_data_type),
        optimizer_place=Place(zero.offload_optimizer.device if zero.stage > 0 else "none"),
        param_place=Place(zero.offload_param.device if zero.stage == 3 else "none"),
        optimizer_folder=zero.offload_optimizer.nvme_path or "",
        param_folder=zero.offload_param.nvme_path or "",
        pin_memory=zero.offload_optimizer.pin_memory and zero.offload_param.pin_memory,
        sub_group_numel=AUTO_SUB_GROUP_NUMEL if sub_group is None else max(sub_group, 1),
        sharing=None if slots is None else Sharing(slots, ranks, in_turn),
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
    mesh: Mesh,
    device: torch.device,
    config: Config,
    dtypes: Dtypes,
) -> ShardedModel | None:
    """At stage 3, make the module's parameters shards; None at the other stages. Collective."""
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
    parts = replication(zero, group, mesh)
    return ShardedModel(module, group, zero, device, dtypes.tensors, parts)


def check_room(module: torch.nn.Module, group: Group, config: Config, policy: Policy, dtypes: Dtypes) -> None:
    """Raise OffloadError unless the folders that the config names are there and have room for the state."""
    # Before anything is cut: a disk that fills up in the middle of it leaves a model in pieces.
    numels: Counter[torch.dtype] = Counter()
    for param in module.parameters():
        numels[dtypes.of(param)] += int(getattr(param, "ds_numel", param.numel()))
    size = policy.stage == 3 and shard_size(config.zero_optimization)
    check_folders(policy, numels, size or group.size)


def make_optimizer(
    asked: OptimizerLike,
    module: torch.nn.Module,
    parameters: ParametersLike,
    config: Config,
    policy: Policy,
    device: torch.device,
) -> torch.optim.Optimizer | None:
    """The torch optimizer: the given one in place, one from a callable, one from the config, or None.

    Raises ConfigError or UnsupportedOptimizerError when it cannot be built, or cannot step on shards.
    """
    zero, named = config.zero_optimization, config.optimizer.type
    if asked is None and named is None:
        return None
    params = list(module.parameters() if parameters is None else parameters)
    optimizer: Any = asked
    if named is not None and asked is None:
        if not params:
            return None
        step_on = torch.device("cpu") if zero.offload_optimizer.device != "none" else device
        optimizer = build_optimizer(named, config.optimizer.params, params, step_on)
    elif callable(asked) and not isinstance(asked, torch.optim.Optimizer):
        optimizer = asked(params)
    if not isinstance(optimizer, torch.optim.Optimizer):
        what, expected = "initialize: optimizer", "a torch.optim.Optimizer"
        # What was given is no optimizer, or what it gave when it was called.
        if callable(asked):
            what, fix = f"{what} returned, when it was called, no optimizer", "return one from the callable"
        else:
            expected += " or a callable that takes the parameters"
            fix = "pass one of these, or name an optimizer in the config"
        raise ConfigError(what, expected=expected, found=type(optimizer).__name__, fix=fix)
    check_params(optimizer, module)
    untested = config.zero_allow_untested_optimizer
    kind = require_shardable(optimizer, zero.stage, untested, policy.sharing is not None)
    # A step from files reads runs of elements, and a norm over a tensor is not to be had from runs.
    if kind != "elementwise" and policy.optimizer_place is Place.FILE:
        raise UnsupportedOptimizerError(
            f"{type(optimizer).__name__} cannot step piece by piece on files",
            expected="an elementwise optimizer (AdamW, SGD, Lion, ...)",
            fix="set zero_optimization.offload_optimizer.device to 'cpu', or use such an optimizer",
        )
    if kind != "elementwise" and (policy.narrow_masters or policy.narrow_state):
        raise UnsupportedOptimizerError(
            f"{type(optimizer).__name__} cannot keep its state or its masters in bf16",
            expected="an elementwise optimizer (AdamW, SGD, Lion, ...), which is stepped in fp32 piece by piece",
            fix="remove bf16.bf16_optimizer_states and bf16.bf16_master_weights_and_grads, or use such an optimizer",
        )
    if isinstance(optimizer, Communicates):
        optimizer.check_stage(zero.stage)
        tie_plans: Any = getattr(module, "tie_plans", list)
        optimizer.check_ties([plan.key for plan in tie_plans() if plan.crosses])
        schedule = config.scheduler.params or {}
        optimizer.check_run(schedule.get("total_num_steps"), schedule.get("warmup_num_steps"))
    return optimizer


def make_loader(
    data: DataLike,
    config: Config,
    clock: Clock,
    samples: Samples,
    collate_fn: Callable[[list[Any]], Any] | None,
    sharing: Sharing | None,
) -> ZeroDataLoader | SampledLoader:
    """This rank's micro-batches of the training data: in a random order, or as the section data_efficiency says."""
    batch, efficiency = clock.batch, config.data_efficiency
    if not efficiency.chooses_samples:
        return ZeroDataLoader(
            data,
            batch.micro_batch_size,
            samples.rank,
            samples.size,
            collate_fn,
            drop_last=config.dataloader_drop_last,
            sharing=sharing,
        )
    return sampled_loader(
        data,
        efficiency,
        batch.micro_batch_size,
        batch.gradient_accumulation_steps,
        (samples.rank, samples.size),
        collate_fn,
    )


def make_scheduler(given: ScheduleLike, optimizer: torch.optim.Optimizer | None, config: Config) -> Any:
    """The schedule: the given one, one from a callable of the torch optimizer, one from the config, or None."""
    if optimizer is None:
        return None
    if given is not None:
        # A schedule may be callable itself; a class has ``step`` too, and is not one yet.
        is_factory = isinstance(given, type) or (callable(given) and not hasattr(given, "step"))
        return given(optimizer) if is_factory else given
    if config.scheduler.type is None:
        return None
    return lr_schedules.build(config.scheduler.type, optimizer, config.scheduler.params)


def digest(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer | None, config: Config
) -> dict[str, str]:
    """What all ranks must agree on before the first step, most telling first."""
    # The first difference is the one that is told, so what explains the others comes before them.
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
            # Tensors and hooks among the settings have no text that two ranks share.
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
