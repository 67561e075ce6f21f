"""Contenders that live at the same time and take turns of a few steps, while the others wait on their standard input.

Whatever else the machine does then falls on all alike, and a turn is compared with the others' of its round.
A rank reads one line a turn, the number of its steps, and answers with one line, the mean seconds of a step.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
Rank = subprocess.Popen[str]


class Gone(Exception):
    """A rank ended before it answered; its error stream says why."""


def start(
    command: Sequence[str],
    ranks: int,
    port: int,
    environment: Mapping[str, str],
    errors: Path | None = None,
) -> list[Rank]:
    """One process per rank of one contender; ``errors``: the file that their error streams go to."""
    common = {**os.environ, **environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sink = None if errors is None else errors.open("w")
    try:
        return [
            subprocess.Popen(
                command,
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)},
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                text=True,
            )
            for rank in range(ranks)
        ]
    finally:
        if sink is not None:
            sink.close()


def answers(ranks: Sequence[Rank], line: str) -> list[str]:
    """What each rank says to ``line``; raises Gone where one says nothing."""
    for rank in ranks:
        assert rank.stdin is not None
        try:
            rank.stdin.write(f"{line}\n")
            rank.stdin.flush()
        except BrokenPipeError:
            raise Gone from None
    said = [rank.stdout.readline() if rank.stdout else "" for rank in ranks]
    if not all(said):
        raise Gone
    return said


def turn(ranks: Sequence[Rank], steps: int) -> float:
    """Let all ranks make ``steps`` steps; the mean time of one on the slowest rank."""
    return max(map(float, answers(ranks, str(steps))))


def play(
    sets: dict[str, list[Rank]],
    *,
    rounds: int,
    warm_up: int,
    steps: int,
    lost: Callable[[str], None],
    enough: Callable[[], bool] = lambda: False,
) -> dict[str, list[float]]:
    """Seconds of a step in every turn, by contender.

    A contender whose ranks are gone is named to ``lost`` and left out. No round is begun once ``enough()``.
    """
    found: dict[str, list[float]] = {}
    # The first steps, one contender after the other. The first round starts with the last one, and so on: nobody
    # always follows the same one.
    for round_ in range(-1, rounds):
        if round_ >= 0 and enough():
            break
        order = [who for who in sets if round_ < 0 or who in found]
        for who in order if round_ % 2 else order[::-1]:
            try:
                seconds = turn(sets[who], warm_up if round_ < 0 else steps)
            except Gone:
                found.pop(who, None)
                lost(who)
                continue
            turns = found.setdefault(who, [])
            if round_ >= 0:
                turns.append(seconds)
    return found


def end(sets: Mapping[str, Sequence[Rank]]) -> None:
    for rank in (rank for ranks in sets.values() for rank in ranks):
        rank.kill()
        rank.wait()


def python(module: str, *arguments: str, interpreter: str = sys.executable) -> list[str]:
    return [interpreter, "-m", module, *arguments]
