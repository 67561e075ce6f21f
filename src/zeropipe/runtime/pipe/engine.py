"""The pipeline engine: one call trains on a whole batch; schedule, stages and ZeRO meet here and nowhere else.

A batch goes through three hands: the schedule says what each rank does in which order, the executor does it, and the
settlement makes one end of it on all ranks. Only the third may decide that a rank raises.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

import torch

from zeropipe.comm.agreement import agree
from zeropipe.errors import UsageError
from zeropipe.given import DataLike
from zeropipe.runtime.engine.engine import DeepSpeedEngine
from zeropipe.runtime.engine.parts import Parts
from zeropipe.runtime.pipe.batch import Batch, Data, Outcome, Settlement
from zeropipe.runtime.pipe.executor import Around, Effect, Executor, Stage
from zeropipe.runtime.pipe.instructions import Instruction, Op, Schedule, with_sharding, with_transfers
from zeropipe.runtime.pipe.module import PipelineModule
from zeropipe.runtime.pipe.p2p import Forms, Mailbox
from zeropipe.runtime.pipe.picture import of_all_ranks, write
from zeropipe.runtime.pipe.schedule import make_schedule
from zeropipe.runtime.pipe.simulate import Event, fitting
from zeropipe.runtime.pipe.stepwise.run import InSteps, Steps, own_schedule, read, train_schedule
from zeropipe.runtime.pipe.tied import sum_gradients
from zeropipe.runtime.zero.gather.shards import Hold, Shards, shards_of
from zeropipe.runtime.zero.hold.access import trained_of
from zeropipe.runtime.zero.hold.optimizer import ZeroOptimizer

# What one module has and a pipeline has not, as it runs whole batches, and what to call instead.
_INSTEAD = {
    "forward": "train_batch(data_iter), or eval_batch(data_iter, return_logits=True)",
    "backward": "train_batch(data_iter)",
    "step": "train_batch(data_iter)",
}


def _refused(call: str, instead: str) -> Any:
    def refuse(engine: PipelineEngine, *args: Any, **kwargs: Any) -> NoReturn:
        raise UsageError(
            f"engine.{call}() does not exist for a pipeline", fix=f"call engine.{instead} instead"
        )

    return refuse


class PipelineEngine(InSteps, DeepSpeedEngine):
    """Trains a `PipelineModule`: ``loss = engine.train_batch(data_iter)``.

    A batch has ``gradient_accumulation_steps`` micro-batches. ``schedule`` is the plan that runs, ``loss_terms`` the
    mean of every other term that the loss function returned in the latest batch (on every rank).
    """

    module: PipelineModule
    pipeline_parallelism = True

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        module, section = self.module, parts.config.pipeline
        if section.activation_checkpoint_interval:
            module.activation_checkpoint_interval = section.activation_checkpoint_interval
        self.grid = module.grid

        # The plan: by name, or as the user gave it.
        self._name, self._chunks = module.pick_schedule(section)
        self._own: Schedule | None = None

        # Who carries it out. Evaluation has a mailbox of its own, because its messages have other forms.
        self._stages = {s: Stage(s, self._runner(s)) for s in module.stages}
        self._table = {} if self.optimizer is None else stage_table(module, self.optimizer)
        self._mailbox, self._eval_mailbox = (
            Mailbox(self.grid.links, self.device, module.dynamic_shape) for _ in range(2)
        )
        self._executor: Executor | None = None  # of training, as long as the number of micro-batches holds
        if self._sharded is not None:
            # The schedule says when a stage is gathered; gathering each layer by itself would only cost messages.
            self._sharded.hooks.remove()

        # What goes in and comes out.
        self._data = Data(lambda: self.training_dataloader)
        self._settlement = Settlement(self.grid, self.device, self._last_rank, parts.sharing)
        self.loss_terms: dict[str, torch.Tensor] = {}
        agree(
            {"pipeline schedule": str(self.schedule), "loss scale": str(self.loss_scale)},
            self.grid.model_group,
        )

    # Training and evaluation.

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> torch.Tensor:
        """Train on ``gradient_accumulation_steps`` micro-batches and step; collective over all ranks.

        ``data_iter`` yields ``(inputs, labels)``; it is read on the ranks of the first and of the last stage.
        Returns the loss (fp32, or fp64 where it is that, []), averaged over micro-batches and data-parallel ranks, on
        every rank.

        Where a rank raises (UsageError if the iterator ends early or the loss is no scalar; whatever a layer raises)
        the others raise too, no rank steps, and the batch's gradients are forgotten: the next call starts anew.
        """
        self._parts.need_optimizer("train_batch")
        given = own_schedule(self._train_schedule)
        if given is not None:
            return self._run_list(given, data_iter)
        if self._executor is None or self._executor.schedule.micro_batches != self.micro_batches:
            self._executor = self._executor_of(self.schedule, self._mailbox)
        outcome = self._train(self._executor, data_iter)
        self._take_step()
        return outcome.loss

    def _exec_schedule(self, pipe_schedule: Steps) -> None:
        """Run this rank's list of steps, such as ``TrainSchedule(...)`` or a subclass's; collective over all ranks.

        Its data comes from ``set_dataiterator`` or the training data; ``_aggregate_total_loss()`` then has the loss.
        Raises ScheduleError, on every rank and before anything runs, where the lists of the stages do not fit.
        """
        self._run_list(pipe_schedule, None)

    def _run_list(self, given: Steps, data_iter: Iterator[Any] | None) -> torch.Tensor:
        plan, calls = read(given, self, self.grid, self.module.total_stages)
        self._calls = calls
        mailbox = self._mailbox if plan.has_backward else self._eval_mailbox
        executor = self._executor_of(self._prepared(plan), mailbox, calls)
        if plan.has_backward:
            outcome = self._train(executor, data_iter)
        else:
            mailbox.forget_forms()
            with torch.no_grad():
                outcome = self._run(executor, self._batch(data_iter, plan.micro_batches), "avg")
        self._total_loss = outcome.loss
        calls.after()
        return self._total_loss

    def _train(self, executor: Executor, data_iter: Iterator[Any] | None) -> Outcome:
        optimizer = self._parts.need_optimizer("train_batch")
        self._settlement.need_whole("train_batch")
        optimizer.wake()
        self.train()
        if self.regimes.advance():  # sequences of another length
            self._mailbox.forget_forms()
        count = executor.schedule.micro_batches
        factor = self.loss_scale / self._slots.begin_batch(count)
        by_slot = self._parts.sharing is not None
        batch = self._batch(data_iter, count, factor=factor, by_slot=by_slot)
        with self.report.phase("forward"), self._scaling.running(factor), optimizer.reducer.local_only():
            outcome = self._run(executor, batch, "avg")
        self.loss_terms = outcome.terms
        self.report.loss(outcome.loss, executor)
        return outcome

    def _take_step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        # A step follows a batch always, whatever boundary a user has set for what he runs on another engine.
        self.clock.skip_to_last_of(self.gradient_accumulation_steps())
        forced = self.clock.force(True)
        try:
            self._end_micro_step(lr_kwargs)
        finally:
            self.clock.force(forced)

    @torch.no_grad()
    def eval_batch(
        self,
        data_iter: Iterator[Any],
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: str | None = "avg",
        bcast_loss: bool = True,
        num_micro_batches: int | None = None,
    ) -> Any:
        """Run ``num_micro_batches`` (default: as in training) forward only, in eval mode; collective.

        Returns the loss, averaged (``avg``), summed (``sum``), or a list by micro-batch (None), on every rank, or
        with ``bcast_loss=False`` on the last stage's ranks alone; None without ``compute_loss``. With
        ``return_logits`` a pair: the loss, and the model's output on the last stage's ranks, micro-batches joined
        along dim 0 where they are tensors that fit, a list otherwise.
        """
        if reduce_output not in ("avg", "sum", None):
            raise UsageError(
                "eval_batch: reduce_output", expected="'avg', 'sum' or None", found=repr(reduce_output)
            )
        self._settlement.need_whole("eval_batch")
        was_training = self.module.training
        self.eval()
        try:
            plan = self._plan(num_micro_batches or self.micro_batches).forward_only()
            executor = self._executor_of(self._prepared(plan), self._eval_mailbox)
            self._eval_mailbox.forget_forms()
            batch = self._batch(
                data_iter, plan.micro_batches, with_loss=compute_loss, keep_outputs=return_logits
            )
            outcome = self._run(executor, batch, reduce_output)
        finally:
            self.train(was_training)
        loss: Any = None
        if compute_loss and (bcast_loss or self.stage_id == self._last_rank):
            self.loss_terms = outcome.terms
            loss = outcome.each if reduce_output is None else outcome.loss
        return (loss, batch.joined) if return_logits else loss

    # The plan.

    @property
    def schedule(self) -> Schedule:
        """The plan of a training batch: compute, and the instructions of sharded stages."""
        return self._prepared(self._plan(self.micro_batches))

    def _prepared(self, plan: Schedule) -> Schedule:
        return with_sharding(
            plan, self._is_sharded, {s for tie in self.module.tie_plans() if tie.crosses for s in tie.stages}
        )

    _train_schedule = train_schedule

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step."""
        return self.gradient_accumulation_steps()

    def set_schedule(self, schedule: Schedule | str) -> None:
        """Take another plan: a name, a text, or a `Schedule`. It must cut the model as the module does."""
        count, ranks, module = self.micro_batches, self.num_stages, self.module
        if isinstance(schedule, Schedule):
            plan = schedule
        else:
            plan = make_schedule(schedule, ranks, count, module.num_chunks)
        mine = (module.placement.rank(stage, ranks) for stage in range(module.total_stages))
        self._own, self._executor = fitting(plan, tuple(mine), count), None

    def pipeline_events(self) -> list[Event]:
        """What every rank of this pipeline did in the latest batch, in seconds from the first step; collective."""
        return of_all_ranks([] if self._executor is None else self._executor.events, self.grid.pipe_group)

    def pipeline_timeline(self, path: str | os.PathLike[str]) -> list[Event]:
        """Write the latest batch as a picture (PNG, SVG) or a browser's trace (JSON); collective.

        It is drawn as ``zeropipe pipe plan`` draws a plan. Returns the events.
        """
        events = self.pipeline_events()
        if self.grid.global_rank == 0:
            write(events, self.num_stages, path, f"{self.schedule.name}, measured")
        return events

    # What users set and ask.
    def set_dataiterator(self, iterator: Iterator[Any]) -> None:
        """Where ``train_batch()`` without an argument takes its batches from."""
        self._data.take(iterator)

    def set_dataloader(self, loader: DataLike) -> None:
        self.training_dataloader = loader
        self._data.take(None)

    def set_batch_fn(self, fn: Callable[[Any], Any]) -> None:
        """``fn(batch)`` makes ``(inputs, labels)`` of what the iterator yields."""
        self._data.convert(fn)

    def foresee(self, look: Callable[[PipelineModule, Any], Forms]) -> None:
        """Learn the forms of all messages from ``look(module, inputs of a micro-batch)``, not from their senders."""
        self._data.show_next(lambda inputs: self._mailbox.know_forms(look(self.module, inputs)))

    def set_has_attention_mask(self, value: bool) -> None:
        """Accepted for callers that say it: any tensors may travel with the activations."""

    def reset_activation_shape(self) -> None:
        """The next batches have another shape; every rank must call it."""
        self._mailbox.forget_forms()

    def is_first_stage(self) -> bool:
        """Whether this rank runs the first stage."""
        return 0 in self.module.stages

    def is_last_stage(self) -> bool:
        """Whether this rank runs the last stage, and so the loss."""
        return self.module.total_stages - 1 in self.module.stages

    @property
    def _is_sharded(self) -> bool:
        return self.zero_optimization_partition_weights()

    @property
    def _needs_data(self) -> bool:
        return self.is_first_stage() or self.is_last_stage() or self.grid.pipe_group.imagined

    @property
    def _last_rank(self) -> int:
        """The pipeline rank of the last stage."""
        return self.module.placement.rank(self.module.total_stages - 1, self.grid.pipe_parallel_size)

    @property
    def num_stages(self) -> int:
        return self.grid.pipe_parallel_size

    @property
    def stage_id(self) -> int:
        return self.grid.stage_id

    forward, backward, step = (_refused(call, instead) for call, instead in _INSTEAD.items())

    def _runner(self, stage: int) -> Callable[[Any], Any]:
        return lambda value: self.module.run_stage(stage, value, self._slots.layers())

    def _plan(self, micro_batches: int) -> Schedule:
        if self._own is not None and self._own.micro_batches >= micro_batches:
            return self._own.only(micro_batches)
        return make_schedule(self._name, self.num_stages, micro_batches, self._chunks)

    def _executor_of(self, plan: Schedule, mailbox: Mailbox, around: Around | None = None) -> Executor:
        rank, within = self.grid.stage_id, self._slots.micro_batch
        return Executor(with_transfers(plan), rank, self._stages, mailbox, self._table, around, within)

    def _batch(self, iterator: Iterator[Any] | None, count: int, **given: Any) -> Batch:
        return Batch(
            count,
            partial(self._data.iterator, iterator, self._needs_data),
            self.device,
            self._slots.drawn(self.module.loss_fn),
            self._data.batch_fn,
            **given,
        )

    def _run(self, executor: Executor, batch: Batch, how: str | None) -> Outcome:
        """Run a batch and end it on all ranks alike, with its losses or an error."""
        with self._autocast():
            failure = self._settlement.attempt(executor.run, batch)
        mailbox = executor.mailbox
        first = failure is not None and not mailbox.heard_of_failure
        found = self._settlement.settle(batch, how, failure, first)
        if isinstance(found, BaseException):
            mailbox.forget_forms()
            self.zero_grad()
            raise found
        return found


# What the instructions that concern a whole stage do to the ZeRO optimizer's parameters.


def stage_table(module: PipelineModule, optimizer: ZeroOptimizer) -> dict[Op, Effect]:
    """The effects that an executor of ``module`` cannot know by itself."""
    held: dict[int, list[Hold]] = {}  # by stage
    return {
        Op.UNSHARD: partial(_unshard, module, held),
        Op.RESHARD: partial(_reshard, held),
        Op.REDUCE_TIED: lambda step: sum_gradients(module.ties, _has_gradient, _gradient),
        Op.REDUCE_GRAD: lambda step: optimizer.reducer.finish_window(),
    }


def _unshard(module: PipelineModule, held: dict[int, list[Hold]], step: Instruction) -> None:
    # All parameters of the stage at once: their gathers travel together.
    found = _shards(module, step.stage)
    held.setdefault(step.stage, []).extend(shards.hold() for shards in found)
    for shards in found:
        shards.start_gather()
    for shards in found:
        shards.finish_gather()


def _reshard(held: dict[int, list[Hold]], step: Instruction) -> None:
    for hold in held.pop(step.stage, ()):
        hold.release()


def _shards(module: PipelineModule, stage: int) -> list[Shards]:
    modules = [module.layer_module(layer) for layer in module.layers_of(stage)]
    params = dict.fromkeys(p for m in modules if m is not None for p in m.parameters())
    return [shards for shards in map(shards_of, params) if shards is not None]


def _has_gradient(param: torch.nn.Parameter) -> bool:
    """Whether a backward of this batch has reached ``param`` on this rank."""
    one = trained_of(param)
    if one is None or not param.requires_grad:
        return False
    return param.grad is not None or one.index in one.store.seen


def _gradient(param: torch.nn.Parameter) -> torch.Tensor:
    """The tensor that holds it, to be changed in place; zeros where there was none."""
    one = trained_of(param)
    assert one is not None
    store = one.store
    taken = store.local(one.index)
    if taken is not None:
        return taken
    if param.grad is None:
        param.grad = torch.zeros_like(param)
    # A store that does not keep it whole leaves it in the parameter until it is reduced, unless it widens it.
    if not store.keeps_whole and store.dtype == store.partition.dtype:
        return param.grad
    store.accept(one.index, param.grad, keep_grad=store.keeps_whole)
    taken = store.local(one.index)
    assert taken is not None
    return taken
