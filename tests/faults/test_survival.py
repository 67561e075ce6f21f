"""Runs whose ranks are killed or stopped at random moments end with the bits of the run that was left alone.

A kill hits a collective by its number, or some milliseconds later, so that gathers, reductions, the step, saves and
the computing between them all have their share. Each life of a run is compared with the undisturbed one step by step
and rank by rank, so one run of many lives is as many proofs.
"""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import survivor
from tests.helpers.agent import Harm, Life, survive
from tests.helpers.survivor import Return

RANKS = 4
soak = pytest.mark.soak
ENDED_WITHIN = 5.0  # s from the first rank's end to the last one's
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
        when = chance.randrange(events), chance.choice([0.0, 0.002, 0.02]), number
        found.append([Harm(rank, *when) for rank in chance.sample(range(RANKS), together)])
    return found


def check(lives: list[Life], back: list[Return], most: int = 1) -> None:
    """Ranks end within seconds, and come back within seconds, with ``most`` steps to do again."""
    for life in lives[:-1]:
        assert max(life.ended.values()) - min(life.ended.values()) < ENDED_WITHIN * burden(), life.text()
        # Who follows says who has died, whatever it was doing; nobody takes that for an error of the program.
        assert "has raised" not in life.text(), life.text()
        for rank, code in life.codes.items():
            if code not in (0, -signal.SIGKILL):
                assert "died" in life.output[rank] or "initialize" in life.output[rank], life.text()
    assert all(one.repeated <= most and one.seconds < BACK_WITHIN * burden() for one in back), back


def burden() -> float:
    """How many times longer this machine takes than one that has nothing else to do."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def kills(lives: list[Life]) -> int:
    return sum(code == -signal.SIGKILL for life in lives for code in life.codes.values())


MEMORY = {"memory": {"every": 1}}


@pytest.mark.process
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_rank_that_is_killed_costs_one_step_at_most(tmp_path: Path, stage: int) -> None:
    """Five kills at each stage; the state comes from memory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        settings = survivor.config(stage, checkpoint={"memory": {"every": 1, "folder": memory}})
        lives, back = disturbed(tmp_path, settings, 30, moments(stage, 5, 20), save_every=None)
        assert not os.listdir(memory), "nothing is left of a run that has ended well"
    assert kills(lives) >= 5
    check(lives, back)
    assert {one.source for one in back} <= {"memory", "nothing"}


# Stage, pipeline stages, dtype.
KINDS = [(0, 1, "fp32"), (1, 1, "bf16"), (2, 1, "fp32"), (3, 1, "fp32"), (3, 1, "bf16"), (1, 2, "fp32")]


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("stage", "stages", "dtype"), KINDS)
def test_a_hundred_kills(tmp_path: Path, stage: int, stages: int, dtype: str, seed: int) -> None:
    """24 runs of five kills each, a quarter of them from disk. ``-rP`` shows the figures."""
    harms = moments(100 + seed, 5, 30)
    section, save_every = (MEMORY, None) if seed else ({}, 1)
    settings = survivor.config(stage, dtype, checkpoint=section)
    lives, back = disturbed(tmp_path, settings, 40, harms, stages=stages, save_every=save_every)
    told = [line for life in lives for text in life.output.values() for line in text.splitlines()]
    hit = [line for line in told if line.startswith("harmed at")]
    times = [round(one.seconds, 2) for one in back]
    sources = Counter(one.source for one in back)
    print(
        f"figures: {kills(lives)} kills, {sources}, repeated {[o.repeated for o in back]}, s {times}, {hit}"
    )
    assert kills(lives) >= 4
    check(lives, back)


@pytest.mark.soak
@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_at_once(tmp_path: Path, stage: int) -> None:
    """On one host, whose memory they share, and from disk."""
    for section in (MEMORY, {}):
        (folder := tmp_path / str(len(section))).mkdir()
        settings = survivor.config(stage, checkpoint=section)
        harms = moments(200 + stage, 4, 30, together=2)
        lives, back = disturbed(folder, settings, 40, harms, save_every=None if section else 1)
        at_once(lives, back)


def at_once(lives: list[Life], back: list[Return]) -> None:
    assert kills(lives) >= 5
    check(lives, back)


@pytest.mark.process
@pytest.mark.parametrize(
    "stage", [2, pytest.param(0, marks=soak), pytest.param(1, marks=soak), pytest.param(3, marks=soak)]
)
def test_ranks_that_do_not_come_back_are_done_without(tmp_path: Path, stage: int) -> None:
    """Four ranks, three and four again, one killed each time; slots give them the bits of four ranks alone."""
    settings = survivor.config(stage, reproducible={"slots": 12}, checkpoint=MEMORY)
    del settings["gradient_accumulation_steps"]
    for name, worlds in (("alone", [4]), ("disturbed", [4, 3, 4])):
        (tmp_path / name).mkdir()
        at = 200 if stage == 3 else 30
        harms = [[Harm(1, at)], [Harm(2, at)]][: len(worlds) - 1]
        lives = survive(survivor.train, (str(tmp_path / name), settings, 24, None), worlds, harms)
        assert [life.world for life in lives] == worlds, lives[-1].text()
        assert lives[-1].well, lives[-1].text()
    back = survivor.returns(lives, tmp_path / "disturbed")
    check(lives, back)
    assert [one.source for one in back] == ["memory", "memory"]
    # Each rank's masters and moments: of three ranks they are others, but what came of them is not.
    alone, made = (survivor.digests(tmp_path / name, life) for name, life in (("alone", 0), ("disturbed", 2)))
    assert made == {at: digest for at, digest in alone.items() if at in made}
    assert (0, 24) in made


@pytest.mark.process
@pytest.mark.parametrize(
    ("stage", "stages", "own"),
    [
        (3, 1, False),
        (2, 1, True),
        pytest.param(1, 1, False, marks=soak),
        pytest.param(1, 2, False, marks=soak),
    ],
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
@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=soak)])
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
        # By its next collective, or by the agent's signal where that comes first.
        follows = lives[0].output[0]
        assert "step 3 has ended here: " in follows or "[rank 0] rank 1 has died" in follows
        assert "ValueError" not in follows
        assert max(lives[0].ended.values()) - min(lives[0].ended.values()) < 5
        # What torchrun ends with is the error of the rank that raised, not of one that only followed.
        assert (
            json.loads((folder / "error.json").read_text())["message"]["message"] == "ValueError: a bad batch"
        )
        told.append((folder / "zeropipe_failed.json").exists())
        if lasts == 3:
            assert "the same 3 times now" in last and "anew" not in last
    assert told == [False, True], "a run that ended well has forgotten how it failed"
