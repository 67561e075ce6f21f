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

from zeropipe.comm.group import Group
from zeropipe.config.batch import BatchSizes
from zeropipe.config.schema import Config
from zeropipe.errors import ConfigError, UsageError, describe
from zeropipe.runtime.accumulation import Clock
from zeropipe.runtime.assembly import DTYPES
from zeropipe.runtime.engine_facts import EngineFacts
from zeropipe.runtime.plain_backward import Gate
from zeropipe.runtime.zero.optimizer import ZeroOptimizer


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
    dataloader: Any = None
    mpu: Any = None


class DeepSpeedEngine(EngineFacts, torch.nn.Module):
    """A module that trains in parallel; everything it does not define itself is the module's.

    Attributes users read: ``module`` (the object passed in), ``optimizer``, ``lr_scheduler`` (assignable; None
    means nobody steps it here), ``training_dataloader``, ``device``, ``clock``.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.module = parts.module
        self.optimizer = parts.optimizer
        self.lr_scheduler = parts.lr_scheduler
        self.training_dataloader = parts.dataloader
        self.device = parts.device
        self.clock = parts.clock
        self.mpu = parts.mpu
        self._config = parts.config
        self._group = parts.group
        self._gate = Gate(self._plain_factor)
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
        if self.optimizer is not None:
            self.optimizer.wake()
        with self._autocast():
            if self._config.fp16.auto_cast:
                args, kwargs = _to_half(args), _to_half(kwargs)
            output = self.module(*args, **kwargs)
        return self._gate.wrap(output) if self.training and self.optimizer is not None else output

    def backward(
        self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True, **ignored: Any
    ) -> torch.Tensor:
        """Run backward on ``loss`` (0-d), scaled by the loss scale and by 1 / accumulation steps.

        ``scale_wrt_gas=False``: the caller has divided by the accumulation steps already. Gradients are reduced
        here if a step follows. Returns ``loss`` as it was given. Raises UsageError without an optimizer.
        """
        optimizer = self._need_optimizer("backward")
        if not torch.is_tensor(loss) or loss.numel() != 1:
            found = f"a tensor of shape {tuple(loss.shape)}" if torch.is_tensor(loss) else type(loss).__name__
            raise UsageError(describe("backward: loss", expected="a tensor with one element", found=found))
        factor = optimizer.loss_scale
        if scale_wrt_gas:
            factor /= self.gradient_accumulation_steps()
        self._gate.closed = True
        try:
            with optimizer.reducer.one_pass():
                scaled = loss if factor == 1.0 else loss.float() * factor
                scaled.backward(retain_graph=retain_graph)
        finally:
            self._gate.closed = False
        return loss

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """End the micro-step; at the boundary clip, step the optimizer and the schedule, and clear gradients.

        An overflow skips the step on every rank, and the schedule with it.
        """
        optimizer = self._need_optimizer("step")
        if not self.clock.is_boundary:
            optimizer.reducer.finish_pass()
            self.clock.tick()
            return
        optimizer.step()
        self.clock.tick()
        self.clock.stepped(applied=not optimizer.overflow)
        if self.lr_scheduler is not None and not optimizer.overflow:
            self.lr_scheduler.step(**(lr_kwargs or {}))

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
                describe(
                    "set_train_batch_size",
                    expected=f"a multiple of {per_micro_step} ({batch.micro_batch_size} per rank x {batch.world})",
                    found=train_batch_size,
                    fix=f"use {max(1, round(train_batch_size / per_micro_step)) * per_micro_step}",
                )
            )
        steps = train_batch_size // per_micro_step
        self.clock.batch = BatchSizes(train_batch_size, batch.micro_batch_size, steps, batch.world)
        self.clock.micro_steps = 0

    # The rest of its life.

    def compile(
        self, backend: str = "inductor", compile_kwargs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Compile the module in place with ``torch.compile``."""
        self.module.compile(backend=backend, **(compile_kwargs or {}))

    def destroy(self) -> None:
        """Remove every hook and buffer; the module works on as a plain module. May be called again."""
        if self.optimizer is not None:
            self.optimizer.destroy()
        self.optimizer = None
        self.lr_scheduler = None
        self.training_dataloader = None

    def _autocast(self) -> AbstractContextManager[Any]:
        autocast = self._config.torch_autocast
        if not autocast.enabled:
            return nullcontext()
        dtype = None if autocast.dtype is None else DTYPES[autocast.dtype]
        return torch.autocast(self.device.type, dtype=dtype)

    def _plain_factor(self) -> float:
        return self.loss_scale / self.gradient_accumulation_steps()

    def _need_optimizer(self, call: str) -> ZeroOptimizer:
        if self.optimizer is None:
            raise UsageError(
                f"engine.{call}: this engine has no optimizer. Fix: pass optimizer= to initialize, or name one in "
                "the config; for inference call engine(batch) alone"
            )
        return self.optimizer


def _to_half(value: Any) -> Any:
    return torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: t.half() if t.is_floating_point() else t, value
    )
