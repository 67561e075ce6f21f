"""How ranks learn that they are about to do the same thing, before a difference can hang them.

A rank *says* a word (a label) to its peers before it does what needs them, without waiting. It *meets* them in the word
when it needs them: it waits until all have said theirs, and compares. It *leaves* with a last word when an error takes
it away. Guarded gathers say and meet on their own (``point_to_point.py``); callers only ``meet`` and ``leave``.

    rank 0                                      rank 1
    gather a, ahead:  shard of a, "a"  ------>
                                       <------  gather a:  shard of a, "a"
                                                use a:     hears "a" = "a", then waits for the shard
    use a:  hears "a" = "a", then waits for the shard
    gather b:         shard of b, "b"  ------>
                                       <------  meet:      "step"
    use b:  hears "step", not "b"               hears "b", not "step"
            DesyncError                         DesyncError

No rank waits for ever, whatever its control flow does. The words of a group on a channel are one sequence, and each
rank compares in that sequence, from its first word not yet compared. [1] to [7] below are the proof.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch

from zeropipe.comm.group import Group
from zeropipe.comm.host.giving_up import give_up
from zeropipe.comm.host.near import (
    NOTE_BYTES,
    TEXT_BYTES,
    NearTalk,
    NearWord,
    Relay,
    last_owed,
    near,
    packed,
    parted,
)
from zeropipe.comm.messages import WORDS, peers, start, tag_of
from zeropipe.comm.native import all_gather_object
from zeropipe.comm.record import SEAM, Call, Work
from zeropipe.errors import CommunicationError, DesyncError, describe

_Result = TypeVar("_Result")


def meet(
    what: str, group: Group, *, channel: int = 0, note: int = 0, patience: timedelta | None = None
) -> int:
    """Return when every member says the same ``what`` on this channel, where guarded gathers speak too.

    Returns the lowest of the members' notes. Raises DesyncError on every member when one is about to do something
    else, CommunicationError when one says nothing for as long as ``patience`` (None: the group's timeout). Without
    gloo it does nothing.
    """
    if group.size == 1 or not group.speaks:
        return note
    Call("meet", group, what).enter()
    return _met(TALKS.of(group, channel).say(what, note, patience))


def leave(
    what: str, group: Group, *, channel: int = 0, patience: timedelta | None = None
) -> Callable[[], int]:
    """Before this rank goes away with an error: say so to members that wait for it in a meeting or a guarded gather.

    With ``patience`` it also sends the second hops of the gathers that it has started, and waits so long for each word
    of them. The result meets the others, if they leave alike; it raises as ``meet``.
    """
    if group.size == 1 or not group.speaks:
        return lambda: 0
    # [4] Who goes away with an error has its last word in the sequence, which differs from any other: whoever comes to
    # that place hears it instead of waiting. It must outlive its sending, and who says it may not.
    talk = TALKS.of(group, channel)
    word = talk.leave(what, patience)
    SEAM.keep(word)
    if patience is not None:
        talk.hand_on(patience)
    return partial(_met, word)


def leave_all(
    what: str,
    error: BaseException,
    circles: Iterable[Group],
    met: Collection[Group],
    *,
    channel: int = 0,
    patience: timedelta | None = None,
) -> list[Callable[[], int]]:
    """``leave`` those of ``circles`` who do not know of ``error``, which takes this rank away from all of them.

    ``met``: the circles in which it was met, if it is one of the protocol itself. Never raises: the error says more.
    """
    # [7] An error of the protocol every member has at the same word, see [3]. To leave as well would be a word that
    # waits in the sequence for the members' next one, and parts them again.
    known = met if isinstance(error, DesyncError | CommunicationError) else ()
    left = []
    for circle in circles:
        if circle not in known:
            with suppress(Exception):  # connections may be gone
                left.append(leave(what, circle, channel=channel, patience=patience))
    return left


def _met(word: Word | NearWord) -> int:
    group = word.talk.group
    work = Work(f"[rank {group.ranks[group.rank]}] {word.text} (with ranks {list(group.ranks)})").after(word)
    work.wait()
    assert work.lowest_note is not None
    return work.lowest_note


class Talk:
    """The words that the members of one group say on one channel, in one order."""

    def __init__(self, group: Group, channel: int) -> None:
        self.group = group
        self.channel = channel
        self.partings = 0  # how often words were found to differ

        # Said here and not compared yet, oldest first: a gather may be ahead of its use, so that several are open.
        self._unmet: deque[Word] = deque()

    def say(
        self, text: str, note: int = 0, patience: timedelta | None = None, relay: Relay | None = None
    ) -> Word:
        """Tell every member what is about to be done. ``relay`` begins when the words are found equal."""
        word = Word(self, text, note, patience, relay)
        self._unmet.append(word)
        return word

    def leave(self, text: str, patience: timedelta | None) -> Word:
        """Say the last word of a rank that goes away with an error; never waits."""
        return self.say(text)

    def meet(self, word: Word) -> int:
        """The lowest of the members' notes on ``word``, once it and all words before it are found equal."""
        try:
            while word.lowest_note is None:
                if not self._unmet:
                    raise DesyncError(f"'{word.text}' was given up: ranks had gone different ways before it")
                self._unmet[0].compare()
                self._unmet.popleft()
        except BaseException as error:
            SEAM.keep(*self._unmet)
            if isinstance(error, DesyncError):
                # [3] All words before this one were equal on every member. So everybody who comes here raises here,
                # before it waits for what it gathers under it, and none waits for a relay. Everybody counts the
                # parting: what is said and gathered from now on carries tags that the leftovers do not meet.
                self.partings += 1 if self._unmet else 0
            else:
                for one in self._unmet:
                    if one.relay is not None:
                        one.relay.abort()
            self._unmet.clear()
            raise
        return word.lowest_note

    def hand_on(self, patience: timedelta) -> None:
        """What this rank owes in gathers that it has started, once every member has started them. Never raises."""
        # [5] A second hop is sent only when the first has arrived: by whatever this rank next waits for on the channel,
        # which compares the gather's word on its way. A rank that will wait for nothing more does it here.
        last = last_owed(self._unmet, patience)
        if last is not None:
            SEAM.keep(*self._unmet)
            with suppress(Exception):
                self.meet(last)

    def since_parting(self, label: str) -> str:
        """``label``, such that nothing under it meets what was sent before the members last went different ways: of a
        guarded gather that some did not take part in, messages stay on their way for ever."""
        return f"{label} after {self.partings} partings" if self.partings else label


class Word:
    """One member's word, on its way to the others, and theirs, on their way here."""

    def __init__(
        self, talk: Talk, text: str, note: int, patience: timedelta | None, relay: Relay | None
    ) -> None:
        self.talk = talk
        self.text = text
        self.relay = relay
        self._limit = () if patience is None else (patience,)
        self.lowest_note: int | None = None  # once compared
        self._note = note

        self._bytes = packed(text)
        mine = torch.frombuffer(bytearray(self._bytes + note.to_bytes(NOTE_BYTES)), dtype=torch.uint8)
        group, tag = talk.group, tag_of(talk.channel, WORDS, talk.partings)
        others = [] if group.imagined else peers(group)
        self._theirs = {peer: torch.empty_like(mine) for peer in others}
        sends = [(peer, mine) for peer in others]
        # [1] Handed over here and now, whether or not the peers are ready. Who waits for a word waits at most until its
        # peers say theirs: for their next gather, meeting or error.
        self._mine = mine  # is being sent
        self._handles = start(text, sends, self._theirs.items(), group, tag, soon=True, words=True)

    def meet(self) -> int:
        return self.talk.meet(self)

    def be_met(self, limit: timedelta) -> None:
        self._limit = (limit,)

    def compare(self) -> None:
        """Wait for this word of every member. Raises DesyncError for a peer that says another."""
        try:
            for handle in self._handles:
                handle.wait(*self._limit)
        except RuntimeError as error:
            give_up(self.talk.group, str(error))
            raise
        notes = [self._note]
        for peer, buffer in self._theirs.items():
            said = bytes(buffer.tolist())
            if said[:TEXT_BYTES] != self._bytes:
                raise parted(self.talk.group, self.text, peer, said[:TEXT_BYTES])
            notes.append(int.from_bytes(said[TEXT_BYTES:]))
        # [2] Every member has started the same, and sent its shards right before its word: what is waited for from here
        # on is under way.
        if self.relay is not None:
            self.relay.begin()
        # [6] Stage 3 notes how many reductions it has started. Those below the lowest note all have started, so they
        # may be waited for, even in the middle of backward. Of a later one a peer might not have sent its part,
        # because it waits for this rank in a gather.
        self.lowest_note = min(notes)


class Talks:
    """The talks of this process. Process groups belong to the process, and so does this."""

    def __init__(self) -> None:
        # By ranks, channel, and which process group of these ranks.
        self._talks: dict[tuple[tuple[int, ...], int, object], Talk] = {}
        self._near: dict[tuple[tuple[int, ...], int, object], NearTalk] = {}  # of those that share a host

    def of(self, group: Group, channel: int) -> Talk | NearTalk:
        """The one talk of this process group on ``channel``, whoever asks."""
        talk = self.on_board(group, channel)
        if talk is not None:
            return talk
        group = group.speaking or group
        key = group.ranks, channel, group.started
        if key not in self._talks:
            self._talks[key] = Talk(group, channel)
        return self._talks[key]

    def on_board(self, group: Group, channel: int) -> NearTalk | None:
        """The same, where the members share a host; None where they do not."""
        speaking = group.speaking
        if speaking is None or group.size == 1 or not near(speaking):
            return None
        key = speaking.ranks, channel, speaking.started
        if key not in self._near:
            self._near[key] = NearTalk(speaking, channel)
        return self._near[key]


TALKS = Talks()


def agree(items: Mapping[str, str], group: Group) -> None:
    """Return when ``items`` are equal on every member; one small collective, two when they differ.

    Raises DesyncError, on every member alike, that names the odd ranks and the first item that differs.
    """
    if group.size == 1:
        return
    text = json.dumps(list(items.items()))
    digests = all_gather_object(hashlib.sha256(text.encode()).hexdigest(), group, label="agree")
    if len(set(digests)) > 1:
        everyone: list[dict[str, str]] = all_gather_object(dict(items), group, label="agree")
        raise DesyncError(first_difference(everyone, group.ranks))


def together(
    group: Group,
    label: str,
    work: Callable[[], _Result],
    what: str,
    fix: str,
    *told: type[Exception],
) -> tuple[_Result | None, list[str]]:
    """What ``work`` gives on this rank, and the errors of all ranks: those of ``told`` say by themselves what is wrong.

    Whoever raised in between would leave the others waiting in the gather.
    """
    rank = group.ranks[group.rank]
    done, error = None, ""
    try:
        done = work()
    except told as reason:
        error = f"[rank {rank}] {reason}"
    except Exception as reason:
        error = describe(f"{what}: {type(reason).__name__}: {reason}", rank=rank, fix=fix)
    return done, [e for e in all_gather_object(error, group, label=label) if e]


def first_difference(everyone: list[dict[str, str]], ranks: tuple[int, ...]) -> str:
    """What the members disagree on first: pure, given every member's items."""
    for key in dict.fromkeys(key for items in everyone for key in items):
        values = [items.get(key, "(absent)") for items in everyone]
        if len(set(values)) == 1:
            continue
        usual, count = Counter(values).most_common(1)[0]
        odd = [(rank, value) for rank, value in zip(ranks, values, strict=True) if value != usual]
        names = ", ".join(f"rank {rank} has {_short(value)}" for rank, value in odd)
        agreed = f"{count} of {len(values)} ranks have {_short(usual)}"
        return f"ranks disagree on {key}: {names}; {agreed}. Fix: give every rank the same model and config"
    return "ranks disagree on the order of their items. Fix: build the model in the same order on every rank"


def _short(value: str, limit: int = 200) -> str:
    return repr(value if len(value) <= limit else value[:limit] + "...")
