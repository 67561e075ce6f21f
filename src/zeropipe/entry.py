"""``initialize`` and ``add_config_arguments``: from what a user has to an engine."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from zeropipe.comm.group import init_distributed
from zeropipe.config.parse import Source, only_one, parse_config
from zeropipe.config.schema import Config
from zeropipe.errors import ConfigError
from zeropipe.given import (
    DataLike,
    Mesh,
    Mpu,
    Namespace,
    OptimizerLike,
    ParametersLike,
    ScheduleLike,
)
from zeropipe.runtime.engine.build import build, shared_fate
from zeropipe.runtime.engine.engine import DeepSpeedEngine
from zeropipe.runtime.pipe.engine import PipelineEngine
from zeropipe.runtime.pipe.module import PipelineModule
from zeropipe.runtime.utils import collecting_later
from zeropipe.runtime.zero.hold.optimizer import ZeroOptimizer


class Overseer:
    """Who stands behind a program that does not know of it: its configuration and its engines pass through here.

    Engines belong to the process that runs the program, and so does this.
    """

    def __init__(self) -> None:
        self._config: Source | Config = None
        self._told: Callable[[DeepSpeedEngine], None] | None = None

    @contextmanager
    def at_work(self, config: Source | Config, told: Callable[[DeepSpeedEngine], None]) -> Iterator[None]:
        """Inside, ``config`` (unless None) replaces what ``initialize`` is given, and ``told`` gets each engine."""
        self._config, self._told = config, told
        try:
            yield
        finally:
            self._config = self._told = None

    def chosen(self, given: Source | Config) -> Source | Config:
        return given if self._config is None else self._config

    def made(self, engine: DeepSpeedEngine) -> None:
        if self._told is not None:
            self._told(engine)


OVERSEER = Overseer()


@collecting_later()
def initialize(
    args: Namespace = None,
    model: torch.nn.Module | None = None,
    optimizer: OptimizerLike = None,
    model_parameters: ParametersLike = None,
    training_data: DataLike = None,
    lr_scheduler: ScheduleLike = None,
    distributed_port: int | None = None,
    mpu: Mpu = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: Source | Config = None,
    mesh_param: Mesh = None,
    config_params: Source | Config = None,
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
        mesh_param: a device mesh with an axis ``data_parallel``, and ``sequence_parallel`` where ranks share
            sequences; or with two whose names end in ``replicate`` and ``shard``: at stage 3, shards within the
            latter and replicas across the former (MiCS, HSDP). Or a pair: how many different samples, how many ranks
            to a sequence.

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
    # A path that only one rank can read would leave the others waiting for it.
    with shared_fate(group=None):
        named = getattr(args, "deepspeed_config", None)
        given = {"config": config, "config_params": config_params, "args.deepspeed_config": named}
        parsed = parse_config(OVERSEER.chosen(only_one(given)))
    init_distributed(distributed_port=distributed_port, dist_init_required=dist_init_required)
    parts = build(
        model,
        parsed,
        optimizer=optimizer,
        model_parameters=model_parameters,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        mpu=mpu,
        mesh=mesh_param,
        collate_fn=collate_fn,
        args=args,
    )
    # The model says which engine: one forward and backward at a time, or a schedule of them.
    engine = (PipelineEngine if isinstance(model, PipelineModule) else DeepSpeedEngine)(parts)
    OVERSEER.made(engine)
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def add_config_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add ``--deepspeed`` and ``--deepspeed_config FILE`` to ``parser``, as scripts expect them."""
    group = parser.add_argument_group("zeropipe", "configuration of the training engine")
    group.add_argument(
        "--deepspeed", default=False, action="store_true", help="use the engine (for the script)"
    )
    group.add_argument("--deepspeed_config", default=None, type=str, help="the engine's JSON configuration")
    return parser
