"""What ranks say of themselves for the watchdog, and what follows from what all say: pure.

A rank WORKS, or it WAITS for others. Who waits is never at fault while somebody works, however long that takes:

    what the ranks say                                     who is named
    one works and has not moved for the limit              that one
    one says nothing for the limit                         that one: it is stopped, cut off, or keeps the interpreter
    one works and moves, the others wait for hours         nobody
    all wait, and none has moved for the limit             all: each with what it waits for
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from zeropipe.frozen import from_json, to_json
from zeropipe.runtime.resilience.sight import Place

Kind = Literal["works", "waits", "debugged", "over"]
_SHOWN = 4  # different stacks in one report


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank says of itself at a look."""

    number: int  # of the look
    kind: Kind
    doing: str
    idle: float  # s since it last moved, by its own clock
    stack: tuple[str, ...]  # of the thread that trains, outermost first
    place: Place

    def to_text(self) -> str:
        return json.dumps(to_json(self))


def beat_of(text: str) -> Beat:
    found: Beat = from_json(Beat, json.loads(text))
    return found


@dataclass(frozen=True, slots=True)
class Word:
    """What all ranks know: of whom it has been said, and whether the run ends for it."""

    told: tuple[int, ...] = ()
    all_wait: bool = False  # it has been said that nobody moves
    end: bool = False
    why: str = ""  # the run ends
    by: int = -1  # who said it last: two ranks that say the same at once must not write the same

    def to_text(self) -> str:
        return json.dumps(to_json(self))


def word_of(text: str) -> Word:
    if not text:
        return Word()
    found: Word = from_json(Word, json.loads(text))
    return found


@dataclass(frozen=True, slots=True)
class Verdict:
    stuck: tuple[int, ...]  # they do not move, and do not wait for others
    silent: tuple[int, ...]  # they say nothing
    all_wait: bool = False

    @property
    def named(self) -> tuple[int, ...]:
        return tuple(sorted({*self.stuck, *self.silent}))

    def __bool__(self) -> bool:
        return bool(self.named) or self.all_wait


def judge(beats: Mapping[int, Beat], silent: Collection[int], limit: float, size: int) -> Verdict:
    """``beats``: the latest of each rank that has one; ``silent``: whose are old; ``limit``: seconds."""
    live = {rank: beat for rank, beat in beats.items() if beat.kind != "over" and rank not in silent}
    stuck = [rank for rank, beat in live.items() if beat.kind == "works" and beat.idle >= limit]
    waits = [beat.kind == "waits" and beat.idle >= limit for beat in live.values()]
    # Of a rank that has not begun or is over nobody knows what it does.
    all_wait = len(live) == size > 1 and all(waits)
    return Verdict(tuple(sorted(stuck)), tuple(sorted(silent)), all_wait)


def report(
    verdict: Verdict, beats: Mapping[int, Beat], states: Mapping[int, str], limit: float, size: int
) -> str:
    """The text of a verdict: who is stuck, what each rank does, and the stacks that tell why. ``states``: what the
    kernel says of those that are silent."""
    lines = [_headline(verdict, states, limit)]
    for rank in range(size):
        beat = beats.get(rank)
        mark = "  <-- " + ("silent" if rank in verdict.silent else "stuck") if rank in verdict.named else ""
        if beat is None:
            lines.append(f"  rank {rank}: has said nothing yet{mark}")
        else:
            since = "" if beat.kind == "over" else f", for {beat.idle:.3g} s"
            seen = "when last heard: " if rank in verdict.silent else ""
            lines.append(
                f"  rank {rank} ({beat.place.name}, pid {beat.place.pid}): {seen}{beat.doing}{since}{mark}"
            )
    asked = verdict.named or tuple(beats)
    groups: dict[tuple[str, ...], list[int]] = {}
    for rank in asked:
        if rank in beats and beats[rank].stack:
            groups.setdefault(beats[rank].stack, []).append(rank)
    for stack, ranks in list(groups.items())[:_SHOWN]:
        lines.append(f"  the thread that trains on {_ranks(ranks)}, innermost call last:")
        lines += [f"    {frame}" for frame in stack]
    return "\n".join(lines)


def _headline(verdict: Verdict, states: Mapping[int, str], limit: float) -> str:
    parts = []
    if verdict.stuck:
        parts.append(f"{_stuck(verdict.stuck)}: no progress for {limit:.3g} s")
    for rank in verdict.silent:
        state = states.get(rank)
        why = f"its process is {state}" if state else "it, its host or the network to it is gone or stopped"
        parts.append(f"rank {rank} says nothing for {limit:.3g} s: {why}")
    if not parts:
        parts.append(
            f"no rank moves for {limit:.3g} s: each waits for others. Who does not have the call that the others "
            "have is who they wait for"
        )
    return "; ".join(parts)


def _ranks(ranks: Collection[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _stuck(ranks: Collection[int]) -> str:
    return f"{_ranks(ranks)} {'is' if len(ranks) == 1 else 'are'} stuck"


def removed(word: Word, by: int, waits: bool) -> Word:
    """``word`` once rank ``by`` moves again. ``waits``: all had waited."""
    told = tuple(other for other in word.told if other != by)
    return Word(told, word.all_wait and not waits, word.end, word.why, by)


def added(word: Word, verdict: Verdict, end: bool, by: int) -> Word:
    told: Any = tuple(sorted({*word.told, *verdict.named}))
    why = "no rank moves" if verdict.all_wait else _stuck(verdict.named)
    return Word(told, word.all_wait or verdict.all_wait, word.end or end, why if end else word.why, by)
