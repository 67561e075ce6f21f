"""One rank's run, rehearsed: the real engine on a world in which nobody else is, for a few steps, computing nothing.

rehearse(program, place)          a child process: what it does to modules, environment and memory ends with it
  imagine(rank, world)            a process group of which only this rank is there
  Dry(ledger, work)               tensors have memory that is never written to
    program()                     the user's script, or a model and a batch
      initialize -> Watch         every phase of the engine names the moment, every step is counted
                    Enough        raised after the last step that was asked for
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
import torch._dynamo  # every rehearsal needs it: once here, not for two seconds in each child

from zeropipe.comm.collectives import carried_by
from zeropipe.comm.imagined import imagine
from zeropipe.comm.native import Native
from zeropipe.comm.point_to_point import PointToPoint
from zeropipe.comm.record import SEAM, Event
from zeropipe.config.parse import Source
from zeropipe.entry import OVERSEER
from zeropipe.errors import UsageError, ZeropipeError
from zeropipe.planning.beside import beside_a_host
from zeropipe.planning.dry import Dry
from zeropipe.planning.files import without_files
from zeropipe.planning.here import Here, gpus
from zeropipe.planning.ledger import ACTIVATIONS, BUILDING, ELSEWHERE, HOST, Ledger, Usage
from zeropipe.planning.scout import forms
from zeropipe.planning.work import Kernel, Work
from zeropipe.runtime.engine.engine import DeepSpeedEngine
from zeropipe.runtime.engine.report import owned
from zeropipe.runtime.pipe.instructions import Schedule
from zeropipe.runtime.pipe.module import PipelineModule
from zeropipe.runtime.zero.hold.policy import Place as Placement

_FEW_RANKS = 16  # up to which a world without a GPU is played message by message, as gloo carries it


class Enough(BaseException):
    """The steps that were asked for have been made. No ``Exception``: a program that catches those is to end, too."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which rank of which world, and on what: ``device`` is ``cpu`` or ``cuda``."""

    rank: int
    world: int
    ranks_per_node: int = 8
    device: str = "cpu"
    steps: int = 3
    memory: int = 0  # bytes of the device, for programs that ask

    @property
    def local(self) -> int:
        return self.rank % self.ranks_per_node

    def environment(self) -> dict[str, str]:
        """What torchrun would set."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.local),
            "LOCAL_WORLD_SIZE": str(min(self.ranks_per_node, self.world)),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": "0",
        }


@dataclass(slots=True)
class Rehearsal:
    """What one rank would hold, compute and send. Bytes; one entry of ``traffic`` and ``kernels`` for the last step."""

    place: Place
    built: Usage  # until ``initialize`` has returned
    trained: Usage  # from then on
    resting: dict[str, int]  # between two steps, by kind
    traffic: Counter[tuple[str, str, int, tuple[int, ...], str]] = field(default_factory=Counter)
    kernels: Counter[Kernel] = field(default_factory=Counter)
    settings: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0
    micro_steps: int = 1
    samples: int = 0  # of all ranks in one step
    schedule: Schedule | None = None  # of a pipeline, and the stages of it that this rank has
    stages: tuple[int, ...] = ()
    pipeline: tuple[int, str, int, int] | None = None  # its ranks, schedule by name, stages of each, layers
    middle: tuple[Counter[Any], Counter[Any]] | None = None  # of three micro-steps: its traffic and kernels

    @property
    def peak(self) -> Usage:
        return max(self.built, self.trained, key=lambda usage: usage.peak)

    @property
    def passing(self) -> tuple[int, int]:
        return max(self.built.passing, self.trained.passing)

    def longer(self, micro_steps: int) -> Rehearsal:
        """The same with so many micro-steps in a step: those that were not played are as the middle one."""
        more = micro_steps - self.micro_steps
        if not more:
            return self
        assert self.middle is not None
        traffic, kernels = Counter(self.traffic), Counter(self.kernels)
        for what, n in self.middle[0].items():
            traffic[what] += n * more
        for what, n in self.middle[1].items():
            kernels[what] += n * more
        return replace(
            self,
            traffic=traffic,
            kernels=kernels,
            micro_steps=micro_steps,
            samples=self.samples // self.micro_steps * micro_steps,
        )


class Watch:
    """Names what the program is doing, counts its steps, and ends it after the last."""

    def __init__(self, place: Place, ledger: Ledger, work: Work) -> None:
        self._place, self._ledger, self._work = place, ledger, work
        self._traffic: Counter[Any] = Counter()
        self.result: Rehearsal | None = None

        # The engine, once ``initialize`` has made it: when, and what was needed by then.
        self._engine: DeepSpeedEngine | None = None
        self.built: Usage | None = None
        self._built_at = 0
        self.steps = 0

        # Where the program is: the phases and modules that it is in, from the outside.
        self._names: dict[torch.nn.Module, str] = {}
        self._phases = ["building the model"]
        self._modules: list[str] = []
        # Of the last step, what was counted when each forward began.
        self._forwards: list[tuple[Counter[Any], Counter[Any]]] = []
        self._say()

    def heard(self, event: Event) -> None:
        self._traffic[event.op, event.label, event.bytes, event.ranks, self._phases[-1]] += 1

    def made(self, engine: DeepSpeedEngine) -> None:
        """``initialize`` has returned ``engine``; the last engine that a program makes is the one that is planned."""
        self._engine = engine
        self._ledger.name_all(placed(engine, self._place.device))
        self._ledger.rename(ACTIVATIONS, BUILDING)
        self.built, self._built_at = self._ledger.usage(), self._ledger.tick
        self._names = {module: name for name, module in engine.module.named_modules()}
        self._phases = ["between steps"]
        self._say()
        engine.report.watch(self)
        foresee = getattr(engine, "foresee", None)  # pipelines have it
        if foresee is not None:
            foresee(self._forms)

    def _forms(self, module: PipelineModule, inputs: Any) -> Any:
        with self._ledger.holding(ELSEWHERE):
            return forms(module, inputs)

    def began(self, phase: str) -> None:
        if phase == "forward" and self.steps == self._place.steps - 1:
            self._forwards.append((Counter(self._traffic), Counter(self._work.done)))
        self._phases.append(phase)
        self._say()

    def ended(self, phase: str) -> None:
        self._phases.pop()
        self._say()

    def stepped(self, losses: Sequence[torch.Tensor]) -> None:
        engine = self._engine
        assert engine is not None
        self._ledger.name_all(placed(engine, self._place.device))
        self.steps += 1
        if self.steps == self._place.steps:
            self._end(engine)
        # What is counted is the last step: the first make the optimizer's state and learn the order.
        self._traffic.clear()
        self._work.clear()

    def enter(self, module: torch.nn.Module, *_: Any) -> None:
        name = self._names.get(module)
        self._modules.append(name if name is not None else self._modules[-1] if self._modules else "")
        self._say()

    def leave(self, module: torch.nn.Module, *_: Any) -> None:
        if self._modules:
            self._modules.pop()
        self._say()

    def _say(self) -> None:
        where = f" of {self._modules[-1]}" if self._modules and self._modules[-1] else ""
        self._work.turn(self._phases[-1])
        self._ledger.say(self._phases[-1] + where)

    def _end(self, engine: DeepSpeedEngine) -> None:
        assert self.built is not None
        params = list(engine.module.parameters())
        self.result = Rehearsal(
            self._place,
            self.built,
            self._ledger.usage(since=self._built_at),
            self._ledger.resting(),
            self._traffic,
            self._work.done,
            engine._parts.config.settings(changed=True),
            sum(int(getattr(param, "ds_numel", param.numel())) for param in params),
            engine.gradient_accumulation_steps(),
            engine.train_batch_size(),
            getattr(engine, "schedule", None),
            tuple(getattr(engine.module, "stages", ())),
            self._pipeline(engine),
            self._middle(engine.gradient_accumulation_steps()),
        )
        # A loader that is left in the middle of an epoch would wait for its workers.
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise Enough

    def _middle(self, micro_steps: int) -> tuple[Counter[Any], Counter[Any]] | None:
        each = len(self._forwards) // micro_steps  # a program may call the engine twice
        if micro_steps < 3 or not each:
            return None
        (traffic, kernels), (later, more) = self._forwards[each], self._forwards[2 * each]
        return later - traffic, more - kernels

    @staticmethod
    def _pipeline(engine: DeepSpeedEngine) -> tuple[int, str, int, int] | None:
        module: Any = engine.module
        pick = getattr(module, "pick_schedule", None)  # pipelines have it
        return pick and (module.num_stages, *pick(engine._parts.config.pipeline), module.num_layers)


def placed(engine: DeepSpeedEngine, device: str) -> dict[str, list[torch.Tensor]]:
    """What ``engine`` holds from step to step, by kind; what offload has put beside a GPU under a name that says so.
    Here all of it lies in one memory, so the policy says what would lie where."""
    found, optimizer = owned(engine.module, engine.optimizer), engine.optimizer
    if optimizer is None:
        return found
    policy, named = optimizer.policy, dict[str, list[torch.Tensor]]()
    places = dict.fromkeys(("masters", "moments", "gradients"), policy.optimizer_place)
    places["parameters"] = policy.param_place
    for kind, tensors in found.items():
        away = HOST if device != "cpu" and places.get(kind) is Placement.HOST else ""
        named[away + kind] = tensors
    return named


@contextmanager
def staged(place: Place, config: Source | None, assume: float | None) -> Iterator[Watch]:
    """The stage on which a program plays ``place``. ``config``: in place of what the program gives ``initialize``."""
    ledger, work = Ledger(), Work()
    watch = Watch(place, ledger, work)
    before = dict(os.environ)
    os.environ.update(place.environment())
    hooks = [
        torch.nn.modules.module.register_module_forward_pre_hook(watch.enter),
        torch.nn.modules.module.register_module_forward_hook(watch.leave, always_call=True),
    ]
    by_message = place.device == "cpu" and place.world <= _FEW_RANKS
    try:
        with (
            imagine(place.rank, place.world),
            SEAM.listening(watch.heard),
            carried_by(PointToPoint() if by_message else Native()) if place.world > 1 else nullcontext(),
            OVERSEER.at_work(config, watch.made),
            gpus(place.device, place.local, min(place.ranks_per_node, place.world), place.memory),
            without_files(ledger),
            beside_a_host(place.device, ledger),
            Here(),
            Dry(ledger, work, assume),
        ):
            yield watch
    finally:
        for hook in hooks:
            hook.remove()
        os.environ.clear()
        os.environ.update(before)


def rehearse(
    program: Callable[[], object],
    place: Place,
    *,
    config: Source | None = None,
    assume: float | None = None,
) -> Rehearsal:
    """What ``place`` would hold, compute and send while ``program`` runs; in a child process (fork).

    Raises UsageError where the program fails or ends before its steps: it names the line of the program.
    """
    receiving, sending = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with TemporaryFile("w+", errors="replace") as said:
        child = os.fork()
        if child == 0:
            os.close(receiving)
            code = 1
            try:
                _play(program, place, config, assume, sending, said.fileno())
                code = 0
            finally:
                os._exit(code)
        os.close(sending)
        try:
            with os.fdopen(receiving, "rb") as pipe:
                data = pipe.read()
        except BaseException:  # Ctrl-C
            os.kill(child, signal.SIGKILL)
            raise
        finally:
            _, status = os.waitpid(child, 0)
        if not data:
            raise UsageError(
                f"the rehearsal of rank {place.rank} ended without a word",
                found=f"exit status {os.waitstatus_to_exitcode(status)}{_last(said.fileno())}",
                fix="plan in a process of its own, before anything else ran in this one",
            )
    found: Rehearsal | ZeropipeError = pickle.loads(data)
    if isinstance(found, BaseException):
        raise found
    return found


def _play(
    program: Callable[[], object], place: Place, config: Any, assume: float | None, out: int, said: int
) -> None:
    """In the child: play, and send back a Rehearsal or the error that ended it."""
    # What the program prints is of a run that did not happen, and would come once for each rank; what it complains of
    # is kept, for the case that it does not come to an end.
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - as long as the child lives
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(said, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    result: Rehearsal | BaseException
    try:
        with staged(place, config, assume) as watch:
            with suppress(Enough):
                program()
            if watch.result is None:
                raise UsageError(
                    "the program ended before it had made its steps",
                    expected=f"{place.steps} optimizer steps",
                    found=f"{watch.steps}" if watch.built else "no call of initialize",
                    fix="give it enough data for as many, or ask for fewer with --steps",
                )
            result = watch.result
    except ZeropipeError as error:
        result = error
    except (Exception, SystemExit) as error:
        result = UsageError(
            f"the program raised {type(error).__name__}: {error}",
            found=_line(error) + (_last(said) if isinstance(error, SystemExit) else ""),
            fix=_way_out(error),
        )
    with os.fdopen(out, "wb") as pipe:
        pipe.write(pickle.dumps(result))


def _last(said: int) -> str:
    """The last lines of a file, to follow what was found."""
    text = os.pread(said, 2000, max(0, os.fstat(said).st_size - 2000)).decode(errors="replace").strip()
    return text and ", after " + "\n".join(text.splitlines()[-3:])


def _way_out(error: BaseException) -> str:
    text = f"{type(error).__name__} {error}".lower()
    if isinstance(error, SystemExit):
        return "options of zeropipe plan stand before the script, its own behind it; let it make its steps"
    if isinstance(error, OSError):
        return "let it make its data, where it reads what is not here: from Python make_batch does"
    if any(word in text for word in ("cuda", "nvidia", "nccl")):
        return "leave out what only a device can answer, or plan from Python with make_model and make_batch"
    return "it is the program's own error, or of something that a rehearsal lacks: does it run on one rank?"


def _line(error: BaseException) -> str:
    """The innermost line of the program's own."""
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.path.dirname(os.__file__)
    frames = traceback.extract_tb(error.__traceback__)
    mine = [f for f in frames if "site-packages" not in f.filename and not f.filename.startswith(ours)]
    last = (mine or frames)[-1]
    return f"{last.filename}:{last.lineno}: {last.line}"
