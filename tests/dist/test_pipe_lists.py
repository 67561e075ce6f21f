"""Schedules that users write as lists of steps, in DeepSpeed's form, over the engine's own executor."""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import pytest
import torch

from tests.dist.pipe_models import specs
from tests.dist.test_pipe_engine import MICRO, config, data_of, engine_of
from tests.helpers.referee import assert_bitwise
from tests.helpers.zero3 import whole
from zeropipe.errors import CommunicationError, ScheduleError, UsageError
from zeropipe.runtime.pipe.engine import PipelineEngine
from zeropipe.runtime.pipe.stepwise import words

STEPS = 3


def lists(kind: Any, engine: Any, micro: int = MICRO) -> Any:
    return kind(micro_batches=micro, stages=engine.num_stages, stage_id=engine.stage_id)


def feed(engine: Any, step: int) -> Iterator[Any]:
    dp, replica = engine.grid.data_parallel_size, engine.grid.data_parallel_id
    return iter(data_of(step, replica, dp))


class AllForwardsFirst(words.TrainSchedule):
    """A user's own: GPipe, with a buffer for each micro-batch."""

    def num_pipe_buffers(self) -> int:
        return self.micro_batches

    def steps(self) -> Iterator[list[words.PipeInstruction]]:
        ends = self.is_first_stage or self.is_last_stage
        for m in range(self.micro_batches):
            load = [words.LoadMicroBatch(m)] if ends else []
            take = [] if self.is_first_stage else [words.RecvActivation(m)]
            give = [] if self.is_last_stage else [words.SendActivation(m)]
            yield [*load, *take, words.ForwardPass(m), *give]
        for m in range(self.micro_batches):
            take = [] if self.is_last_stage else [words.RecvGrad(m)]
            give = [] if self.is_first_stage else [words.SendGrad(m)]
            yield [*take, words.BackwardPass(m), *give]
        yield [words.ReduceTiedGrads(), words.ReduceGrads(), words.OptimizerStep()]


class Own(PipelineEngine):
    """As scripts write it: another schedule for train_batch."""

    def _train_schedule(self) -> Any:
        return lists(AllForwardsFirst, self)


def same_as_ours(rank: int, world: int, stage: int, tied: bool) -> None:
    pp, dp = 2, world // 2
    ours, mine, other, gpipe = (engine_of(pp, dp, specs(2, tied), config(stage)) for _ in range(4))
    other.__class__ = Own
    gpipe.set_schedule("gpipe")
    for step in range(STEPS):
        expected = ours.train_batch(feed(ours, step))
        mine.set_dataiterator(feed(mine, step))
        mine._exec_schedule(lists(words.TrainSchedule, mine))
        assert torch.equal(mine._aggregate_total_loss(), expected)
        assert torch.equal(other.train_batch(feed(other, step)), gpipe.train_batch(feed(gpipe, step)))
        # Forward only, as eval_batch runs it.
        mine.set_dataiterator(feed(mine, 50 + step))
        mine.eval()
        mine._exec_schedule(lists(words.InferenceSchedule, mine))
        assert torch.equal(mine._aggregate_total_loss(), ours.eval_batch(feed(ours, 50 + step)))
    for one, two in ((mine, ours), (other, gpipe)):
        assert (one.global_steps, one.micro_steps) == (STEPS, STEPS * MICRO)
        assert one.get_global_grad_norm() == two.get_global_grad_norm()
        assert_bitwise(whole(one.module), whole(two.module), f"stage {stage}")
    for engine in (ours, mine, other, gpipe):
        engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_list_that_says_the_same_gives_the_same_bits(pool, stage):
    pool(2).run(same_as_ours, stage, False)


def test_also_with_ties_and_replicas(pool):
    pool(4).run(same_as_ours, 1, True)


class Note(words.BufferOpInstruction):
    """A user's instruction, after each forward."""


class Noting(words.TrainSchedule):
    def steps(self) -> Iterator[list[words.PipeInstruction]]:
        for step in super().steps():
            forwards = [one for one in step if isinstance(one, words.ForwardPass)]
            yield [*step, *(Note(one.buffer_id, word="ran") for one in forwards)]


def functions(rank: int, world: int) -> None:
    """Own instructions and wrapped functions, in the order of the list; the bits stay."""
    ours, mine = (engine_of(2, 1, specs(2), config(1)) for _ in range(2))
    noted: list[str] = []

    class Timed(PipelineEngine):
        _INSTRUCTION_MAP = {  # noqa: RUF012
            **PipelineEngine._INSTRUCTION_MAP,
            Note: lambda engine, buffer_id, word: noted.append(f"{word} {buffer_id}"),
        }

        def _exec_forward_pass(self, buffer_id: int) -> None:
            noted.append("forward")
            super()._exec_forward_pass(buffer_id)

        def _exec_optimizer_step(self, lr_kwargs: Any = None) -> None:
            noted.append("step")
            super()._exec_optimizer_step(lr_kwargs)

    expected = ours.train_batch(feed(ours, 0))
    mine.__class__ = Timed
    mine._train_schedule = MethodType(lambda engine: lists(Noting, engine), mine)
    assert torch.equal(mine.train_batch(feed(mine, 0)), expected)
    buffers = lists(Noting, mine).num_pipe_buffers()
    assert noted == [w for m in range(MICRO) for w in ("forward", f"ran {m % buffers}")] + ["step"]

    # One that does nothing in its place, and one that raises on one rank: nobody steps, nobody hangs.
    def nothing(engine: Any, buffer_id: int) -> None: ...

    def raises(engine: Any, buffer_id: int) -> None:
        if rank == 1:
            raise ZeroDivisionError("mine")
        PipelineEngine._exec_forward_pass(engine, buffer_id)

    expect = {0: CommunicationError, 1: ZeroDivisionError}[rank]
    for function, kind in ((nothing, (UsageError, CommunicationError)), (raises, expect)):
        mine._INSTRUCTION_MAP = {**Timed._INSTRUCTION_MAP, words.ForwardPass: function}
        with pytest.raises(
            kind, match=r"came back without it.*_exec_forward_pass|failed in this batch|failed before|mine"
        ):
            mine.train_batch(feed(mine, 1))
        assert mine.global_steps == 1
    del mine._INSTRUCTION_MAP
    assert torch.equal(mine.train_batch(feed(mine, 1)), ours.train_batch(feed(ours, 1)))
    assert_bitwise(whole(mine.module), whole(ours.module))
    with pytest.raises(
        UsageError, match=r"_exec_forward_pass was called where the schedule has no ForwardPass"
    ):
        mine._exec_forward_pass(0)
    for engine in (ours, mine):
        engine.destroy()


def test_users_add_instructions_and_wrap_ours(pool):
    pool(2).run(functions)


def refused(rank: int, world: int) -> None:
    engine = engine_of(2, 1, specs(2), config(1))

    class Lacks(words.TrainSchedule):
        def steps(self) -> Iterator[list[words.PipeInstruction]]:
            for step in super().steps():
                # Only one rank's list lacks it: all learn which.
                yield [one for one in step if not (rank == 1 and isinstance(one, words.RecvActivation))]

    class Raises(words.TrainSchedule):
        def steps(self) -> Iterator[list[words.PipeInstruction]]:
            if rank == 1:
                raise KeyError("mine")
            return super().steps()

    class Unknown(words.TrainSchedule):
        def steps(self) -> Iterator[list[words.PipeInstruction]]:
            return iter([[Note(0)]])

    cases = (
        (lists(Lacks, engine), ScheduleError, r"stage 1 is wrong at step 1, ForwardPass.*RecvActivation"),
        (lists(words.TrainSchedule, engine, 3), ScheduleError, r"expected 4, found 3.*engine.micro_batches"),
        (lists(Raises, engine), KeyError if rank == 1 else UsageError, "mine"),
        (lists(Unknown, engine), UsageError, "nobody knows what Note does"),
        (5, TypeError, "not iterable"),
    )
    for given, kind, text in cases:
        with pytest.raises(kind, match=text):
            engine._exec_schedule(given)
        assert engine.global_steps == 0
    # Without its end a list leaves reduced gradients; the step is asked for by itself.
    whole_list = list(lists(words.TrainSchedule, engine))
    whole_list[-1] = [one for one in whole_list[-1] if not isinstance(one, words.OptimizerStep)]
    engine.set_dataiterator(feed(engine, 0))
    engine._exec_schedule(whole_list)
    assert engine.global_steps == 0
    engine._exec_optimizer_step()
    other = engine_of(2, 1, specs(2), config(1))
    assert torch.equal(other.train_batch(feed(other, 0)), engine._aggregate_total_loss())
    assert_bitwise(whole(engine.module), whole(other.module))
    for one in (engine, other):
        one.destroy()


def test_a_bad_list_is_refused_on_every_rank_and_the_engine_goes_on(pool):
    pool(2).run(refused)
