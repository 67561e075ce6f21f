"""The schedules in DeepSpeed's words: properties that any 1F1B has."""

from __future__ import annotations

from itertools import product
from types import ModuleType
from typing import Any

import pytest

from zeropipe.compat import pipe_schedule as words

SIZES = list(product((1, 2, 3, 4, 7), (1, 2, 3, 5)))  # micro-batches, stages


def steps(kind: Any, micro: int, stages: int) -> list[list[list[words.PipeInstruction]]]:
    return [list(kind(micro, stages, stage)) for stage in range(stages)]


def kinds(instructions: list[words.PipeInstruction]) -> list[str]:
    return [one.name for one in instructions]


@pytest.mark.parametrize(("micro", "stages"), SIZES)
def test_every_micro_batch_passes_forward_and_backward_on_every_stage(micro: int, stages: int) -> None:
    for stage, own in enumerate(steps(words.TrainSchedule, micro, stages)):
        flat = [one for instructions in own for one in instructions]
        names = kinds(flat)
        assert len(own) == 2 * (micro + stages - 1)
        assert names.count("ForwardPass") == names.count("BackwardPass") == micro
        assert names.count("LoadMicroBatch") == (micro if stage in (0, stages - 1) else 0)
        assert (
            names.count("SendActivation") == names.count("RecvGrad") == (micro if stage < stages - 1 else 0)
        )
        assert names.count("RecvActivation") == names.count("SendGrad") == (micro if stage > 0 else 0)
        assert names[-3:] == ["ReduceTiedGrads", "ReduceGrads", "OptimizerStep"]
        # A buffer holds one micro-batch from its forward to its backward.
        busy: set[int] = set()
        for one in flat:
            if isinstance(one, words.ForwardPass):
                assert one.buffer_id not in busy
                busy.add(one.buffer_id)
            elif isinstance(one, words.BackwardPass):
                busy.remove(one.buffer_id)
        assert not busy


@pytest.mark.parametrize(("micro", "stages"), SIZES)
@pytest.mark.parametrize("kind", [words.TrainSchedule, words.InferenceSchedule])
def test_what_is_sent_in_a_step_is_received_in_it(kind: Any, micro: int, stages: int) -> None:
    pairs = {"SendActivation": ("RecvActivation", 1), "SendGrad": ("RecvGrad", -1)}
    every = steps(kind, micro, stages)
    for step in range(len(every[0])):
        for stage in range(stages):
            for name in kinds(every[stage][step]):
                if name in pairs:
                    other, away = pairs[name]
                    assert other in kinds(every[stage + away][step])
                if name in ("RecvActivation", "RecvGrad"):
                    assert {"RecvActivation": "SendActivation", "RecvGrad": "SendGrad"}[name] in kinds(
                        every[stage + (-1 if name == "RecvActivation" else 1)][step]
                    )


def test_a_stage_keeps_as_many_micro_batches_as_there_are_stages_from_it_on() -> None:
    assert [words.TrainSchedule(8, 4, stage).num_pipe_buffers() for stage in range(4)] == [4, 3, 2, 2]
    assert words.TrainSchedule(1, 4, 0).num_pipe_buffers() == 2
    assert words.InferenceSchedule(8, 4, 0).num_pipe_buffers() == 2


def test_one_stage_trains_with_accumulation() -> None:
    assert [kinds(step) for step in words.DataParallelSchedule(2, 1, 0)] == [
        ["LoadMicroBatch", "ForwardPass", "BackwardPass"],
        ["LoadMicroBatch", "ForwardPass", "BackwardPass", "ReduceGrads", "OptimizerStep"],
    ]


def test_instructions_show_their_arguments_and_own_ones_fit_in(deepspeed: ModuleType) -> None:
    from deepspeed.runtime.pipe import schedule  # type: ignore[import-not-found]

    class Mine(schedule.BufferOpInstruction):  # type: ignore[misc,name-defined]
        pass

    assert repr(Mine(3, chunk=1)) == "Mine(buffer_id=3, chunk=1)"
    assert Mine(3, chunk=1).chunk == 1
    assert schedule.TrainSchedule is words.TrainSchedule

    class Own(schedule.TrainSchedule):  # type: ignore[misc,name-defined]
        def steps(self):
            yield [Mine(0)]

    assert [repr(one) for (one,) in Own(4, 2, 0)] == ["Mine(buffer_id=0)"]
