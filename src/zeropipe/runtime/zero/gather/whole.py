"""The whole value of sharded parameters, for a while: to look at or to edit.

    enter   gather all, start first and wait last
    exit    modifier_rank=None   nothing may have been edited; an edit is an error, and the shards keep their value
            modifier_rank=r      what rank r edited reaches every rank and is cut into shards again

Both ends are collective. What every rank holds whole (at stages 0 to 2, and what is not trained) needs no
gather, but a script that is written for stage 3 lets one rank edit, so its values reach the others here too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from enum import IntEnum
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch.autograd.graph import get_gradient_edge

from zeropipe.comm.agreement import leave_all, meet
from zeropipe.comm.collectives import broadcast
from zeropipe.comm.group import Group
from zeropipe.errors import DesyncError, UsageError
from zeropipe.runtime.zero.gather.coordinator import in_backward
from zeropipe.runtime.zero.gather.edits import fingerprint, is_moved, take_moved
from zeropipe.runtime.zero.gather.shards import Shards, shards_among, shards_of
from zeropipe.runtime.zero.marks import register_external_parameter
from zeropipe.runtime.zero.param import GATHER, Need, holders, zero_param

Params = torch.nn.Parameter | torch.nn.Module | Iterable[torch.nn.Parameter | None] | None


class _Verdict(IntEnum):
    """What the modifier rank says of each parameter, as a byte on the wire."""

    SAME = 0
    EDITED = 1
    MISSHAPEN = 2


class _Sharded:
    """One parameter of one entry that is shards. ``edits``: whether edits are asked for."""

    def __init__(self, shards: Shards, edits: bool) -> None:
        # What it is. The parameter is kept alive, which its shards do not do.
        self.param, self.shards, self.name = shards.param, shards, shards.name
        self.group, self.shape, self.device = shards.everyone, shards.shape, shards.full.device

        # To see edits, and to undo them. ``before``: None where an outer context answers for them; ``kept``: the value,
        # where it stays gathered after the exit.
        answers = edits or shards.contexts == 0
        stays = shards.persist or shards.holds > 0
        self.kept = shards.full.clone() if answers and stays else None
        self.before = fingerprint(shards.full) if answers else None
        self.renewals = shards.renewals

        # Whether a graph of autograd, made since the entry, seems to hold the value. Graphs reach a parameter by its
        # edge, for which they need no value; torch holds it once more for each that saved it or a view of it.
        edge = get_gradient_edge(self.param) if self.param.requires_grad and not in_backward() else None
        self.in_graph = partial(_in_graph, self.param, edge, _references(self.param))

        self.hold = shards.hold(Need.CONTEXT)

    def verdict(self) -> _Verdict:
        if not self.shards.gathered or self.before is None:
            return _Verdict.SAME
        if is_moved(self.shards):
            return _Verdict.EDITED if self.param.data.shape == self.shape else _Verdict.MISSHAPEN
        return _Verdict.SAME if self.before.matches(self.shards.full) else _Verdict.EDITED

    def changed(self) -> bool:
        """Whether somebody wrote to the value since the entry, other than through the shards."""
        # An inner context or a step wrote: what is here is compared with the shards, not with the entry.
        renewed = self.shards.renewals != self.renewals
        if renewed and self.before is not None and self.shards.gathered and not is_moved(self.shards):
            return self.shards.numel > 0 and self.shards.differs()
        return self.shards.numel > 0 and self.verdict() is not _Verdict.SAME

    def restore(self) -> None:
        """The value at the entry, for those that stay gathered; the others are freed."""
        if not self.shards.gathered or self.before is None:
            return
        if self.kept is not None and self.shards.renewals == self.renewals:
            self.shards.full.copy_(self.kept)
        self.shards.present()

    def take(self, verdict: int, source: int) -> None:
        """The value that member ``source`` has, and has given ``verdict`` on."""
        if not self.shards.gathered:
            return
        if verdict == _Verdict.EDITED or (verdict == _Verdict.SAME and self.kept is not None):
            take_moved(self.shards)
            broadcast(self.shards.full, source, self.group, label=self.name)
            self.shards.write_back()
        self.shards.present()

    def keep_while_needed(self) -> None:
        """A graph reads the value later: it stays as long."""
        if self.shards.conductor is not None:
            # ``in_graph`` alone: this record would keep the copies of the value alive.
            self.shards.conductor.keep_for_graph(self.shards, self.in_graph)

    def let_go(self) -> None:
        if self.param.requires_grad and in_backward():
            _keep_for_gradient(self.shards)
        self.shards.release_if_idle()


class _Whole:
    """One parameter of one entry that every rank of ``group`` holds whole."""

    def __init__(self, param: torch.nn.Parameter, group: Group) -> None:
        known = zero_param(param)
        self.param, self.name = param, "" if known is None else known.name
        self.group, self.shape, self.device = group, param.shape, param.device

        # To see edits, and to undo them.
        self.place = param.data  # a view of the partition's buffer
        self.before = param.detach().clone()

    def verdict(self) -> _Verdict:
        here = self.param.data
        if here.shape != self.shape:
            return _Verdict.MISSHAPEN
        moved = here.data_ptr() != self.place.data_ptr()
        return _Verdict.EDITED if moved or not torch.equal(here, self.before) else _Verdict.SAME

    def restore(self) -> None:
        """The value at the entry."""
        if self.verdict() is not _Verdict.SAME:
            self._write(self.before)

    def take(self, verdict: int, source: int) -> None:
        if verdict != _Verdict.EDITED:
            self.restore()
            return
        value = self.param.data.clone() if self.group.rank == source else torch.empty_like(self.before)
        broadcast(value, source, self.group, label=self.name)
        self._write(value)

    def _write(self, value: torch.Tensor) -> None:
        # Through autograd's eyes, so that the masters learn of it as of any edit in place.
        self.param.data = self.place
        self.param.detach().copy_(value)


M = TypeVar("M", _Sharded, _Whole)


class GatheredParameters:
    """A context in which the given parameters are whole on every rank. Collective, at both ends.

    Args:
        params: a parameter, a module, or any iterable; None entries, plain parameters and repetitions are fine,
            and so is nothing at all.
        modifier_rank: the global rank whose edits count. Its values reach all ranks on exit; edits of other
            ranks are dropped. None: nobody edits.
        fwd_module: a module whose forward will use the parameters although they are not its own.
        enabled: False makes it do nothing.

    The fp32 master of an element that was not edited keeps its bits. After an exception in the body nothing is
    written. Where every rank holds a parameter of an engine whole (stages 0 to 2, frozen ones) nothing is gathered,
    but the modifier's values reach all ranks and the masters as well. Contexts nest; of the same parameter the
    outermost one frees it.

    Raises:
        UsageError: on exit, naming the parameter: it was edited without a modifier rank (the other ranks raise
            DesyncError), or its ``.data`` has another shape.
        DesyncError: ranks came here with different parameters.
    """

    def __init__(
        self,
        params: Params,
        modifier_rank: int | None = None,
        fwd_module: torch.nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        self.enabled = enabled
        self.modifier_rank = modifier_rank
        given = _given(params) if enabled else []
        self.params = [param for param in given if shards_of(param) is not None]
        # Of others only an edit is of interest: without a modifier rank each rank's value is its own affair.
        self._whole = [param for param in given if modifier_rank is not None and holders(param) is not None]
        self._entered: list[tuple[list[_Sharded], list[_Whole]]] = []  # innermost last
        if fwd_module is not None:
            own = {id(param) for param in fwd_module.parameters()}
            for param in self.params:
                if id(param) not in own:
                    register_external_parameter(fwd_module, param)

    def __enter__(self) -> GatheredParameters:
        sharded = shards_among(self.params)
        whole = [(param, group) for param in self._whole if (group := holders(param)) is not None]
        for group in [shards.everyone for shards in sharded] + [group for _, group in whole]:
            self._source(group)  # refuses a rank that does not hold it
        for shards in sharded:
            shards.start_gather()
        for shards in sharded:
            shards.finish_gather()
        # Only now: what is compared at the exit is the value that the body finds.
        edits = self.modifier_rank is not None
        held = [_Sharded(shards, edits) for shards in sharded]
        self._entered.append((held, [_Whole(param, group) for param, group in whole]))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        held, whole = self._entered.pop()
        for one in held:
            one.hold.release(free=False)
            # What was written in here is this context's affair, not one of a forward around it.
            one.shards.own_writes.look(one.shards)
        try:
            if error is not None:
                members: list[_Sharded | _Whole] = [*whole, *held]
                for member in members:
                    member.restore()
                groups = _by_group(held)
                said = f"GatheredParameters raised {type(error).__name__}"
                leave_all(said, error, groups, groups, channel=GATHER)
            elif self.modifier_rank is None:
                self._check(held)
                self._leave("leave GatheredParameters unedited", held)
            else:
                # The meeting first: a broadcast waits for its source, which may be on another way.
                self._leave(f"leave GatheredParameters of rank {self.modifier_rank}", held)
                self._spread(held)
                self._spread(whole)
        finally:
            for one in held:
                one.let_go()

    def _check(self, held: list[_Sharded]) -> None:
        """Raise UsageError where something was edited, and drop it; the other ranks raise DesyncError."""
        edited = [one for one in held if one.changed()]
        if not edited:
            return
        for one in edited:
            one.restore()
        names = ", ".join(f"'{one.name}'" for one in edited)
        # In place of the word with which the others leave, so that they hear of it there.
        for group in _by_group(held):
            with suppress(DesyncError):
                meet(f"edited without modifier_rank: {names}", group, channel=GATHER)
        group = edited[0].group
        raise UsageError(
            f"{names} edited inside GatheredParameters without a modifier rank; the edit is dropped",
            rank=group.ranks[group.rank],
            fix="say whose edit counts: GatheredParameters(params, modifier_rank=0)",
        )

    def _leave(self, what: str, held: list[_Sharded]) -> None:
        """Go on when every rank leaves; where graphs on all of them read the values later, they stay as long."""
        for group, members in _by_group(held).items():
            graph = torch.is_grad_enabled() and any(one.in_graph() for one in members)
            # The note is the lowest of all ranks': 1 only where every rank has such a graph, as what one keeps, all do.
            if meet(what, group, channel=GATHER, note=int(graph)):
                for one in members:
                    one.keep_while_needed()

    def _spread(self, held: Sequence[M]) -> None:
        """Give every rank the modifier's values; edits of other ranks are dropped. Collective."""
        for group, members in _by_group(held).items():
            source = self._source(group)
            assert source is not None
            # Where nothing was edited these bytes are all that travels.
            verdicts = torch.tensor([int(one.verdict()) for one in members], dtype=torch.uint8)
            verdicts = verdicts.to(members[0].device)
            broadcast(verdicts, source, group, label="edited parameters")
            for one, verdict in zip(members, verdicts.tolist(), strict=True):
                one.take(verdict, source)
            # Every rank has had the values of all others by now, and raises.
            for one, verdict in zip(members, verdicts.tolist(), strict=True):
                if verdict == _Verdict.MISSHAPEN:
                    raise UsageError(
                        f"parameter '{one.name}': its .data on rank {self.modifier_rank}",
                        expected=f"shape {tuple(one.shape)}",
                        found="another one",
                        fix="assign a new torch.nn.Parameter to the module instead",
                    )

    def _source(self, group: Group) -> int | None:
        """The modifier rank's index in ``group``."""
        if self.modifier_rank is None:
            return None
        if self.modifier_rank not in group.ranks:
            raise UsageError(
                "GatheredParameters: modifier_rank",
                expected=f"one of the ranks {list(group.ranks)} that share the parameter",
                found=self.modifier_rank,
                fix="name one of them",
            )
        return group.ranks.index(self.modifier_rank)


def _given(params: Any) -> list[torch.nn.Parameter]:
    """Every parameter of ``params``, once, in order."""
    given: Iterable[Any] = [params] if isinstance(params, torch.Tensor | None) else params
    if isinstance(params, torch.nn.Module):
        given = params.parameters()
    return list({id(param): param for param in given if param is not None}.values())


def _in_graph(param: torch.nn.Parameter, edge: Any, references: int) -> bool:
    return edge is not None and _references(param) > references


def _references(param: torch.nn.Parameter) -> int:
    """How often torch itself holds the parameter: saved, or as the base of a view."""
    count = getattr(param, "_use_count", None)
    return int(count()) if count is not None else 0


def _by_group(held: Sequence[M]) -> dict[Group, list[M]]:
    """The members of the groups with whom this entry has something to settle."""
    groups = dict.fromkeys(one.group for one in held if one.before is not None)
    return {group: [one for one in held if one.group == group] for group in groups}


def _keep_for_gradient(shards: Shards) -> None:
    """In the backward of a custom function: stay whole until the gradient that it returns has arrived."""
    # Autograd lays a gradient out as its parameter is when it arrives, which fails if that has shape [0] by then.
    handles: list[Any] = []

    def let_go(_: torch.Tensor | None = None) -> None:
        if handles:
            handles.pop().remove()
            hold.release()

    hold = shards.hold()
    handles.append(shards.param.register_post_accumulate_grad_hook(let_go))
    torch.autograd.Variable._execution_engine.queue_callback(let_go)  # if none comes
