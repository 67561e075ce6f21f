"""The schedules in DeepSpeed's words: properties that any 1F1B has."""

from __future__ import annotations

from itertools import product
from types import ModuleType
from typing import Any

import pytest

from tests.unit.compat.conftest import deepspeed  # noqa: F401 - a fixture
from zeropipe.errors import ScheduleError, UsageError
from zeropipe.runtime.pipe.schedule import make_schedule
from zeropipe.runtime.pipe.stepwise import run, words
from zeropipe.runtime.pipe.stepwise.run import METHODS, InSteps
from zeropipe.runtime.pipe.stepwise.translate import Listed, translate

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


def test_instructions_show_their_arguments_and_own_ones_fit_in(deepspeed: ModuleType) -> None:  # noqa: F811
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


# ---- from lists to schedules ----


def told(lists: list[Any]) -> list[list[Listed]]:
    """What each stage's list says, as ranks tell it each other; ``lists``: schedules, or lists of steps."""
    table = InSteps._INSTRUCTION_MAP
    return [run._told(steps, [], table) for steps in lists]


def lists_of(kind: Any, micro: int, stages: int) -> list[list[Listed]]:
    return told([kind(micro, stages, stage) for stage in range(stages)])


@pytest.mark.parametrize(("micro", "stages"), SIZES)
def test_the_classic_lists_are_the_schedules_by_name(micro: int, stages: int) -> None:
    plan, places = translate(lists_of(words.TrainSchedule, micro, stages), "TrainSchedule")
    assert plan.ranks == make_schedule("1f1b", stages, micro).ranks
    assert [[p for p in line if p] for line in places] == [list(line) for line in plan.ranks]
    forward, _ = translate(lists_of(words.InferenceSchedule, micro, stages), "InferenceSchedule")
    assert forward.ranks == make_schedule("inference", stages, micro).ranks
    if stages == 1:
        alone, _ = translate(lists_of(words.DataParallelSchedule, micro, 1), "DataParallelSchedule")
        assert [str(step) for step in alone.ranks[0]] == [f"0{op}{m}" for m in range(micro) for op in "FB"]


@pytest.mark.parametrize(("micro", "stages"), SIZES)
def test_any_schedule_written_as_lists_comes_back(micro: int, stages: int) -> None:
    """Another order than 1F1B: one buffer a micro-batch, and each message where it is made or needed."""
    plan = make_schedule("gpipe", stages, micro)
    names = {"F": words.ForwardPass, "B": words.BackwardPass}
    before = {"F": (words.RecvActivation, 1), "B": (words.RecvGrad, -1)}
    after = {"F": (words.SendActivation, 1), "B": (words.SendGrad, -1)}
    written = []
    for stage, line in enumerate(plan.ranks):
        steps = []
        for step in line:
            op, m, own = step.op.value, step.micro_batch, []
            if op == "F" and stage in (0, stages - 1):
                own.append(words.LoadMicroBatch(m))
            if 0 <= stage - before[op][1] < stages:
                own.append(before[op][0](m))
            own.append(names[op](m))
            if 0 <= stage + after[op][1] < stages:
                own.append(after[op][0](m))
            steps.append(own)
        written.append(steps)
    assert translate(told(written), "mine")[0].ranks == plan.ranks


def without(kind: str, stage: int, which: int = 0, micro: int = 3, stages: int = 3) -> list[list[Listed]]:
    """1F1B, but for one instruction of one stage."""
    lists = lists_of(words.TrainSchedule, micro, stages)
    at = [i for i, one in enumerate(lists[stage]) if one.kind == kind][which]
    del lists[stage][at]
    return lists


MISSING = {
    ("LoadMicroBatch", 0): r"stage 0 is wrong at step 0, ForwardPass.*LoadMicroBatch\(buffer_id=0\) before it",
    ("LoadMicroBatch", 2): r"stage 2 is wrong at step 2, ForwardPass.*the labels of micro-batch 0",
    ("RecvActivation", 1): r"stage 1 is wrong at step 1, ForwardPass.*RecvActivation\(buffer_id=0\) before it",
    ("ForwardPass", 0): r"stage 0 is wrong at step 1, SendActivation.*ForwardPass\(buffer_id=0\) before it",
    ("ForwardPass", 2): r"stage 2 is wrong at step 3, BackwardPass.*ForwardPass\(buffer_id=0\) before it",
    ("SendActivation", 0): r"stage 2 is wrong at step 2, ForwardPass.*labels of micro-batch 1.*leaves one out",
    ("RecvGrad", 1): r"stage 1 is wrong at step 4, BackwardPass.*RecvGrad\(buffer_id=0\) before it",
    ("BackwardPass", 1): r"stage 1 is wrong at step 5, SendGrad.*BackwardPass\(buffer_id=0\) before it",
    ("SendGrad", 2): r"stage 2 is wrong at step 4, RecvAct.*from stage 1, found it waits too, at step 4 in RecvGrad",
    ("OptimizerStep", 1): r"OptimizerStep once at the end of every stage.*\[1, 0, 1\]",
}  # fmt: skip


@pytest.mark.parametrize(("kind", "stage"), MISSING)
def test_what_is_missing_is_named_with_its_step(kind: str, stage: int) -> None:
    with pytest.raises(ScheduleError, match=MISSING[kind, stage]):
        translate(without(kind, stage), "mine")


@pytest.mark.parametrize(
    "kind", sorted(words.__dict__.keys() & METHODS.keys() - {"ReduceGrads", "ReduceTiedGrads"})
)
@pytest.mark.parametrize("stage", range(3))
def test_a_list_that_lacks_anything_is_refused_and_never_hangs(kind: str, stage: int) -> None:
    lists = lists_of(words.TrainSchedule, 3, 3)
    for which in range(sum(one.kind == kind for one in lists[stage])):
        with pytest.raises(ScheduleError, match=r"Fix: |OptimizerStep"):
            translate(without(kind, stage, which), "mine")


def test_what_does_not_fit_is_refused() -> None:
    lists = lists_of(words.TrainSchedule, 2, 2)
    with pytest.raises(ScheduleError, match=r"stage 1 .*SendActivation.*none there"):
        translate([lists[0], [*lists[1], Listed("SendActivation", 0, 9)]], "mine")
    sends = lists_of(words.InferenceSchedule, 1, 2)[0]
    with pytest.raises(ScheduleError, match=r"RecvActivation of micro-batch 0, which was sent.*the end"):
        translate([sends, []], "mine")
    waits = [[Listed("RecvGrad", 0, 0)], [Listed("RecvActivation", 0, 0)]]
    with pytest.raises(
        ScheduleError, match=r"stage 1 .*RecvActivation.*stage 0, found it waits too, at step 0"
    ):
        translate(waits, "mine")
    early = [Listed("OptimizerStep", None, 0), *lists_of(words.DataParallelSchedule, 1, 1)[0]]
    with pytest.raises(ScheduleError, match=r"OptimizerStep\(\).*the end of the batch.*ForwardPass"):
        translate([early], "mine")


def test_an_instruction_that_nobody_knows_is_refused() -> None:
    class Mine(words.PipeInstruction):
        pass

    class Wider(words.ForwardPass):
        pass

    with pytest.raises(UsageError, match=r"nobody knows what Mine does.*_INSTRUCTION_MAP\[Mine\]"):
        told([[[Mine()]]])
    with pytest.raises(
        UsageError, match=r"step 1 of the schedule; expected a list of PipeInstructions, found 7"
    ):
        told([[[], [7]]])
    assert told([[[Wider(4)]]]) == [[Listed("ForwardPass", 4, 0)]]
    assert run._told([[Mine(x=1)]], [], {Mine: print}) == [Listed("Mine", None, 0)]
