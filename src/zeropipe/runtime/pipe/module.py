"""A model as a list of layers, of which each rank builds those of its own stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from functools import partial, reduce
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from zeropipe.comm.collectives import broadcast, broadcast_object
from zeropipe.comm.group import Group, init_distributed, world
from zeropipe.config.schema import Pipeline
from zeropipe.errors import ConfigError, UsageError
from zeropipe.given import Tree
from zeropipe.runtime.pipe.layers import Bounds, Function, LayerLike, bind, build, key_of, partition, weigh
from zeropipe.runtime.pipe.layers import LayerSpec as LayerSpec
from zeropipe.runtime.pipe.layers import TiedLayerSpec as TiedLayerSpec  # users know it under this path
from zeropipe.runtime.pipe.schedule import find_kind
from zeropipe.runtime.pipe.tied import Tie, TiePlan, make_ties, plan_ties, sum_gradients
from zeropipe.runtime.pipe.topology import PipeDataParallelTopology, PipelineParallelGrid, ProcessTopology

Within = Callable[[int], AbstractContextManager[None]]  # of a layer: what it runs in


class PipelineModule(nn.Module):
    """Layers, one after the other, cut into the stages of a pipeline; collective over the world.

    Args:
        layers: modules, callables or `LayerSpec`, each taking what the one before returns (a tuple counts as one
            argument). Specs are built only where they run.
        num_stages: pipeline ranks. ``topology`` gives them together with the other axes instead.
        loss_fn: ``loss_fn(output, labels)`` on the last stage; None if the last layer returns the loss.
        seed_layers, base_seed: build layer i under the seed ``base_seed + i``, so that weights do not depend on the
            cut; ``seed_fn(seed)`` replaces ``torch.manual_seed``.
        partition_method: ``uniform``, ``parameters``, ``type:REGEX``, ``memory``, ``profile``, or bounds.
        activation_checkpoint_interval: recompute every so many layers in backward; 0 for none.
        activation_checkpoint_func: ``func(run, input)``; default torch's, with the random state replayed.
        checkpointable_layers: names of the classes to recompute; default every module with parameters.
        dynamic_shape: shapes may change from one micro-batch to the next.
        schedule, num_chunks: the schedule by name, where it decides which layers a rank holds (several stages a
            rank); the configuration may still choose another one that cuts the model alike.
        sample_input: what the first layer takes, for ``memory`` and ``profile``.

    Raises:
        ConfigError: fewer layers than stages, a topology that does not fit, or an unknown method.
    """

    def __init__(
        self,
        layers: Sequence[LayerLike],
        num_stages: int | None = None,
        topology: ProcessTopology | None = None,
        loss_fn: Callable[..., Any] | None = None,
        seed_layers: bool = False,
        seed_fn: Callable[[int], Any] | None = None,
        base_seed: int = 1234,
        partition_method: str | Sequence[int] = "parameters",
        activation_checkpoint_interval: int = 0,
        activation_checkpoint_func: Callable[..., Any] | None = None,
        checkpointable_layers: Sequence[str] | None = None,
        dynamic_shape: bool = False,
        schedule: str | None = None,
        num_chunks: int | None = None,
        sample_input: Tree = None,
    ) -> None:
        super().__init__()
        init_distributed()  # adopts a world that is there
        self._grid = PipelineParallelGrid(_topology(num_stages, topology))
        self.loss_fn = loss_fn
        self.dynamic_shape = dynamic_shape

        # How a layer is built and run.
        self.seed_layers, self.base_seed, self._seed_fn = seed_layers, base_seed, seed_fn or torch.manual_seed
        self.activation_checkpoint_interval = activation_checkpoint_interval
        self.activation_checkpoint_func = activation_checkpoint_func or _recompute
        self.checkpointable_layers = None if checkpointable_layers is None else list(checkpointable_layers)

        # Which layer is where; the same on all ranks.
        kind = find_kind(schedule or "1f1b")
        self.schedule = schedule
        self.num_chunks = kind.default_chunks if num_chunks is None else num_chunks
        self.placement = kind.placement
        self.num_stages = self._grid.pipe_parallel_size  # pipeline ranks, as users of this name count
        for index, layer in enumerate(layers):
            if not callable(layer) and not isinstance(layer, LayerSpec):
                raise UsageError(
                    f"layer {index} cannot be run",
                    expected="a torch.nn.Module, a LayerSpec or a callable",
                    found=type(layer).__name__,
                )
        facts = partial(weigh, layers, partition_method, sample_input)
        owners = [self.placement.rank(stage, self.num_stages) for stage in range(self.total_stages)]
        self.bounds: Bounds = partition(partition_method, len(layers), owners, facts)

        # The list that the user gave, and what this rank has built of it, by the number of the layer.
        self._given: list[Any] = list(layers)
        self._built: dict[int, nn.Module | None] = {}
        self._calls: dict[int, Callable[[Any], Any]] = {}
        # By key; registered under the number of the key's first layer, the same name on every rank that has it.
        self.tied_modules: dict[str, nn.Module] = {}
        for index in sorted(self.local_layers()):
            self._build(index)

        # Ties: planned alike on all ranks, from the modules themselves, of which only the form is kept elsewhere.
        self._tie_plans = plan_ties(
            self._given, self.tied_modules, self._grid.pipe_group, self.stage_of, self.rank_of
        )
        for index in set(range(len(self._given))) - set(self._calls):
            if isinstance(self._given[index], nn.Module):
                self._given[index] = deepcopy(self._given[index]).to("meta")
        self.ties: list[Tie] = make_ties(self._tie_plans, self._built, self._grid)

    def _build(self, index: int) -> None:
        """Build layer ``index`` and register it: under its number, a tied one under that of its first use."""
        # The seed goes by the first use too, so that a tied module has the same weights wherever it is built.
        layer, key, first = self._given[index], key_of(self._given[index]), index
        if key is not None and key in self.tied_modules:
            module: nn.Module | None = self.tied_modules[key]
        else:
            if key is not None:
                first = next(i for i, other in enumerate(self._given) if key_of(other) == key)
            if self.seed_layers and isinstance(layer, LayerSpec):
                self._seed_fn(self.base_seed + first)
            module = build(layer)
            if module is not None:
                self.add_module(str(first), module)
                if key is not None:
                    self.tied_modules[key] = module
        self._built[index], self._calls[index] = module, bind(layer, module)

    # Which layers are where.

    @property
    def total_stages(self) -> int:
        """Stages of the model: pipeline ranks x chunks."""
        return self.num_stages * self.num_chunks

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages of this rank, in model order."""
        ranks = range(self.num_chunks)
        return tuple(sorted(self.placement.stage(self._grid.stage_id, c, self.num_stages) for c in ranks))

    @property
    def num_layers(self) -> int:
        return self.bounds[-1]

    def stage_of(self, layer: int) -> int:
        """The stage that runs ``layer``."""
        return next(s for s, (first, last) in enumerate(pairwise(self.bounds)) if first <= layer < last)

    def rank_of(self, layer: int) -> int:
        """The pipeline rank that runs ``layer``."""
        return self.placement.rank(self.stage_of(layer), self.num_stages)

    def layers_of(self, stage: int) -> range:
        return range(self.bounds[stage], self.bounds[stage + 1])

    def local_layers(self) -> Iterator[int]:
        """The numbers of the layers that this rank runs, ascending."""
        for stage in self.stages:
            yield from self.layers_of(stage)

    def topology(self) -> ProcessTopology:
        return self._grid.topology()

    def mpu(self) -> PipelineParallelGrid:
        return self._grid

    @property
    def grid(self) -> PipelineParallelGrid:
        return self._grid

    def layer_list(self) -> list[Any]:
        """The layers as they were given."""
        return self._given

    def layer_module(self, layer: int) -> nn.Module | None:
        """The module of ``layer`` on this rank; None elsewhere and for plain functions."""
        return self._built.get(layer)

    def tie_plans(self) -> list[TiePlan]:
        """Every shared weight, the same on every rank."""
        return self._tie_plans

    def is_tied_copy(self, param: nn.Parameter) -> bool:
        """Whether another rank's copy of this tied weight is the one that counts."""
        return any(tie.param is param and not tie.owner for tie in self.ties)

    @property
    def recomputes(self) -> bool:
        return self.activation_checkpoint_interval > 0

    def pick_schedule(self, section: Pipeline) -> tuple[str, int]:
        """The schedule's name and chunks: the configuration's where it says, else the module's.

        Raises ConfigError where the configuration's schedule needs other layers on a rank than the module has built.
        """
        chosen = "schedule" in section.model_fields_set
        kind = find_kind(section.schedule if chosen else self.schedule or "1f1b")
        low, high = kind.chunks
        fits = kind.placement is self.placement or self.num_chunks == 1
        if not kind.trains or not fits or not low <= self.num_chunks <= high:
            wanted = kind.default_chunks
            raise ConfigError(
                f"config key pipeline.schedule: {kind.name!r} needs other stages on a rank than the module has",
                expected=f"a module built for {kind.name!r} ({wanted} stage(s) a rank)",
                found=f"{self.num_chunks} stage(s) a rank, built for {self.schedule or '1f1b'!r}",
                fix=f"PipelineModule(..., schedule={kind.name!r}), which decides which layers a rank builds",
            )
        for key, own, fix in (
            ("num_chunks", self.num_chunks, f"PipelineModule(..., num_chunks={section.num_chunks})"),
            ("stages", self.num_stages, "remove the key, or build PipelineModule with that many stages"),
        ):
            given = getattr(section, key)
            if key in section.model_fields_set and given not in (None, own):
                raise ConfigError(
                    f"config key pipeline.{key} differs from the module", expected=own, found=given, fix=fix
                )
        return kind.name, self.num_chunks

    # Running.

    def forward(self, inputs: Tree) -> Any:
        """Run all layers; only where this rank has them all."""
        if self.num_stages > 1:
            raise UsageError(
                "a PipelineModule on several ranks cannot be called",
                rank=self._grid.global_rank,
                fix="use engine.train_batch(data_iter) or engine.eval_batch(data_iter); "
                "module.to_sequential() gives the whole model on every rank",
            )
        for stage in range(self.total_stages):
            inputs = self.run_stage(stage, inputs)
        return inputs

    def run_stage(self, stage: int, value: Tree, within: Within | None = None) -> Any:
        """Run the layers of ``stage``, which must be this rank's, on ``value``; ``within``: makes what the layer of a
        number runs in, also when it is recomputed."""
        # Layers are recomputed in runs of the interval, counted from the stage's own first layer.
        numbers = self.layers_of(stage)
        step = self.activation_checkpoint_interval or len(numbers)
        for first in range(0, len(numbers), step):
            part = numbers[first : first + step]
            run = partial(reduce, partial(self._call, within), part)
            recompute = self.recomputes and torch.is_grad_enabled() and self._may_recompute(part)
            value = self.activation_checkpoint_func(run, value) if recompute else run(value)
        return value

    def _call(self, within: Within | None, value: Any, index: int) -> Any:
        if within is None:
            return self._calls[index](value)
        with within(index):
            return self._calls[index](value)

    def _may_recompute(self, numbers: Sequence[int]) -> bool:
        modules = [self._built[index] for index in numbers]
        if self.checkpointable_layers is not None:
            return all(type(m).__name__ in self.checkpointable_layers for m in modules)
        return any(m is not None and any(True for _ in m.parameters()) for m in modules)

    # To and from plain models.

    @classmethod
    def from_sequential(cls, model: nn.Sequential, **kwargs: Any) -> PipelineModule:
        """A pipeline of the children of ``model``; parameters that they share become tied weights."""
        return cls(list(model.children()), **kwargs)

    def to_sequential(self) -> nn.Module:
        """The whole model on every rank, a plain `nn.Sequential` with the current weights; collective.

        Tied weights are one parameter again.
        """
        group = self._grid.pipe_group
        tied: dict[str, nn.Module] = {}
        shared: dict[str, nn.Parameter] = {}
        children: list[nn.Module] = []
        # Each layer, one after the other, from the rank that trains it.
        for index, layer in enumerate(self._given):
            key = key_of(layer)
            module = tied[key] if key in tied else _copy_of(layer)
            if module is not None and key not in tied:
                owner = self.rank_of(index)
                _fill(module, self._built[index] if owner == group.rank else None, owner, group, index)
                if key is not None:
                    tied[key] = module
            called = bind(layer, module)
            children.append(called if isinstance(called, nn.Module) else Function(called))
        # Modules that shared parameters share them again; those of a key are one module already.
        for plan in self._tie_plans:
            for index, path in plan.uses if key_of(self._given[plan.uses[0][0]]) is None else ():
                owner_path, _, last = path.rpartition(".")
                holder = children[index].get_submodule(owner_path)
                setattr(holder, last, shared.setdefault(plan.key, getattr(holder, last)))
        return nn.Sequential(*children)

    def allreduce_tied_weight_gradients(self) -> None:
        """Sum the tied weights' ``.grad`` over the pipe axis; the engine does this by itself."""
        sum_gradients(self.ties, lambda param: param.grad is not None, _own_gradient)


def _own_gradient(param: nn.Parameter) -> torch.Tensor:
    if param.grad is None:
        param.grad = torch.zeros_like(param)
    return param.grad


def _copy_of(layer: Any) -> nn.Module | None:
    """A module of the right shapes, apart from the one that trains."""
    if isinstance(layer, LayerSpec):
        with torch.random.fork_rng(devices=[]):
            return layer.build()
    return deepcopy(layer).to_empty(device="cpu") if isinstance(layer, nn.Module) else None


def _fill(module: nn.Module, source: nn.Module | None, owner: int, group: Group, index: int) -> None:
    """Give ``module`` the values that the owner's ``source`` has, in the owner's dtype."""
    # Names are alike on all ranks, because all have built the same module; dtype and shape are the owner's to say:
    # the engine may have made them 16 bits wide, or cut them.
    targets = _tensors(module)
    values = {} if source is None else _tensors(source)
    mine = {name: (value.dtype, tuple(value.shape)) for name, value in values.items()}
    forms = broadcast_object(mine, owner, group, label="layer form")
    for name, target in targets.items():
        dtype, shape = forms[name]
        if shape != tuple(target.shape):
            raise UsageError(
                f"to_sequential: {name} of layer {index} is not whole on the rank that trains it",
                expected=tuple(target.shape),
                found=shape,
                fix="gather the parameters first (zeropipe.zero.GatheredParameters)",
            )
        value = values[name].detach().contiguous().clone() if values else torch.empty(shape, dtype=dtype)
        if value.numel():
            broadcast(value, owner, group, label="layer values")
        target.data = value.to(target.device)


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict((*module.named_parameters(), *module.named_buffers()))


def _recompute(run: Callable[[Any], Any], value: Any) -> Any:
    return checkpoint(run, value, use_reentrant=False)


def _topology(num_stages: int | None, topology: ProcessTopology | None) -> ProcessTopology:
    if topology is not None:
        if num_stages is not None and num_stages != max(topology.get_dim("pipe"), 1):
            raise ConfigError(
                "num_stages and topology disagree",
                expected=f"num_stages={topology.get_dim('pipe')}",
                found=num_stages,
                fix="give one of the two",
            )
        return topology
    if num_stages is None:
        raise ConfigError("PipelineModule needs num_stages or topology", fix="pass num_stages=2")
    size = world().size
    if num_stages < 1 or size % num_stages:
        raise ConfigError(
            "num_stages does not divide the world",
            expected=f"a divisor of {size} processes",
            found=num_stages,
            fix="start another number of processes, or choose another num_stages",
        )
    return PipeDataParallelTopology(num_stages, size // num_stages)
