"""The training engine: wires a module, its ZeRO optimizer, the clock and the schedule into three calls.

    loss = engine(batch)
    engine.backward(loss)
    engine.step()

It delegates. Sharding lives in ``runtime/zero``, scaling in ``runtime/fp16``, counting in ``accumulation``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from zeropipe.comm.group import Group
from zeropipe.config.batch import BatchSizes
from zeropipe.config.schema import Config
from zeropipe.errors import ConfigError, UsageError
from zeropipe.runtime.dataloader import ZeroDataLoader, build_dataloader
from zeropipe.runtime.engine.checkpoints import EngineCheckpoint
from zeropipe.runtime.engine.clock import Clock
from zeropipe.runtime.engine.facts import EngineFacts
from zeropipe.runtime.engine.memory import MemoryRow, memory_report
from zeropipe.runtime.engine.mixed_inputs import MixedInputs
from zeropipe.runtime.engine.offload import EngineOffload
from zeropipe.runtime.engine.placement import DTYPES
from zeropipe.runtime.engine.report import Reporter, Status
from zeropipe.runtime.engine.scaling import Scaling
from zeropipe.runtime.engine.weights import EngineWeights
from zeropipe.runtime.lr_schedules.base import step_schedule
from zeropipe.runtime.zero.gather.sharded_model import ShardedModel
from zeropipe.runtime.zero.gather.whole import forget_whole, know_whole
from zeropipe.runtime.zero.hold.optimizer import ZeroOptimizer
from zeropipe.runtime.zero.hold.row_norms import RowNorms


@dataclass(frozen=True, slots=True)
class Parts:
    """What an engine is made of; ``initialize`` puts it together."""

    module: torch.nn.Module
    config: Config
    clock: Clock
    group: Group
    device: torch.device
    optimizer: ZeroOptimizer | None = None
    lr_scheduler: Any = None
    mpu: Any = None
    collate_fn: Any = None
    sharded: ShardedModel | None = None  # stage 3
    mixed: MixedInputs | None = None  # of a model that keeps some tensors wide


class DeepSpeedEngine(EngineCheckpoint, EngineFacts, EngineOffload, EngineWeights, torch.nn.Module):
    """A module that trains in parallel; everything it does not define itself is the module's.

    Attributes users read: ``module`` (the object passed in), ``optimizer``, ``lr_scheduler`` (assignable; None
    means nobody steps it here), ``training_dataloader``, ``device``, ``clock``.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.module = parts.module
        self.optimizer = parts.optimizer
        self.lr_scheduler = parts.lr_scheduler
        self.training_dataloader: Any = None
        self.device = parts.device
        self.clock = parts.clock
        self.mpu = parts.mpu
        self.collate_fn = parts.collate_fn
        self._config = parts.config
        self._group = parts.group
        self._sharded = parts.sharded
        self._mixed = parts.mixed
        know_whole(self.module, self._group)
        self._told: set[str] = set()
        self._rows: RowNorms | None = None
        self._scaling = Scaling(lambda: self.loss_scale, self.gradient_accumulation_steps)
        if self.optimizer is not None:
            self.optimizer.reducer.missing_factor = self._scaling.missing
            if self._sharded is None:
                self._rows = RowNorms(parts.module, parts.group)
                self.optimizer.reducer.at_boundary = self._rows.join
        self._passes = 0  # of the reducer, when the current micro-step began
        self._schedule_is_due = False  # the optimizer has stepped, the schedule has not
        self._closing = False  # the optimizer has stepped, what comes after it has not been done
        self._report = Reporter(parts.config, parts.clock, parts.device, first=self._first_rank)
        self.train(parts.module.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is None or not hasattr(module, name):
                raise AttributeError(f"neither the engine nor its module has an attribute {name!r}") from None
            return getattr(module, name)

    # Training.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward; whatever it returns is passed through."""
        if self.optimizer is None:
            with self._autocast():
                return self.module(*self._cast(args), **self._cast(kwargs))
        self._reload_for_forward()
        self.optimizer.wake()
        with self._report.phase("forward"), self._autocast():
            self._scaling.enter((args, kwargs))
            return self.module(*self._cast(args), **self._cast(kwargs))

    def backward(
        self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True
    ) -> torch.Tensor:
        """Run backward on ``loss`` (one element), scaled by the loss scale and by 1 / accumulation steps.

        ``scale_wrt_gas=False``: the caller has divided by the accumulation steps already. Gradients are reduced
        here if a step follows. Returns the loss as the step uses it, divided by the accumulation steps. Raises
        UsageError without an optimizer.
        """
        optimizer = self._need_optimizer("backward")
        if not torch.is_tensor(loss) or loss.numel() != 1:
            found = f"a tensor of shape {tuple(loss.shape)}" if torch.is_tensor(loss) else type(loss).__name__
            raise UsageError("backward: loss", expected="a tensor with one element", found=found)
        steps = self.gradient_accumulation_steps() if scale_wrt_gas else 1
        factor = optimizer.loss_scale / steps
        self._report.loss(loss)
        scaling = self._scaling
        with (
            self._report.phase("backward"),
            scaling.running(factor, loss),
            optimizer.reducer.one_pass(),
        ):
            scaling.scaled(loss, factor).backward(retain_graph=retain_graph)
        if self._sharded is not None:
            self._sharded.end_backward()
        return loss if steps == 1 else loss / steps

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """``loss`` as ``engine.backward`` scales it; ``engine.scale(loss).backward()`` is ``engine.backward(loss)``.

        In fp16 a plain backward needs it: a loss without the loss scale is refused when its gradients arrive.
        """
        self._need_optimizer("scale")
        return self._scaling.scale(loss)

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """End the micro-step; at the boundary clip, step the optimizer and the schedule, and clear gradients.

        An overflow skips the step on every rank, and the schedule with it. A step that raised may be called again: it
        goes on where it stopped.
        """
        optimizer = self._need_optimizer("step")
        if self.clock.is_boundary:
            self.raise_failed_save()
        self.reload_states()
        with self._report.phase("step"):
            if self._closing:  # the step before this one raised after the optimizer's
                self._step_schedule(optimizer, lr_kwargs)
                self._closing = False
                if optimizer.reducer.window_is_empty:
                    return
            if not optimizer.in_step:
                self._end_pass(optimizer)
                if self._sharded is not None:
                    self._sharded.settle()
            if not self.clock.is_boundary:
                self.clock.tick()
                return
            optimizer.step()
            self.clock.tick()
            self.clock.stepped(applied=not optimizer.overflow)
            self._schedule_is_due = not optimizer.overflow
            self._closing = True
            self._step_schedule(optimizer, lr_kwargs)
        self._report.stepped(self._status)
        self._closing = False

    def _step_schedule(self, optimizer: ZeroOptimizer, arguments: dict[str, Any] | None) -> None:
        if self.lr_scheduler is not None and self._schedule_is_due:
            step_schedule(self.lr_scheduler, optimizer.param_groups, arguments or {})
        self._schedule_is_due = False

    def _end_pass(self, optimizer: ZeroOptimizer) -> None:
        """Every rank reduces in every micro-step, also one whose plain backward reached no parameter."""
        reducer = optimizer.reducer
        reducer.refuse_broken()
        if reducer.passes == self._passes:
            with reducer.one_pass():
                pass
        self._passes = reducer.passes

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget every gradient of the window, reduced ones too."""
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        self.module.zero_grad()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, backward accumulates on this rank only; the next backward or step outside reduces once.

        At stages 2 and 3 the whole local gradients live until then.
        """
        with self._need_optimizer("no_sync").reducer.local_only():
            yield

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say whether the coming micro-step ends in an optimizer step, whatever the count says; it stays so."""
        self.clock.forced_boundary = is_boundary

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the samples per step by changing the accumulation; micro-batch and ranks stay.

        Raises ConfigError unless it is a multiple of micro-batch x ranks.
        """
        batch = self.clock.batch
        per_micro_step = batch.micro_batch_size * batch.world
        if train_batch_size <= 0 or train_batch_size % per_micro_step:
            raise ConfigError(
                "set_train_batch_size",
                expected=f"a multiple of {per_micro_step} ({batch.micro_batch_size} per rank x {batch.world})",
                found=train_batch_size,
                fix=f"use {max(1, round(train_batch_size / per_micro_step)) * per_micro_step}",
            )
        steps = train_batch_size // per_micro_step
        self.clock.batch = BatchSizes(train_batch_size, batch.micro_batch_size, steps, batch.world)
        self.clock.micro_steps = 0

    # The rest of its life.

    def deepspeed_io(
        self,
        dataset: Any,
        batch_size: int | None = None,
        route: str = "train",
        pin_memory: bool = False,
        data_sampler: Any = None,
        collate_fn: Any = None,
        num_local_io_workers: int | None = None,
    ) -> ZeroDataLoader:
        """A loader of this rank's micro-batches of ``dataset``; shuffled where ``route`` is ``train``."""
        if data_sampler is not None:
            raise UsageError(
                "deepspeed_io: data_sampler is not taken, because the loader deals samples out to ranks and keeps "
                "its position. Fix: use torch.utils.data.DataLoader with your sampler instead"
            )
        return build_dataloader(
            dataset,
            batch_size or self.train_micro_batch_size_per_gpu(),
            data_parallel_rank=self._group.rank,
            data_parallel_size=self._group.size,
            collate_fn=collate_fn or self.collate_fn,
            num_workers=num_local_io_workers or 0,
            drop_last=self._config.dataloader_drop_last,
            shuffle=route == "train",
            pin_memory=pin_memory,
        )

    def memory_report(self) -> tuple[MemoryRow, ...]:
        """Live bytes on this rank against the stage's formula: parameters, gradients, optimizer state."""
        return memory_report(self.module, self.optimizer)

    def compile(
        self, backend: str = "inductor", compile_kwargs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Compile the module in place with ``torch.compile``; at stage 3 see docs/zero.md for what is fetched whole."""
        self.module.compile(backend=backend, **(compile_kwargs or {}))
        if self._sharded is not None:
            self._sharded.hooks.compiled.look()

    def destroy(self) -> None:
        """Remove every hook and buffer; the module works on as a plain module. May be called again."""
        if self.optimizer is not None:
            self.optimizer.destroy()
        if self._rows is not None:
            self._rows.remove_hooks()
        if self._sharded is not None:
            self._sharded.destroy()
            self._sharded = None
        forget_whole(self.module)
        if self._mixed is not None:
            self._mixed.remove()
            self._mixed = None
        self._report.close()
        self.optimizer = None
        self.lr_scheduler = None
        self.training_dataloader = None
        self.wait_for_checkpoint()

    @property
    def _first_rank(self) -> bool:
        return self._group.ranks[self._group.rank] == 0

    def _autocast(self) -> AbstractContextManager[Any]:
        autocast = self._config.torch_autocast
        if not autocast.enabled:
            return nullcontext() if self._mixed is None else self._mixed
        dtype = None if autocast.dtype is None else DTYPES[autocast.dtype]
        return torch.autocast(self.device.type, dtype=dtype)

    def _cast(self, inputs: Any) -> Any:
        """``inputs`` in fp16 where ``fp16.auto_cast`` asks for it."""
        if not self._config.fp16.enabled or not self._config.fp16.auto_cast:
            return inputs
        return tree_map_only(torch.Tensor, lambda t: t.half() if t.is_floating_point() else t, inputs)

    def _status(self) -> Status:
        return Status(self.get_lr(), self.loss_scale, self.get_global_grad_norm(), self.memory_report)

    def _need_optimizer(self, call: str) -> ZeroOptimizer:
        if self.optimizer is None:
            raise UsageError(
                f"engine.{call}: this engine has no optimizer. Fix: pass optimizer= to initialize, or name one in "
                "the config; for inference call engine(batch) alone"
            )
        return self.optimizer
