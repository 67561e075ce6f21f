"""Runs a user's list of instructions: what it computes by the executor, and at each instruction the function that the
engine's ``_INSTRUCTION_MAP`` has for it, so that users may wrap ours and add instructions of their own.

    executor   ...........  1F0 ..............................  1B0 .....   then the ranks agree, then
    list       Load, Recv,  ForwardPass,       Send, RecvGrad,  BackwardPass, Log, ReduceGrads    OptimizerStep
    functions  _exec_...    _exec_forward_pass      ...         _exec_backward_pass, the user's   _exec_optimizer_step
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch

from zeropipe.comm.collectives import all_gather_object
from zeropipe.comm.group import world
from zeropipe.errors import ScheduleError, UsageError
from zeropipe.runtime.pipe.instructions import Instruction, Schedule
from zeropipe.runtime.pipe.stepwise import words
from zeropipe.runtime.pipe.stepwise.translate import Listed, translate
from zeropipe.runtime.pipe.stepwise.words import PipeInstruction, PipeSchedule, TrainSchedule
from zeropipe.runtime.pipe.topology import PipelineParallelGrid

Kind = type[PipeInstruction]
Function = Callable[..., object]
Steps = Iterable[Sequence[PipeInstruction]]

# The built-in instructions, and the engine's method of each.
METHODS: Mapping[str, str] = {
    "OptimizerStep": "_exec_optimizer_step",
    "ReduceGrads": "_exec_reduce_grads",
    "ReduceTiedGrads": "_exec_reduce_tied_grads",
    "LoadMicroBatch": "_exec_load_micro_batch",
    "ForwardPass": "_exec_forward_pass",
    "BackwardPass": "_exec_backward_pass",
    "SendActivation": "_exec_send_activations",
    "RecvActivation": "_exec_recv_activations",
    "SendGrad": "_exec_send_grads",
    "RecvGrad": "_exec_recv_grads",
}
_COMPUTE = ("ForwardPass", "BackwardPass")


class InSteps:
    """What a pipeline's engine offers to those who give it schedules in DeepSpeed's form.

    ``_INSTRUCTION_MAP`` may be added to; an ``_exec_*`` method may be overridden by one that calls it.
    """

    _calls: Calls | None = None  # of the list under way
    _total_loss: torch.Tensor | None = None
    _take_step: Callable[[dict[str, Any] | None], None]

    def _aggregate_total_loss(self) -> torch.Tensor | None:
        """The loss of the latest list, fp32, [], averaged over micro-batches and replicas, on every rank."""
        return self._total_loss

    def _exec_optimizer_step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        self._take_step(lr_kwargs)

    def _exec_forward_pass(self, buffer_id: int) -> None:
        _compute(self._calls, "ForwardPass")

    def _exec_backward_pass(self, buffer_id: int) -> None:
        _compute(self._calls, "BackwardPass")

    def _nothing(self, buffer_id: int | None = None) -> None:
        """What the step does that makes the value or needs it, or the end of the batch."""

    _exec_load_micro_batch = _exec_reduce_grads = _exec_reduce_tied_grads = _nothing
    _exec_send_activations = _exec_recv_activations = _exec_send_grads = _exec_recv_grads = _nothing
    _INSTRUCTION_MAP: dict[Kind, Function] = {}  # noqa: RUF012 - users add to it


class Calls:
    """One run of this rank's list: the function of each instruction, in order."""

    def __init__(
        self,
        engine: Engine,
        listed: Sequence[tuple[PipeInstruction, str]],
        places: Sequence[Instruction | None],
    ) -> None:
        self._engine = engine
        self._waiting = [(one, kind, place) for (one, kind), place in zip(listed, places, strict=True)]
        self._effect: tuple[str, Callable[[], None]] | None = None  # what the function under way is to do

    def around(self, step: Instruction, effect: Callable[[], None]) -> None:
        """The executor has come to ``step``: call what the list has before it, then its function, which does it."""
        while self._waiting[0][2] is None:
            self._call()
        one, kind, place = self._waiting[0]
        assert place == step, "the executor keeps the list's order"
        self._effect = kind, effect
        self._call()
        if self._effect is not None:
            raise UsageError(
                f"the function of {one!r} came back without it",
                fix=f"let yours call the engine's own {METHODS[kind]}(buffer_id)",
            )

    def do(self, kind: str) -> None:
        """What the executor waits for, asked for by our own function."""
        found, self._effect = self._effect, None
        if found is None or found[0] != kind:
            raise _unlisted(kind)
        found[1]()

    def finish(self) -> None:
        """Call what follows the last computation; the optimizer's step waits until the ranks have agreed."""
        while self._waiting and self._waiting[0][1] != "OptimizerStep":
            self._call()

    def after(self) -> None:
        """All ranks came through: the optimizer's step, and what the list has after it."""
        while self._waiting:
            self._call()

    def _call(self) -> None:
        one, kind, _ = self._waiting.pop(0)
        function = _function_of(type(one), self._engine._INSTRUCTION_MAP)
        if function is None:  # a method, which a subclass of the engine may have overridden
            getattr(self._engine, METHODS[kind])(**one.kwargs)
        else:
            function(self._engine, **one.kwargs)


def _compute(calls: Calls | None, kind: str) -> None:
    if calls is None:
        raise _unlisted(kind)
    calls.do(kind)


def _unlisted(kind: str) -> UsageError:
    return UsageError(
        f"{METHODS[kind]} was called where the schedule has no {kind}",
        fix=f"yield {kind}(buffer_id) in the schedule's steps()",
    )


def _function_of(kind: Kind, table: Mapping[Kind, Function]) -> Function | None:
    """The user's function; None: the engine's method. Raises UsageError where there is neither."""
    for one in kind.__mro__:
        own = one.__name__ in METHODS and getattr(words, one.__name__) is one
        function = table.get(one)
        if function is not None and not (own and function is vars(InSteps)[METHODS[one.__name__]]):
            return function
        if own:
            return None
    raise UsageError(
        f"nobody knows what {kind.__name__} does",
        expected="a function of it in PipelineEngine._INSTRUCTION_MAP, or one of the built-in instructions",
        fix=f"PipelineEngine._INSTRUCTION_MAP[{kind.__name__}] = function(engine, **its arguments)",
    )


InSteps._INSTRUCTION_MAP.update({getattr(words, kind): vars(InSteps)[name] for kind, name in METHODS.items()})


class Engine(Protocol):
    """What is asked of the engine that a list is read for."""

    _INSTRUCTION_MAP: dict[Kind, Function]

    @property
    def micro_batches(self) -> int: ...
    @property
    def num_stages(self) -> int: ...
    @property
    def stage_id(self) -> int: ...


def train_schedule(engine: Engine) -> PipeSchedule:
    """This rank's list of a step: 1F1B. As the engine's method it may be overridden, and ``train_batch`` runs that."""
    return TrainSchedule(engine.micro_batches, engine.num_stages, engine.stage_id)


def own_schedule(method: Callable[[], Steps]) -> Steps | None:
    """What the engine's ``_train_schedule`` returns where it is a user's; None where it is ours."""
    return None if getattr(method, "__func__", None) is train_schedule else method()


def read(given: Steps, engine: Engine, grid: PipelineParallelGrid, stages: int) -> tuple[Schedule, Calls]:
    """The schedule of which ``given`` is this rank's list, and the calls of this rank; collective over the world.

    Raises UsageError, on every rank, where a rank's list cannot be read or the ranks of a stage have other lists, and
    ScheduleError where the lists do not fit each other.
    """
    mine: list[tuple[PipeInstruction, str]] = []
    told: list[Listed] | str = []
    failure: Exception | None = None
    try:
        if stages != grid.pipe_parallel_size:
            raise UsageError(
                "a list of steps is of one stage a rank", found=f"{stages} stages", fix="use set_schedule"
            )
        told = _told(given, mine, engine._INSTRUCTION_MAP)
    except Exception as error:  # told first: the others wait for this rank's list
        failure, told = error, f"{type(error).__name__}: {error}"
    everyone: list[tuple[int, list[Listed] | str]] = all_gather_object(
        (grid.stage_id, told), world(), label="lists of steps"
    )
    if failure is not None:
        raise failure
    lists: dict[int, list[Listed]] = {}
    for rank, (stage, found) in enumerate(everyone):
        if isinstance(found, str):
            raise UsageError(
                f"rank {rank} could not read its schedule", found=found, fix="correct its steps()"
            )
        if lists.setdefault(stage, found) != found:
            raise UsageError(f"rank {rank} has another schedule than the other ranks of stage {stage}")
    plan, places = translate([lists[stage] for stage in range(stages)], type(given).__name__)
    if plan.has_backward and plan.micro_batches != engine.micro_batches:
        raise ScheduleError(
            "the schedule has another number of micro-batches than a step",
            expected=engine.micro_batches,
            found=plan.micro_batches,
            fix="make it with micro_batches=engine.micro_batches",
        )
    return plan, Calls(engine, mine, places[grid.stage_id])


def _told(
    given: Steps, mine: list[tuple[PipeInstruction, str]], table: Mapping[Kind, Function]
) -> list[Listed]:
    """``given`` for the others; its instructions go into ``mine``, each with the name of its kind."""
    found = []
    for number, step in enumerate(given):
        for one in step:
            if not hasattr(one, "kwargs"):
                raise UsageError(
                    f"step {number} of the schedule", expected="a list of PipeInstructions", found=repr(one)
                )
            _function_of(type(one), table)
            kinds = [kind.__name__ for kind in type(one).__mro__ if kind.__name__ in METHODS]
            kind = kinds[0] if kinds else type(one).__name__
            mine.append((one, kind))
            found.append(Listed(kind, getattr(one, "buffer_id", None), number))
    return found
