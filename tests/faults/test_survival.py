"""Runs whose ranks are killed or stopped at random moments end with the bits of the run that was left alone.

A kill hits a collective by its number, or some milliseconds later, so that gathers, reductions, the step, saves and
the computing between them all have their share. Each life of a run is compared with the undisturbed one step by step
and rank by rank, so one run of many lives is as many proofs.
"""

from __future__ import annotations

import json
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import survivor
from tests.helpers.agent import Harm, Life, survive
from tests.helpers.survivor import Return

RANKS = 4
BACK_WITHIN = 5.0  # s from the new processes' start until all ranks have done a step


def disturbed(
    folder: Path, settings: dict[str, Any], steps: int, harms: list[list[Harm]], **given: Any
) -> tuple[list[Life], list[Return]]:
    """Train alone, and again with harms; every step of every rank must have the same bits."""
    world = given.pop("world", RANKS)
    for name, those in (("alone", []), ("disturbed", harms)):
        (folder / name).mkdir()
        args = (str(folder / name), settings, steps, given.get("save_every", 1), given.get("stages", 1))
        lives = survive(survivor.train, (*args, given.get("own", False)), [world] * (len(those) + 2), those)
        assert lives[-1].well, lives[-1].text()
    alone, found = (survivor.digests(folder / name) for name in ("alone", "disturbed"))
    assert all(len(made) == 1 for made in found.values()), (
        "a step that was done again has made something else"
    )
    # A rank may end before it has said what a step has made; the last one all have said.
    assert {at: made for at, made in alone.items() if at in found} == found
    assert all((rank, steps) in found for rank in range(world))
    return lives, survivor.returns(lives, folder / "disturbed")


def moments(
    seed: int, lives: int, events: int, number: int = signal.SIGKILL, together: int = 1
) -> list[list[Harm]]:
    """For each of ``lives`` who is harmed when: within the first ``events`` collectives."""
    chance = random.Random(seed)
    found = []
    for _ in range(lives):
        ranks = chance.sample(range(RANKS), together)
        found.append(
            [Harm(r, chance.randrange(events), chance.choice([0.0, 0.002, 0.02]), number) for r in ranks]
        )
    return found


@pytest.mark.process
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_rank_that_is_killed_costs_one_step_at_most(tmp_path: Path, stage: int) -> None:
    """Five kills at each stage; the state comes from disk."""
    lives, back = disturbed(tmp_path, survivor.config(stage), 20, moments(stage, 5, 30))
    kills = sum(code == -9 for life in lives for code in life.codes.values())
    assert kills >= 5
    assert all(one.repeated <= 1 and one.seconds < BACK_WITHIN for one in back), back
    for life in lives[:-1]:
        assert max(life.ended.values()) - min(life.ended.values()) < 5, "the others end within seconds"


@pytest.mark.process
@pytest.mark.parametrize(
    ("stage", "stages", "own"), [(1, 1, False), (3, 1, False), (1, 2, False), (2, 1, True)]
)
def test_a_rank_that_is_stopped_loses_nothing(tmp_path: Path, stage: int, stages: int, own: bool) -> None:
    """SIGTERM five times, to one rank each; in a pipeline, and in a loop of the program's own."""
    section = {"on_signal": True, "folder": str(tmp_path / "disturbed")} if own else {}
    harms = moments(10 + stage, 5, 24 if stage == 3 else 6, signal.SIGTERM)
    settings = survivor.config(stage, checkpoint=section)
    lives, back = disturbed(tmp_path, settings, 20, harms, save_every=None, stages=stages, own=own)
    stops = [life for life in lives if not life.well]
    assert len(stops) >= 4
    assert all(set(life.codes.values()) == {143} for life in stops), Counter(
        str(life.codes) for life in stops
    )
    assert all(one.repeated <= 0 for one in back)  # a step after which a rank has left says nothing


@pytest.mark.process
@pytest.mark.parametrize("stage", [1, 3])
def test_an_error_that_passes_is_survived_and_one_that_stays_is_said(tmp_path: Path, stage: int) -> None:
    """Rank 1 raises in step 3, in the first two lives of the first run, in all three of the second."""
    told = []
    for lasts in (2, 3):
        folder = tmp_path / str(lasts)
        folder.mkdir()
        args = (str(folder), survivor.config(stage), 5, 1, 1, False, (1, 3, lasts))
        errors = {"TORCHELASTIC_ERROR_FILE": str(folder / "error.json")}
        lives = survive(survivor.train, args, [2] * 3, environment=errors)
        assert [life.well for life in lives] == [False, False, lasts == 2]
        first, second, last = (life.output[1] for life in lives)
        assert (
            "[rank 1] step 3 has raised ValueError: a bad batch; torchrun may start the ranks anew 2 times"
            in first
        )
        assert "the same 2 times now: to start again has not helped" in second
        assert "step 3 has ended here: " in lives[0].output[0] and "ValueError" not in lives[0].output[0]
        assert max(lives[0].ended.values()) - min(lives[0].ended.values()) < 5
        # What torchrun ends with is the error of the rank that raised, not of one that only followed.
        assert (
            json.loads((folder / "error.json").read_text())["message"]["message"] == "ValueError: a bad batch"
        )
        told.append((folder / "zeropipe_failed.json").exists())
        if lasts == 3:
            assert "the same 3 times now" in last and "anew" not in last
    assert told == [False, True], "a run that ended well has forgotten how it failed"
