"""``initialize`` and ``add_config_arguments``: from what a user has to an engine."""

from __future__ import annotations

import logging
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from zeropipe.comm.agreement import agree
from zeropipe.comm.group import SELF, Group, world
from zeropipe.comm.group import init_distributed
from zeropipe.config.batch import solve_batch
from zeropipe.config.checks import check_world
from zeropipe.config.parse import parse_config
from zeropipe.errors import ConfigError
from zeropipe.runtime.engine import build as assembly
from zeropipe.runtime.engine import placement
from zeropipe.runtime.engine.clock import Clock
from zeropipe.runtime.engine.engine import DeepSpeedEngine
from zeropipe.runtime.engine.mixed_inputs import MixedInputs
from zeropipe.runtime.engine.parts import Parts
from zeropipe.runtime.pipe.engine import PipelineEngine
from zeropipe.runtime.pipe.module import PipelineModule
from zeropipe.runtime.utils import collecting_later
from zeropipe.runtime.zero.gather.hooks import ParameterOffload
from zeropipe.runtime.zero.hold.offload import Offload
from zeropipe.runtime.zero.hold.optimizer import ZeroOptimizer
from zeropipe.runtime.zero.hold.policy import StepOptions

_log = logging.getLogger("zeropipe")
_OUTCOME = "the outcome of initialize"


@collecting_later()
def initialize(
    args: Any = None,
    model: torch.nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int | None = None,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[DeepSpeedEngine, ZeroOptimizer | None, Any, Any]:
    """Make an engine of ``model``; collective over all ranks.

    Args:
        args: a namespace; ``deepspeed_config`` names the config file, ``local_rank`` the device.
        model: trained in place; it is moved to this rank's device and cast to the config's precision.
        optimizer: a torch optimizer (used in place: its param-group dicts stay the same objects), a callable
            that takes the parameters, or None to take the config's.
        model_parameters: parameters or param-group dicts (any iterable) for an optimizer built here; default
            all of the model's.
        training_data: a dataset; returned as a loader of this rank's share.
        lr_scheduler: a schedule, a callable that takes the torch optimizer, or None to take the config's.
        mpu: an object with ``get_data_parallel_group()`` for runs with model parallelism.
        dist_init_required: False leaves ``torch.distributed`` alone.
        collate_fn: for the loader.
        config, config_params: dict, path, JSON or base64 text (two names for one thing).
        mesh_param: a device mesh with an axis ``data_parallel``, or with two whose names end in ``replicate``
            and ``shard``: at stage 3, shards within the latter and replicas across the former (MiCS, HSDP).

    Returns:
        ``(engine, engine.optimizer, dataloader, lr_scheduler)``; those that do not apply are None.

    Raises:
        ConfigError: a wrong config; UnsupportedOptimizerError: an optimizer that cannot step on shards;
        DesyncError: ranks differ in config or model.
    """
    if not isinstance(model, torch.nn.Module):
        found = "nothing" if model is None else type(model).__name__
        raise ConfigError(
            "initialize: model", expected="a torch.nn.Module", found=found, fix="pass model=your module"
        )
    with _shared_fate(group=None):
        parsed = parse_config(_find_config(args, config, config_params))
    init_distributed(distributed_port=distributed_port, dist_init_required=dist_init_required)
    if isinstance(model, PipelineModule):
        mpu = model.mpu()
    group = assembly.data_parallel_group(mpu, mesh_param)
    if group.ranks[group.rank] == 0:
        for notice in parsed.notices:
            _log.log(notice.level, notice.text)
    with _shared_fate(group):
        check_world(parsed, group.size)
        batch = solve_batch(
            parsed.train_batch_size,
            parsed.train_micro_batch_size_per_gpu,
            parsed.gradient_accumulation_steps,
            group.size,
        )
        clock = Clock(batch)
        device = assembly.pick_device(args)
        model_group, counts = assembly.model_parts(model, mpu)
        dtypes = placement.decide_dtypes(model, device, parsed, model_group)
        placement.refuse_shared_memory(model)
        placement.place_module(model, device, dtypes)
        base = assembly.make_optimizer(optimizer, model_parameters, model, parsed, device)
        schedule = assembly.make_scheduler(lr_scheduler, base, parsed)
        assembly.check_offload(model, group, parsed, dtypes)
        items = assembly.digest(model, base, parsed)
    agree({_OUTCOME: "prepared", **items}, group)
    parts = assembly.replication(parsed, group, mesh_param)
    sharded = assembly.shard_model(model, group, device, parsed, dtypes, parts)
    wrapped = None
    if base is not None:
        options = StepOptions(
            clip=parsed.gradient_clipping,
            scaler=assembly.scaler_of(parsed),
            skip_nonfinite=parsed.bf16.enabled and parsed.bf16.check_grad_overflow,
            refuse_unused=not parsed.zero_optimization.ignore_unused_parameters,
            model_group=model_group,
            counts=counts,
            replicas=parts.replicas,
        )
        wrapped = ZeroOptimizer(
            base,
            {param: name for name, param in model.named_parameters()},
            group,
            assembly.policy_of(parsed),
            options,
            is_boundary=lambda: clock.is_boundary,
            micro_step=lambda: clock.micro_steps,
        )
        if sharded is not None:
            sharded.conduct(wrapped.reducer)
            wrapped.parameter_offload = ParameterOffload(sharded.hooks)
    if sharded is not None:
        sharded.place(Offload(assembly.policy_of(parsed)) if wrapped is None else wrapped.offload)
    placement.synchronize_module(model, group)
    mixed = MixedInputs(model) if dtypes.mixed else None
    kind = PipelineEngine if isinstance(model, PipelineModule) else DeepSpeedEngine
    stages = model.grid.pipe_group if isinstance(model, PipelineModule) else SELF
    engine = kind(
        Parts(model, parsed, clock, group, device, mpu, collate_fn, stages, wrapped, sharded, mixed, schedule)
    )
    if training_data is not None:
        engine.training_dataloader = engine.deepspeed_io(training_data)
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


@contextmanager
def _shared_fate(group: Group | None) -> Iterator[None]:
    """A rank that fails alone in here tells the others, which would wait for it in their next collective.

    ``group`` None: the world, if it has been started.
    """
    try:
        yield
    except Exception as error:
        with suppress(Exception):
            agree({_OUTCOME: f"{type(error).__name__}: {error}"}, group or world())
        raise


def add_config_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add ``--deepspeed`` and ``--deepspeed_config FILE`` to ``parser``, as scripts expect them."""
    group = parser.add_argument_group("zeropipe", "configuration of the training engine")
    group.add_argument(
        "--deepspeed", default=False, action="store_true", help="use the engine (for the script)"
    )
    group.add_argument("--deepspeed_config", default=None, type=str, help="the engine's JSON configuration")
    return parser


def _find_config(args: Any, config: Any, config_params: Any) -> Any:
    """The one configuration given; raises ConfigError for none or for several."""
    from_args = getattr(args, "deepspeed_config", None)
    given = {
        name: value
        for name, value in (
            ("config", config),
            ("config_params", config_params),
            ("args.deepspeed_config", from_args),
        )
        if value is not None
    }
    if len(given) > 1 and any(value is not config for value in given.values()):
        raise ConfigError(
            f"initialize: configuration given twice, as {' and '.join(given)}. Fix: give one of them"
        )
    if not given:
        raise ConfigError("initialize: no configuration. Fix: pass config= a dict or the path of a JSON file")
    return next(iter(given.values()))
