"""What an engine is made of: the one record that its other parts, a save and a load work on, and its clock.

    OPEN window  --reduced, boundary-->  optimizer.step  -->  SCHEDULE  -->  TELLING  -->  NOTHING
                                              └──────── overflow ───────────────┘

is how a micro-step ends (``Steps``): in each every rank reduces; at the boundary the optimizer steps, then the
schedule.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from zeropipe.comm.group import SELF, Group
from zeropipe.config.batch import BatchSizes
from zeropipe.config.schema import Config
from zeropipe.errors import ConfigError, UsageError
from zeropipe.given import DataLike, ScheduleLike
from zeropipe.layout.slots import Sharing
from zeropipe.runtime.dataloader import SlotSampler
from zeropipe.runtime.engine.dtypes import MixedInputs
from zeropipe.runtime.engine.placement import Samples
from zeropipe.runtime.lr_schedules.base import step_schedule
from zeropipe.runtime.zero.gather.sharded_model import ShardedModel
from zeropipe.runtime.zero.hold.optimizer import ZeroOptimizer
from zeropipe.tensor.draws import Draws
from zeropipe.tensor.model import Places

_log = logging.getLogger("zeropipe")
_SAVED = ("micro_steps", "global_steps", "global_samples", "skipped_steps")


@dataclass(slots=True)
class Clock:
    """What an engine counts.

    A micro-step ends with ``tick``; a boundary is the micro-step at which an optimizer step happens. By default
    that is every ``gradient_accumulation_steps``-th one; ``force`` overrides the count.
    """

    batch: BatchSizes
    managed: bool = True  # False: every ``step`` is a boundary, whatever was counted, and no backward is one

    # Saved, so that a run that is resumed counts on.
    micro_steps: int = 0
    global_steps: int = 0
    global_samples: int = 0
    skipped_steps: int = 0

    # Of the latest step, and of the coming ones.
    last_step_applied: bool = False
    forced_boundary: bool | None = None

    @property
    def divisor(self) -> int:
        """What the loss of a micro-step is divided by. Slots are divided once they are summed."""
        return 1 if self.batch.slots is not None else self.batch.gradient_accumulation_steps

    def restart_window(self) -> None:
        """What was computed of a step's slots is forgotten: the coming micro-step is that of the first."""
        if self.batch.slots is not None:
            self.micro_steps -= self.micro_steps % self.batch.gradient_accumulation_steps

    @property
    def is_boundary(self) -> bool:
        if self.forced_boundary is not None:
            return self.forced_boundary
        return self.managed and (self.micro_steps + 1) % self.batch.gradient_accumulation_steps == 0

    @property
    def steps_now(self) -> bool:
        """Whether a micro-step that ends now ends in an optimizer step."""
        return self.is_boundary or (not self.managed and self.forced_boundary is None)

    def force(self, boundary: bool | None) -> bool | None:
        """Say what the coming micro-steps are, whatever the count says (None: ask the count). What was said before."""
        before, self.forced_boundary = self.forced_boundary, None
        if self.batch.slots is not None and boundary not in (None, self.is_boundary):
            count = self.batch.gradient_accumulation_steps
            raise UsageError(
                f"the coming micro-step is said to {'end' if boundary else 'go on with'} a step",
                expected=f"a step of {count} micro-steps, as 'reproducible.slots' says",
                found=f"number {self.micro_steps % count + 1}",
                fix="run all of them (drop an epoch's last, incomplete step), or remove 'reproducible'",
            )
        self.forced_boundary = boundary
        return before

    def tick(self) -> None:
        """One micro-step is over."""
        self.micro_steps += 1
        self.last_step_applied = False

    def skip_to_last_of(self, count: int) -> None:
        """The coming micro-step is the last of ``count`` that began together: a pipeline's batch."""
        # What another engine has left of an accumulation is no part of this batch.
        self.micro_steps += count - 1 - self.micro_steps % count

    def stepped(self, applied: bool) -> None:
        """One optimizer step was tried; ``applied`` is False when an overflow skipped it."""
        self.global_steps += 1
        self.global_samples += self.batch.train_batch_size
        self.skipped_steps += not applied
        self.last_step_applied = applied

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the samples per step by changing the accumulation. Raises ConfigError where that does not go up."""
        batch = self.batch
        if batch.slots is not None:
            raise ConfigError(
                "set_train_batch_size: the samples of a step are micro-batch x 'reproducible.slots'",
                fix="call set_train_micro_batch_size, or set another number of slots",
            )
        per_micro_step = batch.micro_batch_size * batch.world
        steps, rest = divmod(train_batch_size, per_micro_step)
        if steps < 1 or rest:
            raise ConfigError(
                "set_train_batch_size",
                expected=f"a multiple of {per_micro_step} ({batch.micro_batch_size} per rank x {batch.world})",
                found=train_batch_size,
                fix=f"use {max(1, round(train_batch_size / per_micro_step)) * per_micro_step}",
            )
        self.batch = BatchSizes(train_batch_size, batch.micro_batch_size, steps, batch.world)
        # A window that was begun would end after another number of micro-steps than it is divided by.
        self.micro_steps = 0

    def set_micro_batch_size(self, micro_batch_size: int) -> None:
        """Change the samples of a micro-step on each rank, and with them those of a step."""
        if micro_batch_size < 1:
            raise ConfigError("set_train_micro_batch_size", expected="at least 1", found=micro_batch_size)
        batch = self.batch
        steps, ranks = batch.gradient_accumulation_steps, batch.world
        train = micro_batch_size * (batch.slots or steps * ranks)
        self.batch = BatchSizes(train, micro_batch_size, steps, ranks, batch.slots)

    def state_dict(self) -> dict[str, int]:
        return {key: getattr(self, key) for key in _SAVED}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``, at the begin of a window: gradients of an unfinished one are not saved."""
        for key, value in state.items():
            setattr(self, key, int(value))
        accumulation = self.batch.gradient_accumulation_steps
        # A file that counts no micro-steps has made as many as its steps take here.
        made = self.micro_steps if self.batch.slots is None else 0  # by another number of ranks, maybe
        micro_steps = made or self.global_steps * accumulation
        self.micro_steps = micro_steps - micro_steps % accumulation


@dataclass(slots=True, eq=False)
class Parts:
    """What an engine is made of; ``build`` puts it together, and the engine's other parts work on it."""

    # For its whole life.
    module: torch.nn.Module
    config: Config
    clock: Clock
    group: Group
    device: torch.device
    samples: Samples
    mpu: Any = None
    collate_fn: Any = None
    stages: Group = SELF  # of a pipeline: each of these ranks knows the names of its own stages alone

    # Until ``drop``.
    optimizer: ZeroOptimizer | None = None
    sharded: ShardedModel | None = None  # stage 3
    mixed: MixedInputs | None = None  # of a model that keeps some tensors wide

    # Users exchange these on the engine, and whoever works with them (a step, a checkpoint) must see the new one.
    lr_scheduler: Any = None
    training_dataloader: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that tells."""
        return self.group.ranks[self.group.rank] == 0

    @property
    def sharing(self) -> Sharing | None:
        """Of a step's slots, where results do not follow the number of ranks."""
        turn = None if self.optimizer is None else self.optimizer.turn
        return None if turn is None else turn.sharing

    def say(self, text: str) -> None:
        if text and self.first:
            _log.warning(text)

    def need_optimizer(self, call: str) -> ZeroOptimizer:
        if self.optimizer is None:
            raise UsageError(
                f"engine.{call}: this engine has no optimizer. Fix: pass optimizer= to initialize, or name one in "
                "the config; for inference call engine(batch) alone"
            )
        return self.optimizer

    def take_schedule(self, schedule: ScheduleLike) -> None:
        self.lr_scheduler = schedule

    def take_loader(self, loader: DataLike) -> None:
        self.training_dataloader = loader

    def post_process(self, made: Callable[[Any, dict[str, Any]], Any]) -> None:
        """Have the loader yield ``made(batch, its place)``."""
        set_by = getattr(self.training_dataloader, "post_process", None)
        if set_by is None:
            found = type(self.training_dataloader).__name__
            raise UsageError(
                "set_data_post_process_func: the engine has no loader of its own",
                found="none" if self.training_dataloader is None else f"a {found}",
                fix="give initialize training_data=, or change the batches where your own loader makes them",
            )
        set_by(made)

    def drop(self) -> None:
        """The engine is destroyed: what is left is a module and its figures."""
        self.optimizer = self.sharded = self.mixed = self.lr_scheduler = self.training_dataloader = None


class Slots:
    """What an engine says of its slots, and what forward draws in each; nothing where there are none."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._draws: Draws | None = None
        self._told = False
        if parts.sharing is not None:
            self._draws = Draws(parts.config.reproducible.seed, parts.device, self._place)

    def _place(self) -> tuple[int, int]:
        # Of a pass that counts for nothing it is past the slots.
        turn = self._parts.need_optimizer("forward").turn
        assert turn is not None, "it is asked where there are slots"
        return self._parts.clock.global_steps, turn.sharing.slots if turn.slot is None else turn.slot

    def drawing(self) -> AbstractContextManager[None]:
        """Around a forward."""
        return nullcontext() if self._draws is None else self._draws.forward()

    def layers(self) -> Callable[[int], AbstractContextManager[None]] | None:
        """Of the micro-batch that is computed now: what its layers run in; None for nothing."""
        return self._draws.layers() if self._draws is not None and self._parts.module.training else None

    def drawn(self, loss_fn: Callable[..., Any] | None) -> Callable[..., Any] | None:
        """A pipeline's loss function, which draws as a layer does."""
        if loss_fn is None or self._draws is None:
            return loss_fn

        def drawn(*args: Any) -> Any:
            layers = self.layers()
            with nullcontext() if layers is None else layers(-1):
                return loss_fn(*args)

        return drawn

    def micro_batch(self, number: int) -> AbstractContextManager[None]:
        """Around what is computed of a micro-batch of a pipeline's step."""
        optimizer = self._parts.optimizer
        turn = None if optimizer is None else optimizer.turn
        return nullcontext() if turn is None else turn.of(number)

    def begin_batch(self, micro_batches: int) -> float:
        """A pipeline runs a whole step; what its losses are divided by. Raises UsageError for another number of
        micro-batches than slots."""
        turn = self._parts.need_optimizer("train_batch").turn
        if turn is None:
            return micro_batches
        if micro_batches != turn.sharing.passes:
            raise UsageError(
                "the schedule's micro-batches are not those of a step of 'reproducible.slots'",
                expected=turn.sharing.passes,
                found=micro_batches,
                fix="make the schedule for engine.gradient_accumulation_steps() micro-batches",
            )
        turn.ran_all()
        return 1

    def restart(self) -> None:
        """What was computed of a step is forgotten: the coming micro-step is that of its first slot."""
        clock = self._parts.clock
        before = clock.micro_steps
        clock.restart_window()
        lost = before - clock.micro_steps
        if lost and not self._told:
            self._told = True  # a program that does it before each backward never takes a step
            self._parts.say(
                f"engine.zero_grad() in the middle of a step: {lost} micro-step(s) are forgotten, "
                "and the step of 'reproducible.slots' begins anew (said once)"
            )
        if self._draws is not None:
            self._draws.restart()

    @property
    def mine(self) -> tuple[int, ...]:
        return self._need("slots").of(self._parts.samples.rank)

    def sampler(self, dataset: DataLike, shuffle: bool, seed: int, drop_last: bool) -> SlotSampler:
        batch, rank = self._parts.clock.batch.micro_batch_size, self._parts.samples.rank
        return SlotSampler(dataset, batch, self._need("slot_sampler"), rank, shuffle, seed, drop_last)

    def _need(self, call: str) -> Sharing:
        if self._parts.sharing is None:
            raise UsageError(
                f"engine.{call}: a step has no slots",
                fix='set "reproducible": {"slots": ...} in the configuration',
            )
        return self._parts.sharing


class Left(Enum):
    """What is left to do of the latest step once the optimizer has stepped. A step that raised is gone on with here:
    the optimizer knows its own middle (``in_step``), these are what comes after it."""

    NOTHING = "nothing"
    SCHEDULE = "the schedule, and telling"  # the step was applied
    TELLING = "telling"  # an overflow skipped it, or the schedule has stepped


class Steps:
    """Ends micro-steps. Whoever raises on the way is called again by the next ``end``, and nobody is called twice."""

    def __init__(self, parts: Parts, optimizer: ZeroOptimizer) -> None:
        self._clock, self._optimizer, self._sharded = parts.clock, optimizer, parts.sharded
        self._places = Places(parts.module)
        self._passes = 0  # of the reducer, when the current micro-step began
        self._left = Left.NOTHING

    def end(self, schedule: ScheduleLike, arguments: dict[str, Any] | None) -> bool:
        """End the micro-step; whether an optimizer step was tried, of which has to be told (then call ``told``)."""
        optimizer, reducer = self._optimizer, self._optimizer.reducer
        # [1] The rest of a step that raised after the optimizer had stepped. With no backward since, that is all.
        if self._left is not Left.NOTHING:
            self._step_schedule(schedule, arguments)
            self.told()
            if reducer.window_is_empty:
                return False
        # [2] Every rank reduces in every micro-step, for its peers wait; also one whose backward reached no parameter.
        if not optimizer.in_step:
            reducer.refuse_broken()
            if reducer.passes == self._passes:
                with reducer.one_pass():
                    pass
            self._passes = reducer.passes
            if self._sharded is not None:
                self._sharded.settle()
        if not self._clock.steps_now:
            self._clock.tick()
            return False
        if not optimizer.in_step:
            self._check_places()
        # [3] The clock after the optimizer: a step that raises is still the coming one.
        optimizer.step()
        self._clock.tick()
        self._clock.stepped(applied=not optimizer.overflow)
        self._left = Left.TELLING if optimizer.overflow else Left.SCHEDULE
        self._step_schedule(schedule, arguments)
        return True

    def _check_places(self) -> None:
        try:
            self._places.check(lambda: (p for part in self._optimizer.partitions for p in part.params))
        except UsageError as error:
            if self._sharded is not None:
                self._sharded.coordinator.tell(error, "step")
            raise

    def told(self) -> None:
        """The step is over."""
        assert self._left is not Left.SCHEDULE, "the schedule comes first"
        self._left = Left.NOTHING

    def _step_schedule(self, schedule: Any, arguments: dict[str, Any] | None) -> None:
        if self._left is Left.SCHEDULE and schedule is not None:
            step_schedule(schedule, self._optimizer.param_groups, arguments or {})
        self._left = Left.TELLING
