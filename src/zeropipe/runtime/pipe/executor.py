"""Runs one rank's line of a schedule: each instruction has one method, and no schedule is known by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch

from zeropipe.runtime.pipe.containers import flatten, rebuild
from zeropipe.runtime.pipe.instructions import COMPUTE, TRANSFER, Instruction, Op, Schedule
from zeropipe.runtime.pipe.p2p import Mailbox
from zeropipe.runtime.pipe.simulate import Event
from zeropipe.runtime.pipe.stage import Stage
from zeropipe.runtime.pipe.transfers import Message, known_taken, made_by, needed_by, queues


class Host(Protocol):
    """What an executor asks of whoever owns data, loss, shards and gradients."""

    def start(self) -> None:
        """Get the batch ready, before the first instruction."""

    def first_input(self, micro_batch: int) -> Any:
        """The input of the model."""

    def loss(self, micro_batch: int, output: Any) -> torch.Tensor | None:
        """What the last stage's output costs, scaled for backward; None where nothing is to be trained."""

    def unshard(self, stage: int) -> None:
        """Gather the parameters of ``stage``."""

    def reshard(self, stage: int) -> None:
        """Release them."""

    def reduce_grad(self, stage: int) -> None:
        """The gradients of ``stage`` are complete: reduce them over the data axis."""

    def reduce_tied(self, stage: int) -> None:
        """The tied gradients of ``stage`` are complete: sum them over the pipe axis."""


class Executor:
    """Runs this rank's line of ``schedule``, which has its transfers and stage instructions already.

    ``events`` holds what the latest run did, in seconds of this process's clock.
    """

    def __init__(
        self, schedule: Schedule, rank: int, stages: Mapping[int, Stage], mailbox: Mailbox, host: Host
    ) -> None:
        self.schedule, self._rank = schedule, rank
        self._stages, self._mailbox, self._host = stages, mailbox, host
        self._queues = queues(schedule)
        self._known_taken = known_taken(schedule)
        self._train = schedule.has_backward
        self._here: dict[Message, Any] = {}  # values between two stages of this rank
        self._seeds: dict[
            int, torch.Tensor
        ] = {}  # by micro-batch: the gradient of the loss with respect to itself
        self.events: list[Event] = []
        self.kept = True  # the latest run left no message under way and no collective half done
        self._start = 0.0  # of the step in progress
        self._methods: dict[Op, Callable[[Instruction], None]] = {
            Op.FORWARD: self._forward,
            Op.BACKWARD: self._backward,
            Op.BACKWARD_INPUT: self._backward,
            Op.BACKWARD_WEIGHT: self._backward_weight,
            Op.SEND_F: self._nothing,
            Op.SEND_B: self._nothing,
            Op.RECV_F: self._open,
            Op.RECV_B: self._open,
            Op.UNSHARD: lambda step: host.unshard(step.stage),
            Op.RESHARD: lambda step: host.reshard(step.stage),
            Op.REDUCE_GRAD: lambda step: host.reduce_grad(step.stage),
            Op.REDUCE_TIED: lambda step: host.reduce_tied(step.stage),
        }

    def run(self) -> None:
        """Do every instruction in order.

        A rank that fails computes nothing more but keeps its appointments: it answers for the messages that it owes,
        goes on with what is collective, takes the messages that it is owed, and raises then. `kept` says whether it
        could, so that ranks may agree to go on; what its gradients hold is worth nothing.
        """
        self.events, self.kept = [], False
        self._mailbox.begin(self._queues, self._known_taken)
        failure: BaseException | None = None
        try:
            failure = self._try(self._host.start)
            for step in self.schedule.ranks[self._rank]:
                self._start = time.perf_counter()
                if step.op not in COMPUTE and step.op not in TRANSFER:
                    self._methods[step.op](step)
                elif failure is None:
                    failure = self._try(partial(self._methods[step.op], step))
                    if step.op in COMPUTE:
                        self.events.append(Event(self._rank, step, self._start, time.perf_counter()))
            if failure is None:
                self._mailbox.finish()
            else:
                self._mailbox.clear()
        except BaseException as error:
            if failure is None:
                self._fail()
            self._mailbox.give_up()
            if failure is None:
                raise
            raise failure from error
        self.kept = True
        if failure is not None:
            raise failure

    def _try(self, do: Callable[[], None]) -> BaseException | None:
        try:
            do()
        except BaseException as error:
            self._fail()
            return error
        return None

    def _fail(self) -> None:
        self._mailbox.say_failed()
        for stage in self._stages.values():
            stage.drop()
        self._here.clear()
        self._seeds.clear()

    def _forward(self, step: Instruction) -> None:
        assert step.micro_batch is not None
        stage = self._stages[step.stage]
        need = needed_by(step, self.schedule.num_stages)
        if need is None:
            output = stage.forward(
                step.micro_batch, self._host.first_input(step.micro_batch), None, self._train
            )
        else:
            tree, tensors, wanted = self._take(need)
            output = stage.forward(step.micro_batch, rebuild(tree, tensors), wanted, self._train)
        made = made_by(step, self.schedule.num_stages)
        if made is None:
            loss = self._host.loss(step.micro_batch, output)
            if self._train and loss is not None:
                stage.hold_output(step.micro_batch, [loss])
                self._seeds[step.micro_batch] = torch.ones_like(loss)
            return
        tree, tensors = flatten(output, f"the output of stage {step.stage}")
        if self._train:
            stage.hold_output(step.micro_batch, tensors)
        self._give(made, tree, tensors)

    def _backward(self, step: Instruction) -> None:
        assert step.micro_batch is not None
        stage = self._stages[step.stage]
        need = needed_by(step, self.schedule.num_stages)
        grads = [self._seeds.pop(step.micro_batch)] if need is None else self._take(need)[1]
        whole = step.op is Op.BACKWARD
        backward = stage.backward if whole else stage.backward_input
        found = backward(step.micro_batch, grads)
        made = made_by(step, self.schedule.num_stages)
        if made is not None:
            self._give(made, "", found)

    def _backward_weight(self, step: Instruction) -> None:
        assert step.micro_batch is not None
        self._stages[step.stage].backward_weight(step.micro_batch)

    def _take(self, message: Message) -> tuple[str, list[torch.Tensor], list[bool]]:
        """What the neighbouring stage made: containers, tensors, and which of them want a gradient."""
        source = self.schedule.stage_rank[message.source]
        if source == self._rank:
            return self._here.pop(message)
        form, tensors = self._mailbox.receive(message, source)
        self._start = time.perf_counter()  # what was spent waiting is idle time, not the step's
        return form.tree, tensors, [t.needs_grad for t in form.tensors]

    def _give(self, message: Message, tree: str, tensors: list[torch.Tensor]) -> None:
        target = self.schedule.stage_rank[message.target]
        if target == self._rank:
            self._here[message] = tree, [t.detach() for t in tensors], [t.requires_grad for t in tensors]
        else:
            self._mailbox.send(message, target, tree, tensors)

    def _open(self, step: Instruction) -> None:
        message = needed_by(
            Instruction(step.stage, Op.FORWARD if step.op is Op.RECV_F else Op.BACKWARD, step.micro_batch),
            self.schedule.num_stages,
        )
        assert message is not None
        self._mailbox.open(message, self.schedule.stage_rank[message.source])

    def _nothing(self, step: Instruction) -> None:
        """A value is sent by the step that makes it; SEND marks the place for readers and the simulator."""
