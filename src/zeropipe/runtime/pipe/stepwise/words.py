"""Pipeline schedules in DeepSpeed's words: lists of instruction objects, one list per step of a stage.

    for instructions in TrainSchedule(micro_batches=4, stages=2, stage_id=0): ...

They say what 1F1B does (Narayanan et al., arXiv 2104.04473, section 2.2). Users read them, inherit from them, and give
their own to the engine, which runs what `translate` makes of them. Behind ``deepspeed.runtime.pipe.schedule``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any


class PipeInstruction:
    """One thing that a stage does; ``kwargs`` become attributes."""

    def __init__(self, **kwargs: Any) -> None:
        self.name, self.kwargs = type(self).__name__, kwargs
        for key, value in kwargs.items():
            setattr(self, key, value)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in self.kwargs.items())})"


class OptimizerStep(PipeInstruction):
    """Step the optimizer and zero the gradients."""


class ReduceGrads(PipeInstruction):
    """Reduce the gradients among the data-parallel ranks of this stage."""


class ReduceTiedGrads(PipeInstruction):
    """Reduce the gradients of tied layers among the stages that hold them."""


class BufferOpInstruction(PipeInstruction):
    """What works on buffer ``buffer_id``."""

    def __init__(self, buffer_id: int, **kwargs: Any) -> None:
        super().__init__(buffer_id=buffer_id, **kwargs)


class LoadMicroBatch(BufferOpInstruction):
    """Read a micro-batch into the buffer: inputs on the first stage, targets on the last."""


class ForwardPass(BufferOpInstruction):
    """Run the stage's layers on the buffer."""


class BackwardPass(BufferOpInstruction):
    """Run backward from the buffer's outputs and their gradients."""


class SendActivation(BufferOpInstruction):
    """Send the buffer's outputs to the next stage."""


class RecvActivation(BufferOpInstruction):
    """Receive the buffer's inputs from the previous stage."""


class SendGrad(BufferOpInstruction):
    """Send the gradients of the buffer's inputs to the previous stage."""


class RecvGrad(BufferOpInstruction):
    """Receive the gradients of the buffer's outputs from the next stage."""


class PipeSchedule(ABC):
    """What stage ``stage_id`` of ``stages`` does with ``micro_batches``; iterating gives the steps."""

    def __init__(self, micro_batches: int, stages: int, stage_id: int) -> None:
        self.micro_batches, self.stages, self.stage_id = micro_batches, stages, stage_id
        self.prev_stage, self.next_stage = stage_id - 1, stage_id + 1

    @abstractmethod
    def steps(self) -> Iterator[list[PipeInstruction]]:
        """The instructions of each step."""

    def num_pipe_buffers(self) -> int:
        """Buffers that are in use at once, at most."""
        return self.micro_batches

    def _valid_micro_batch(self, micro_batch_id: int) -> bool:
        return 0 <= micro_batch_id < self.micro_batches

    def _valid_stage(self, stage_id: int) -> bool:
        return 0 <= stage_id < self.stages

    def _buffer_idx(self, micro_batch_id: int) -> int:
        return micro_batch_id % self.num_pipe_buffers()

    @property
    def stage(self) -> int:
        return self.stage_id

    @property
    def num_stages(self) -> int:
        return self.stages

    @property
    def num_micro_batches(self) -> int:
        return self.micro_batches

    @property
    def is_first_stage(self) -> bool:
        return self.stage_id == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage_id == self.stages - 1

    def __iter__(self) -> Iterator[list[PipeInstruction]]:
        return iter(self.steps())


class InferenceSchedule(PipeSchedule):
    """Forward only: a micro-batch moves one stage a step, with two buffers in turn."""

    def num_pipe_buffers(self) -> int:
        return 2

    def steps(self) -> Iterator[list[PipeInstruction]]:
        for step in range(self.micro_batches + self.stages - 1):
            micro = step - self.stage_id
            # Even stages receive before they send and odd ones send first, so that no two wait for each other.
            receive: list[PipeInstruction] = []
            send: list[PipeInstruction] = []
            if self._valid_micro_batch(micro) and self._valid_stage(self.prev_stage):
                receive.append(RecvActivation(self._buffer_idx(micro)))
            if self._valid_micro_batch(micro - 1) and self._valid_stage(self.next_stage):
                send.append(SendActivation(self._buffer_idx(micro - 1)))
            instructions = send + receive if self.stage_id % 2 == 0 else receive + send
            if self._valid_micro_batch(micro):
                if self.is_first_stage or self.is_last_stage:
                    instructions.insert(0, LoadMicroBatch(self._buffer_idx(micro)))
                instructions.append(ForwardPass(self._buffer_idx(micro)))
            yield instructions
        # What the last step computed leaves one step later, and there is none: the last stage computes it.


class TrainSchedule(PipeSchedule):
    """1F1B. Stage s of S runs forward of micro-batch m at step 2m + s, and its backward at step 2m + 2S - 1 - s."""

    def num_pipe_buffers(self) -> int:
        """A stage waits for the backward of as many micro-batches as there are stages from it on."""
        return max(2, min(self.stages - self.stage_id, self.micro_batches))

    def _at(self, step: int) -> tuple[int, bool]:
        """(micro-batch, whether it is its forward) of a step; the micro-batch may be none that there is."""
        forward = (step - self.stage_id) % 2 == 0
        start = self.stage_id if forward else 2 * self.stages - 1 - self.stage_id
        return (step - start) // 2, forward

    def steps(self) -> Iterator[list[PipeInstruction]]:
        total = 2 * (self.micro_batches + self.stages - 1)
        for step in range(total):
            micro, forward = self._at(step)
            before, _ = self._at(step - 1)
            here, was = self._valid_micro_batch(micro), self._valid_micro_batch(before)
            instructions: list[PipeInstruction] = []
            # [1] What the step before made leaves, and what this one needs comes, over the same border.
            if forward and self._valid_stage(self.prev_stage):
                if was:
                    instructions.append(SendGrad(self._buffer_idx(before)))
                if here:
                    instructions.append(RecvActivation(self._buffer_idx(micro)))
            if not forward and self._valid_stage(self.next_stage):
                if here:
                    instructions.append(RecvGrad(self._buffer_idx(micro)))
                if was:
                    instructions.append(SendActivation(self._buffer_idx(before)))
            # [2] The computation.
            if here and forward:
                if self.is_first_stage or self.is_last_stage:
                    instructions.append(LoadMicroBatch(self._buffer_idx(micro)))
                instructions.append(ForwardPass(self._buffer_idx(micro)))
            elif here:
                instructions.append(BackwardPass(self._buffer_idx(micro)))
            # [3] The end of the batch.
            if step == total - 1:
                instructions += [ReduceTiedGrads(), ReduceGrads(), OptimizerStep()]
            yield instructions


class DataParallelSchedule(PipeSchedule):
    """One stage: plain training with accumulation."""

    def num_pipe_buffers(self) -> int:
        return 1

    def steps(self) -> Iterator[list[PipeInstruction]]:
        for step in range(self.micro_batches):
            instructions: list[PipeInstruction] = [LoadMicroBatch(0), ForwardPass(0), BackwardPass(0)]
            if step == self.micro_batches - 1:
                instructions += [ReduceGrads(), OptimizerStep()]
            yield instructions
