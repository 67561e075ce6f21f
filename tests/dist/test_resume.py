"""``engine.resume``: a run goes on from the newest good state that there is, and says which and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkpointing import make_engine, train
from tests.helpers.pool import Pools
from zeropipe.errors import CheckpointError


def goes_on(rank: int, world: int, folder: str | None, stage: int) -> Any:
    engine = make_engine(stage, seed=rank)
    found = engine.resume(folder)
    return (found.step, found.source, found.why, found.client_state), train(engine, 2, 0)


def saves(rank: int, world: int, folder: str, stage: int) -> list[float]:
    engine = make_engine(stage)
    for _ in range(2):
        train(engine, 1, 0)
        engine.save_checkpoint(folder, client_state={"epoch": engine.global_steps})
    return train(engine, 2, 0)


def test_where_there_is_nothing_a_run_begins(pool: Pools, tmp_path: Path) -> None:
    for folder in (None, str(tmp_path)):
        for (step, source, why, client), _ in pool(2).run(goes_on, folder, 1):
            assert (step, source, client) == (0, "nothing", {})
            assert (str(tmp_path) if folder else "no folder") in why


@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_goes_on_from_the_newest_good_checkpoint(pool: Pools, tmp_path: Path, stage: int) -> None:
    wanted = pool(2).run(saves, str(tmp_path), stage)[0]
    for told, losses in pool(2).run(goes_on, str(tmp_path), stage):
        assert told[:2] == (2, "disk") and told[3] == {"epoch": 2}
        assert str(tmp_path / "global_step2") in told[2]
        assert losses == wanted
    # A damaged one is passed over, at another number of ranks too.
    victim = next((tmp_path / "global_step2").glob("*optim_states.pt"))
    victim.write_bytes(victim.read_bytes()[:-1])
    for told, losses in pool(3).run(goes_on, str(tmp_path), stage):
        assert told[:2] == (1, "disk") and losses[1:] == pytest.approx(wanted[:1], rel=0.05)


def test_what_is_no_folder_is_an_error_on_every_rank(pool: Pools) -> None:
    assert pool(2).run(refused) == [True, True]


def refused(rank: int, world: int) -> bool:
    with pytest.raises(CheckpointError, match="a path"):
        make_engine(1).resume("" if rank else 3)
    return True
