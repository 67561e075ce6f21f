"""Runs one rank's line of a schedule: a table says what each instruction does, and no schedule is known by name.

[1] a value comes in        from the data, from a stage of this rank, or out of the mailbox
[2] the stage computes      forward, a whole backward, or one half of it
[3] what it made goes on    into the loss, to a stage of this rank, or into the mailbox
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import torch

from zeropipe.errors import UsageError
from zeropipe.given import Tree
from zeropipe.runtime.pipe.batch import Batch
from zeropipe.runtime.pipe.instructions import (
    OF_STAGE,
    Instruction,
    Message,
    Op,
    Schedule,
    computes,
    known_taken,
    queues,
)
from zeropipe.runtime.pipe.p2p import Mailbox
from zeropipe.runtime.pipe.simulate import Event
from zeropipe.runtime.pipe.split_backward import Backward, Entry
from zeropipe.runtime.pipe.wire import Value, flatten, rebuild

Effect = Callable[[Instruction], None]


class Around(Protocol):
    """Somebody who is told of each computation and does it: see `stepwise`."""

    def around(self, step: Instruction, effect: Callable[[], None]) -> None: ...
    def finish(self) -> None: ...


class Stage:
    """One stage at work, for each micro-batch under way: ``forward``, then ``backward``, whole or in two halves.

    ``run``: the forward of its layers.
    """

    def __init__(self, number: int, run: Callable[[Any], Any]) -> None:
        self.number, self._run = number, run
        # What a micro-batch leaves here between its forward and the last of its backward.
        self._alive: dict[int, Backward] = {}

    @property
    def alive(self) -> int:
        """Micro-batches whose activations are held."""
        return len(self._alive)

    def begin(self, micro_batch: int, data: Tree, train: bool, leaves: Sequence[torch.Tensor] = ()) -> Any:
        """Run ``data`` through the layers as it is; gradients are wanted of ``leaves`` alone."""
        with torch.set_grad_enabled(train):
            output = self._run(data)
        if train:
            self._alive[micro_batch] = Backward(leaves)
        return output

    def forward(self, micro_batch: int, value: Value, train: bool) -> Any:
        """Run what the stage before has made through the layers."""
        flags = zip(value.tensors, value.wanted, strict=True)
        tensors = [t.detach().requires_grad_(train and wanted) for t, wanted in flags]
        data = rebuild(value.tree, [Entry.apply(t) if t.requires_grad else t for t in tensors])
        return self.begin(micro_batch, data, train, [t for t in tensors if t.requires_grad])

    def hold_output(self, micro_batch: int, tensors: Sequence[torch.Tensor]) -> None:
        """Remember the outputs that gradients will come for: those of ``tensors`` that require grad."""
        self._alive[micro_batch].expect(tensors)

    def backward(
        self, micro_batch: int, grads: Sequence[torch.Tensor], half: bool = False
    ) -> list[torch.Tensor]:
        """The whole backward or its first ``half``; gradients of the inputs that wanted one."""
        alive = self._alive[micro_batch]
        if len(grads) != len(alive.outputs):
            raise UsageError(
                f"stage {self.number} got gradients for another number of outputs (micro-batch {micro_batch})",
                expected=len(alive.outputs),
                found=len(grads),
                fix="let the layers return the same tensors on every call",
            )
        if half:
            return alive.first_half(grads)
        del self._alive[micro_batch]
        return alive.whole(grads)

    def backward_weight(self, micro_batch: int) -> None:
        """The second half: gradients of the weights."""
        self._alive.pop(micro_batch).second_half()

    def drop(self) -> None:
        """Forget every micro-batch under way, after a failure."""
        self._alive.clear()


class Executor:
    """Runs this rank's line of ``schedule``, which has its transfers and stage instructions already.

    ``table``: what the instructions that concern a whole stage do; one that it lacks does nothing. ``around``: is
    called for each computation, which it does, and when all are done. ``within``: makes what each computation of a
    micro-batch runs in.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        stages: Mapping[int, Stage],
        mailbox: Mailbox,
        table: Mapping[Op, Effect],
        around: Around | None = None,
        within: Callable[[int], AbstractContextManager[None]] | None = None,
    ) -> None:
        # The plan, the same in every run.
        self.schedule, self._rank = schedule, rank
        self._stages, self.mailbox = stages, mailbox
        self._queues, self._known_taken = queues(schedule), known_taken(schedule)
        self._train, self._around, self._within = schedule.has_backward, around, within
        self._table: dict[Op, Effect] = {
            Op.FORWARD: self._forward,
            Op.BACKWARD: self._backward,
            Op.BACKWARD_INPUT: self._backward,
            Op.BACKWARD_WEIGHT: self._backward_weight,
            Op.RECV_F: self._open,
            Op.RECV_B: self._open,
            # A value is sent by the step that makes it; SEND marks the place for readers and the simulator.
            **table,
        }

        # Under way within a run.
        self._batch: Batch | None = None
        self._here: dict[Message, Value] = {}  # between two stages of this rank
        self._seeds: dict[int, torch.Tensor] = {}  # by micro-batch: the gradient of the loss by itself
        self._start = 0.0  # of the step in progress

        self.events: list[Event] = []  # of the latest run, in seconds of this process's clock

    def run(self, batch: Batch) -> BaseException | None:
        """Do every instruction in order; what has failed, if ranks may still agree to go on.

        A rank that fails computes nothing more but keeps its appointments: it answers for the messages that it owes,
        goes on with what is collective, and takes the messages that it is owed. So no message is under way and no
        collective half done when this returns. Where a rank cannot keep them, this raises.
        """
        self.events, self._batch = [], batch
        self.mailbox.begin(self._queues, self._known_taken)
        line = self.schedule.ranks[self._rank]
        # One reduction for all stages of the rank: its buckets run over the borders of stages.
        reductions = [at for at, step in enumerate(line) if step.op is Op.REDUCE_GRAD]
        failure: BaseException | None = None
        try:
            failure = self._try(batch.load)
            for at, step in enumerate(line):
                self._start = time.perf_counter()
                effect = self._table.get(step.op)
                if effect is None or at in reductions[:-1]:
                    continue
                if step.op in OF_STAGE:
                    effect(step)  # outside of _try: the others are in this collective too, or will be
                elif failure is None:
                    do = partial(self._do, effect, step)
                    if self._around is not None and computes(step):
                        do = partial(self._around.around, step, do)
                    failure = self._try(do)
                    if computes(step):
                        self.events.append(Event(self._rank, step, self._start, time.perf_counter()))
            if failure is None and self._around is not None:
                failure = self._try(self._around.finish)
            # Appointments kept, every message has been sent and taken; else those that are still owed here are.
            if failure is None:
                self.mailbox.finish()
            else:
                self.mailbox.clear()
        except BaseException as error:
            if failure is None:
                self._fail()
            self.mailbox.give_up()
            if failure is None:
                raise
            raise failure from error
        return failure

    def _do(self, effect: Effect, step: Instruction) -> None:
        if self._within is None or step.micro_batch is None:
            effect(step)
            return
        with self._within(step.micro_batch):
            effect(step)

    def _try(self, do: Callable[[], None]) -> BaseException | None:
        try:
            do()
        except BaseException as error:
            self._fail()
            return error
        return None

    def _fail(self) -> None:
        # First the word to the others, who wait for it; then what this batch holds: its gradients are worth nothing.
        self.mailbox.say_failed()
        for stage in self._stages.values():
            stage.drop()
        self._here.clear()
        self._seeds.clear()

    def _forward(self, step: Instruction) -> None:
        m, stage = self._at(step)
        assert self._batch is not None
        # [1] in: the first stage takes data, the others what the stage before has made; [2] they compute
        need, made = self.schedule.needed_by(step), self.schedule.made_by(step)
        if need is None:
            output = stage.begin(m, self._batch.inputs(m), self._train)
        else:
            output = stage.forward(m, self._take(need), self._train)
        # [3] on: the last stage's output into the loss, the others' to the stage after
        if made is None:
            loss = self._batch.loss(m, output)
            if self._train and loss is not None:
                stage.hold_output(m, [loss])
                self._seeds[m] = torch.ones_like(loss)
            return
        value = flatten(output, f"the output of stage {step.stage}")
        if self._train:
            stage.hold_output(m, value.tensors)
        self._give(made, value.detached())

    def _backward(self, step: Instruction) -> None:
        m, stage = self._at(step)
        # [1] in: backward begins at the loss, or goes on from the stage after; [2] the layers
        need, made = self.schedule.needed_by(step), self.schedule.made_by(step)
        grads = [self._seeds.pop(m)] if need is None else self._take(need).tensors
        found = stage.backward(m, grads, half=step.op is Op.BACKWARD_INPUT)
        # [3] on: the first stage has nobody to tell
        if made is not None:
            self._give(made, Value("", found, [False] * len(found)))

    def _backward_weight(self, step: Instruction) -> None:
        m, stage = self._at(step)
        stage.backward_weight(m)

    def _open(self, step: Instruction) -> None:
        message = self.schedule.needed_by(step)
        assert message is not None, "a stage receives from its neighbours alone"
        self.mailbox.open(message)

    def _at(self, step: Instruction) -> tuple[int, Stage]:
        assert step.micro_batch is not None, "every step of a micro-batch names it"
        return step.micro_batch, self._stages[step.stage]

    def _take(self, message: Message) -> Value:
        if not message.crosses:
            return self._here.pop(message)
        value = self.mailbox.receive(message)
        self._start = time.perf_counter()  # what was spent waiting is idle time, not the step's
        return value

    def _give(self, message: Message, value: Value) -> None:
        if message.crosses:
            self.mailbox.send(message, value)
        else:
            self._here[message] = value
