"""``zeropipe.run``: the loop around a training that is stopped, killed and started again, in one place.

    def train(run):
        engine, *_ = zeropipe.initialize(model=GPT(), training_data=text, config=config)
        for x, y in run.batches(engine, until=1000):        loads first, saves and stops between two steps
            engine.backward(engine(x, y))
            engine.step()

    zeropipe.run(train, "runs/gpt", save_every=100)

A boundary is the moment between two turns of the loop: the step is over, and so is what the program does after it::

    | turn: forward, backward, step, the program's own | boundary: stop? save? | turn ... | end: save
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from zeropipe.checkpoint.save import ownership, tags
from zeropipe.checkpoint.save.files import replace_text
from zeropipe.comm.group import init_distributed, world
from zeropipe.comm.launcher import follows, restarts, tell
from zeropipe.errors import CheckpointError, UsageError
from zeropipe.runtime.dataloader import RepeatingLoader

if TYPE_CHECKING:
    from zeropipe.runtime.engine.engine import DeepSpeedEngine
    from zeropipe.runtime.resilience.resume import Resumed

_log = logging.getLogger("zeropipe")
_FAILED = "zeropipe_failed.json"  # in the folder: how the last run that an error of its own ended has ended
_Result = TypeVar("_Result")


class Run:
    """What a training function is given: the loop over its steps.

    Attributes:
        state: values of the program's own (as ``client_state``), saved with every checkpoint; filled when the loop
            begins, over what the program has put there before.
        resumed: where the run goes on, once the loop has begun.
    """

    def __init__(
        self, folder: Path | None, save_every: int | None, keep: int | None, signals: Sequence[str]
    ) -> None:
        self.state: dict[str, Any] = {}
        self.resumed: Resumed | None = None
        self._folder, self._every, self._keep, self._signals = folder, save_every, keep, signals
        self._engine: DeepSpeedEngine | None = None
        self._saved_at = -1  # the step that the newest checkpoint is of

    def steps(self, engine: DeepSpeedEngine, until: int) -> Iterator[int]:
        """The steps that are left of ``until``, each by the number of those before it; one turn is one step.

        It begins with the newest good state, of memory or of the run's folder. Between two turns it saves every
        ``save_every`` steps and ends the run if somebody has asked for that. Collective.

        Raises UsageError where a turn takes no step, or more than one loop is begun.
        """
        self._begin(engine)
        while engine.global_steps < until:
            step = engine.global_steps
            yield step
            if engine.global_steps == step:
                raise UsageError(
                    f"run.steps: step {step} was not taken",
                    fix="call engine.step() to a boundary, or engine.train_batch(), in each turn of the loop",
                )
            self._boundary(engine, over=engine.global_steps >= until)

    def batches(self, engine: DeepSpeedEngine, until: int) -> Iterator[Any]:
        """As ``steps``, and each turn is a micro-batch of the engine's training data, which begins anew at its end.

        Raises UsageError where the engine has no training data.
        """
        if engine.training_dataloader is None:
            raise UsageError(
                "run.batches: the engine has no training data",
                fix="pass training_data= to initialize, or use run.steps and draw batches yourself",
            )
        data: RepeatingLoader | None = None
        for step in self.steps(engine, until):
            # Made after the engine was loaded, so that it begins where the data had come to.
            data = data or RepeatingLoader(engine.training_dataloader)
            while engine.global_steps == step:
                micro_step = engine.micro_steps
                yield next(data)
                if engine.micro_steps == micro_step:
                    raise UsageError(
                        f"run.batches: a micro-batch of step {step} was not used",
                        fix="call engine.step() after engine.backward(loss) in each turn of the loop",
                    )

    def save(self) -> None:
        """Save now, at the end of a turn. Collective. Raises UsageError outside of a loop, and without a folder."""
        engine, folder = self._engine, self._folder
        if engine is None or folder is None:
            raise UsageError(
                "run.save: there is no loop yet" if engine is None else "run.save: the run has no folder",
                fix='call it inside of run.steps, of zeropipe.run(train, "a/folder")',
            )
        if engine.save_checkpoint(folder, client_state=self.state):
            self._saved_at = engine.global_steps
            if self._keep is not None and world().rank == 0:
                _prune(folder, self._keep)

    def _begin(self, engine: DeepSpeedEngine) -> None:
        if self._engine is not None:
            raise UsageError(
                "run: a second loop",
                fix="use one loop for the whole run; engines beside its own are the program's to save and load",
            )
        self._engine = engine
        if self._folder is None and engine.stopping.folder is not None:
            self._folder = Path(engine.stopping.folder)
        engine.stopping.leave_to_caller()
        engine.stopping.arm(engine.stopping.named or self._signals)
        self.resumed = engine.resume(self._folder, client_state=self.state)
        self.state.update(self.resumed.client_state)
        self._saved_at = self.resumed.step if self.resumed.source == "disk" else -1

    def _boundary(self, engine: DeepSpeedEngine, over: bool) -> None:
        # Here and not where the step ends: copies hold what the turn has made of the program's own state.
        engine.copies.take()
        if engine.stopping.due and not over:  # what is over anyway needs no end from outside
            stopping, step = engine.stopping, engine.global_steps
            stopping.leave(engine.save_checkpoint, engine.copies.outlive, step, self._folder, self.state)
        if self._folder is not None and (over or (self._every and engine.global_steps % self._every == 0)):
            self.save()

    def finish(self) -> None:
        """The training has returned: save what was not saved, and leave signals to who heard them before."""
        engine = self._engine
        if engine is None:
            return
        if self._folder is not None:
            # A loop that was left early; of an engine that was destroyed nothing is there any more.
            if self._saved_at != engine.global_steps and engine.optimizer is not None:
                self.save()
            # The last one is what the run was for: whatever was tolerated before, without it the run is not over.
            with engine.checkpoints.saver.tolerance.suspended():
                if engine.optimizer is not None:
                    engine.checkpoints.saver.raise_pending(join=True)
                    if self._saved_at != engine.global_steps:
                        self.save()
                engine.wait_for_checkpoint()
            if world().rank == 0:
                with suppress(OSError):
                    (self._folder / _FAILED).unlink(missing_ok=True)
        engine.stopping.close()

    def failed(self, error: Exception) -> None:
        """The training has raised: say whose fault it is, and what it means for torchrun."""
        rank, engine = world().rank, self._engine
        if engine is not None:
            engine.copies.outlive()
        step = 0 if engine is None else engine.global_steps
        if follows(error):
            gone = "" if engine is None else engine.stopping.peers_gone(within=1.0)
            _log.error(
                "step %d has ended here: %s", step, gone or f"[rank {rank}] another rank has failed or died"
            )
            return
        tell(error)
        text = f"{type(error).__name__}: {error}"
        times = 1 + self._times(step, text)
        again = ""
        if times > 1:
            again = f", the same {times} times now: to start again has not helped, and hardly will"
        count, most = restarts()
        left = f"; torchrun may start the ranks anew {most - count} times" if most > count else ""
        _log.error("[rank %d] step %d has raised %s%s%s", rank, step, text, again, left)
        if self._folder is not None:
            with suppress(OSError):
                found = {"step": step, "error": text, "times": times, "rank": rank}
                replace_text(self._folder / _FAILED, json.dumps(found))

    def let_go(self) -> None:
        """Signals go to who heard them before: no boundary will come, and whoever catches the error may go on."""
        if self._engine is not None:
            self._engine.stopping.close()

    def _times(self, step: int, text: str) -> int:
        """How often this error has ended this step before."""
        if self._folder is not None:
            with suppress(OSError, ValueError, AttributeError):
                found = json.loads((self._folder / _FAILED).read_text(encoding="utf-8"))
                if (found.get("step"), found.get("error")) == (step, text):
                    return int(found["times"])
        return 0


def _prune(folder: Path, keep: int) -> None:
    """Remove all but the newest checkpoints."""
    for path in tags.newest(folder, keep)[1]:
        try:
            ownership.remove_listed(path)
        except (OSError, CheckpointError) as error:
            _log.warning("an old checkpoint stays: %s", error)


def run(
    train: Callable[[Run], _Result],
    folder: str | Path | None = None,
    *,
    save_every: int | None = None,
    keep: int | None = None,
    signals: Sequence[str] = ("SIGTERM", "SIGUSR1"),
) -> _Result:
    """Train to the end, however often the ranks are stopped, die and are started again; collective over all ranks.

    Call it in a script that ``torchrun --max-restarts N`` starts (or none: one rank, started anew by hand). ``train``
    makes an engine and goes through its steps with ``run.steps`` or ``run.batches``.

    Args:
        train: called once, with a `Run`.
        folder: of the checkpoints; None: only copies in memory, if the configuration asks for them.
        save_every: steps from one checkpoint to the next; None: at the end, and when the run is stopped.
        keep: how many of the newest checkpoints stay; None: all.
        signals: after which the run saves and ends, unless the configuration names some ("checkpoint.on_signal").

    Returns what ``train`` returned, once the last checkpoint is whole.

    Raises:
        SystemExit: the run was stopped by a signal or its time limit, and is saved; its code is for the scheduler.
        UsageError: as ``Run.steps``; and whatever ``train`` raises. torchrun then starts all ranks anew.
    """
    init_distributed()
    for name, number in (("save_every", save_every), ("keep", keep)):
        if number is not None and number < 1:
            raise UsageError(f"run: {name}", expected="at least 1, or None", found=number)
    loop = Run(None if folder is None else Path(folder), save_every, keep, signals)
    try:
        result = train(loop)
        loop.finish()
    except Exception as error:
        loop.failed(error)
        loop.let_go()  # not before: what is said of a rank that has died is not to be cut off by a signal
        raise
    return result
