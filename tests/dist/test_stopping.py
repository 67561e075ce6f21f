"""A run that is asked to stop: which ranks know when, what it costs a step, what is saved and how the process ends."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import zeropipe
from tests.helpers import survivor
from tests.helpers.pool import Pools
from zeropipe.comm.record import Event, record
from zeropipe.errors import CheckpointError, ConfigError, UsageError
from zeropipe.tensor.host import HOST

SIGNALS = {"on_signal": ["SIGTERM"]}


def engine_of(settings: dict[str, Any], stages: int = 1) -> Any:
    made = survivor.model() if stages == 1 else survivor.pipeline()
    return zeropipe.initialize(model=made, config=settings)[0]


def step(engine: Any, stages: int = 1) -> None:
    x, y = survivor.Rows()[slice(0, 2)]
    if stages > 1:
        engine.train_batch(iter([(x, y)] * 2))
        return
    for _ in range(2):
        x = x.to(next(engine.module.parameters()).dtype)
        engine.backward((engine(x) - y).square().mean())
        engine.step()


def events_of_a_step(rank: int, world: int, stage: int, stages: int) -> list[list[Event]]:
    found = []
    for section in ({}, SIGNALS):
        engine = engine_of(survivor.config(stage, checkpoint=section), stages)
        step(engine, stages)
        with record() as events:
            step(engine, stages)
        found.append(list(events))
        engine.destroy()
    return found


@pytest.mark.parametrize(("stage", "world", "stages"), [(0, 2, 1), (3, 2, 1), (1, 4, 2)])
def test_nobody_sends_a_message_to_ask(pool: Pools, stage: int, world: int, stages: int) -> None:
    for without, armed in pool(world).run(events_of_a_step, stage, stages):
        assert [event.label for event in without] == [event.label for event in armed]
        more = {b.label: b.bytes - a.bytes for a, b in zip(without, armed, strict=True) if a.bytes != b.bytes}
        norms = ["gradient norm", "gradient norm of all stages"][:stages]
        assert more == dict.fromkeys(norms, 8)


def ends(engine: Any, steps: int, stages: int = 1) -> tuple[int, Any]:
    """The steps that were done, and the exit code."""
    try:
        for _ in range(steps):
            step(engine, stages)
    except SystemExit as leave:
        return engine.global_steps, leave.code
    finally:
        engine.destroy()
    return engine.global_steps, None


def is_stopped(
    rank: int,
    world: int,
    folder: str,
    stage: int,
    stages: int,
    section: dict[str, Any],
    asked: int,
    odd: dict[str, Any] | None = None,
) -> Any:
    section = {**SIGNALS, **section, "folder": folder}
    settings = survivor.config(stage, checkpoint=section) | (odd or {})
    engine = engine_of({key: value for key, value in settings.items() if value is not None}, stages)
    step(engine, stages)
    if rank == asked:
        os.kill(os.getpid(), signal.SIGTERM)
    return ends(engine, 3, stages)


@pytest.mark.native
@pytest.mark.parametrize(("stage", "world", "stages"), [(0, 3, 1), (3, 2, 1), (1, 4, 2)])
def test_one_rank_is_asked_and_all_end_at_the_same_step(
    pool: Pools, tmp_path: Path, stage: int, world: int, stages: int
) -> None:
    """In a pipeline the rank that is asked is of another stage and another replica than some."""
    ended = pool(world).run(is_stopped, str(tmp_path), stage, stages, {}, world - 1)
    assert ended == [(2, 143)] * world
    assert (tmp_path / "latest").read_text() == "global_step2"
    said = pool(world).outputs()
    assert f"the run is stopped by SIGTERM (rank {world - 1}): step 2 is saved in {tmp_path}" in said[0]
    assert not any("stopped" in text for text in said[1:])


ODD = {
    "compressed": {
        "optimizer": {"type": "OnebitAdam", "params": {"lr": 0.01, "freeze_step": 1}},
        "scheduler": None,
    },
    "fp16": {
        "fp16": {"enabled": True, "initial_scale_power": 32}
    },  # no step is taken, and the run ends all the same
    "slots": {"reproducible": {"slots": 4}, "gradient_accumulation_steps": None},
}


@pytest.mark.parametrize("kind", list(ODD))
def test_whatever_a_step_does_the_word_is_heard(pool: Pools, tmp_path: Path, kind: str) -> None:
    assert pool(2).run(is_stopped, str(tmp_path), 0, 1, {}, 1, ODD[kind]) == [(2, 143)] * 2


def test_the_exit_code_is_the_schedulers(pool: Pools, tmp_path: Path) -> None:
    assert pool(2).run(is_stopped, str(tmp_path), 1, 1, {"exit_code": 85}, 0) == [(2, 85)] * 2


def runs_out_of_time(rank: int, world: int, folder: str) -> Any:
    os.environ["JOB_END"] = "0" if rank == 1 else str(2**40)  # clocks, and what hosts were told, may differ
    section = {"save_before": "JOB_END", "folder": folder}
    return ends(engine_of(survivor.config(1, checkpoint=section)), 3)


def test_a_run_ends_before_its_time_is_up(pool: Pools, tmp_path: Path) -> None:
    assert pool(2).run(runs_out_of_time, str(tmp_path)) == [(1, 143)] * 2
    assert (tmp_path / "latest").read_text() == "global_step1"
    assert "stopped by the end of its time (rank 1)" in pool(2).outputs()[0]


def looks_a_step_later(rank: int, world: int, folder: str) -> Any:
    with HOST.afar():
        engine = engine_of(survivor.config(2, checkpoint={**SIGNALS, "folder": folder}))
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return ends(engine, 5)


def test_on_a_device_the_sum_of_a_step_is_looked_at_after_the_next(pool: Pools, tmp_path: Path) -> None:
    assert pool(2).run(looks_a_step_later, str(tmp_path)) == [(2, 143)] * 2


def saves_where_it_has_saved(rank: int, world: int, folder: str) -> Any:
    engine = engine_of(survivor.config(1, checkpoint=SIGNALS))
    engine.stopping.client_state = lambda: {"mine": [1, 2]}
    step(engine)
    if folder:
        engine.save_checkpoint(folder)
    os.kill(os.getpid(), signal.SIGTERM)
    ended = ends(engine, 3)
    again = engine_of(survivor.config(1))
    _, state = again.load_checkpoint(folder) if folder else (None, None)
    again.destroy()
    return ended, state


def test_without_a_folder_it_is_where_the_program_has_saved(pool: Pools, tmp_path: Path) -> None:
    assert pool(2).run(saves_where_it_has_saved, str(tmp_path)) == [((2, 143), {"mine": [1, 2]})] * 2
    assert pool(2).run(saves_where_it_has_saved, "") == [((2, 143), None)] * 2
    assert "nothing is saved: set 'checkpoint.folder'" in pool(2).outputs()[0]


def loops_that_are_wrong(rank: int, world: int) -> list[str]:
    def takes_no_step(run: zeropipe.Run) -> None:
        for _ in run.steps(engine, until=3):
            pass

    def two_loops(run: zeropipe.Run) -> None:
        for _ in run.steps(engine, until=1):
            step(engine)
        for _ in run.steps(engine, until=2):
            step(engine)

    def has_no_data(run: zeropipe.Run) -> None:
        for _ in run.batches(engine, until=1):
            pass

    def uses_no_batch(run: zeropipe.Run) -> None:
        for _ in run.batches(with_data, until=3):
            pass

    def saves_nowhere(run: zeropipe.Run) -> None:
        run.save()

    engine = engine_of(survivor.config(1))
    with_data = zeropipe.initialize(
        model=survivor.model(), training_data=survivor.Rows(), config=survivor.config(1)
    )[0]
    said = []
    for wrong in (takes_no_step, two_loops, has_no_data, uses_no_batch, saves_nowhere):
        with pytest.raises(UsageError) as error:
            zeropipe.run(wrong)
        said.append(str(error.value))
    with pytest.raises(UsageError, match="save_every"):
        zeropipe.run(two_loops, save_every=0)
    engine.destroy()
    with_data.destroy()
    return said


def test_a_loop_that_is_none_is_named(pool: Pools) -> None:
    wanted = [
        "step 0 was not taken",
        "a second loop",
        "the engine has no training data",
        "a micro-batch of step 0 was not used",
        "there is no loop yet",
    ]
    for said in pool(1).run(loops_that_are_wrong):
        assert all(part in text for part, text in zip(wanted, said, strict=True)), said


def leaves_early(rank: int, world: int, folder: str) -> Any:
    def train(run: zeropipe.Run) -> str:
        run.state["best"] = 1
        engine = zeropipe.initialize(
            model=survivor.model(), training_data=survivor.Rows(), config=survivor.config(1)
        )[0]
        for number in run.steps(engine, until=5):
            step(engine)
            run.state["seen"] = number
            if number == 2:
                break
        return f"{run.resumed.source} {sorted(run.state.items())}"

    return zeropipe.run(train, folder, save_every=1, keep=2), signal.getsignal(
        signal.SIGTERM
    ) == signal.SIG_DFL


def test_a_loop_that_is_left_early_is_saved_and_what_train_returns_is_returned(
    pool: Pools, tmp_path: Path
) -> None:
    assert pool(2).run(leaves_early, str(tmp_path)) == [("nothing [('best', 1), ('seen', 2)]", True)] * 2
    assert (tmp_path / "latest").read_text() == "global_step3"
    assert sorted(path.name for path in tmp_path.glob("global_step*")) == ["global_step2", "global_step3"]
    again = pool(2).run(leaves_early, str(tmp_path))
    assert again == [("disk [('best', 1), ('seen', 4)]", True)] * 2


def is_asked_in_a_run(rank: int, world: int, folder: str, section: dict[str, Any]) -> Any:
    engine = engine_of(survivor.config(1, checkpoint=section))

    def train(run: zeropipe.Run) -> None:
        for number in run.steps(engine, until=3):
            if number == 1 and rank == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            step(engine)

    try:
        zeropipe.run(train, folder)
    except SystemExit as leave:
        return leave.code
    finally:
        engine.destroy()
    return None


@pytest.mark.parametrize("section", [{"save_before": 10**6}, {"on_signal": ["SIGUSR2", "SIGTERM"]}])
def test_a_run_hears_signals_whatever_else_the_configuration_says(
    pool: Pools, tmp_path: Path, section: dict[str, Any]
) -> None:
    """A time limit alone left SIGTERM to the system, which ended the run without a save."""
    assert pool(2).run(is_asked_in_a_run, str(tmp_path), section) == [143] * 2
    assert (tmp_path / "latest").read_text() == "global_step2"


def ends_without_a_checkpoint(rank: int, world: int, folder: str, asynchronous: bool) -> list[str]:
    section = {"tolerate_failed_saves": 9, "async_save": asynchronous}
    engine = engine_of(survivor.config(1, checkpoint=section))

    def train(run: zeropipe.Run) -> None:
        for _ in run.steps(engine, until=3):
            step(engine)

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr("zeropipe.checkpoint.save.saver.write", full)
        with pytest.raises(CheckpointError) as error:
            zeropipe.run(train, folder, save_every=1)
    zeropipe.run(train, folder)  # what passes is over when the ranks have begun anew
    engine.destroy()
    return [str(error.value), *sorted(path.name for path in Path(folder).glob("global_step*"))]


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_whose_last_checkpoint_fails_does_not_end_well(
    pool: Pools, tmp_path: Path, asynchronous: bool
) -> None:
    """It returned, and its copies in memory were taken away: nothing of it was left."""
    for text, *names in pool(2).run(ends_without_a_checkpoint, str(tmp_path), asynchronous):
        assert "No space left on device" in text
        assert names == ["global_step3"]


def raises_in_a_run(rank: int, world: int) -> Any:
    def train(run: zeropipe.Run) -> None:
        engine = engine_of(survivor.config(1))
        for _ in run.steps(engine, until=3):
            raise ValueError("no step")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="no step"):
        zeropipe.run(train)
    return signal.getsignal(signal.SIGTERM) == before


def test_a_run_that_raises_gives_the_signals_back(pool: Pools) -> None:
    """A notebook or a sweep that catches the error could not be stopped any more."""
    assert pool(2).run(raises_in_a_run) == [True] * 2


def lets_go(rank: int, world: int) -> list[bool]:
    before, heard = signal.getsignal(signal.SIGTERM), []
    engine = engine_of(survivor.config(1, checkpoint={"on_signal": True}))
    heard.append(signal.getsignal(signal.SIGTERM) == before)
    del engine
    gc.collect()
    heard.append(signal.getsignal(signal.SIGTERM) == before)
    return heard


def test_an_engine_that_is_only_let_go_of_gives_the_signals_back(pool: Pools) -> None:
    """Its handler noted SIGTERM for a boundary that no step would ever come to."""
    assert pool(2).run(lets_go) == [[False, True]] * 2


def test_the_configuration_knows_signals() -> None:
    from zeropipe.config.parse import parse_config

    base = survivor.config(0)
    parsed = parse_config({**base, "checkpoint": {"on_signal": True, "save_before": 55}}).checkpoint
    assert parsed.on_signal == ("SIGTERM", "SIGUSR1")
    assert parsed.save_before == 55.0
    assert parse_config({**base, "checkpoint": {"on_signal": False}}).checkpoint.on_signal == ()
    with pytest.raises(ConfigError, match="on_signal"):
        parse_config({**base, "checkpoint": {"on_signal": ["SIGKILL"]}})
