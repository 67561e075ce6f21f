"""GatheredParameters: look at, or edit, the whole value of sharded parameters for a while.

    enter   gather all, start first and wait last
    exit    modifier_rank=None   nothing may have been edited; an edit is an error, and the shards keep their value
            modifier_rank=r      what rank r edited reaches every rank and is cut into shards again

Both ends are collective.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge

from zeropipe.comm.agreement import leave, meet
from zeropipe.comm.collectives import broadcast
from zeropipe.comm.group import Group
from zeropipe.errors import CommunicationError, DesyncError, UsageError
from zeropipe.runtime.zero.fingerprint import Fingerprint, fingerprint
from zeropipe.runtime.zero.gather.coordinator import in_backward
from zeropipe.runtime.zero.gather.external import register_external_parameter
from zeropipe.runtime.zero.gather.sharded_parameter import mark_available
from zeropipe.runtime.zero.gather.shards import GATHER, Shards, shards_of
from zeropipe.runtime.zero.gather.whole_edits import WholeEdits, holders
from zeropipe.runtime.zero.status import ZeroParamStatus

_SAME, _EDITED, _MISSHAPEN = 0, 1, 2  # what the modifier rank says of each parameter
Params = torch.nn.Parameter | torch.nn.Module | Iterable[torch.nn.Parameter | None] | None


@dataclass(slots=True, eq=False)
class _Held:
    """One parameter of one entry. ``before``: None where an outer context answers for edits."""

    param: torch.nn.Parameter  # keeps it alive
    shards: Shards
    before: Fingerprint | None
    renewals: int
    kept: torch.Tensor | None  # the value, where it stays gathered after the exit
    edge: Any  # by which graphs reach the parameter: they need no value for it
    references: int  # to the parameter, in torch: by graphs that saved it or a view of it

    @property
    def in_graph(self) -> bool:
        """Whether a graph of autograd, made since the entry, seems to hold the value."""
        return _in_graph(self.param, self.edge, self.references)

    @property
    def moved(self) -> bool:
        """Whether ``.data`` is another tensor by now."""
        here = self.param.data
        return here.shape != self.shards.shape or here.data_ptr() != self.shards.full.data_ptr()

    def changed(self) -> bool:
        """Whether somebody wrote to the value since the entry, other than through the shards."""
        if (
            self.shards.status is not ZeroParamStatus.AVAILABLE
            or self.before is None
            or not self.shards.numel
        ):
            return False
        if self.moved:
            return True
        if self.shards.renewals != self.renewals:  # an inner context or a step wrote: compare with the shards
            return self.shards.differs()
        return not self.before.matches(self.shards.full)

    def restore(self) -> None:
        """The value at the entry, for those that stay gathered; the others are freed."""
        if self.shards.status is not ZeroParamStatus.AVAILABLE or self.before is None:
            return
        if self.kept is not None and self.shards.renewals == self.renewals:
            self.shards.full.copy_(self.kept)
        mark_available(self.param, self.shards.full[: self.shards.numel].view(self.shards.shape))


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
        edited = [] if modifier_rank is None else given
        self._whole = [param for param in edited if holders(param) is not None]
        self._entered: list[tuple[list[_Held], WholeEdits]] = []
        if fwd_module is not None:
            own = {id(param) for param in fwd_module.parameters()}
            for param in self.params:
                if id(param) not in own:
                    register_external_parameter(fwd_module, param)

    def __enter__(self) -> GatheredParameters:
        found = [(param, _of(param)) for param in self.params]
        for _, shards in found:
            self._source(shards.everyone)
        for _, shards in found:
            shards.start_gather()
        for _, shards in found:
            shards.finish_gather()
        held = [self._hold(param, shards) for param, shards in found]
        self._entered.append((held, WholeEdits(self._whole, self._source)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        held, whole = self._entered.pop()
        for one in held:
            one.shards.contexts -= 1
            one.shards.holds -= 1
        try:
            if error is not None:
                whole.restore()
                self._fail(held, error)
            elif self.modifier_rank is None:
                self._check(held)
            else:
                self._spread(held)
                whole.spread()
        finally:
            for one in held:
                if one.param.requires_grad and in_backward():
                    _keep_for_gradient(one.shards)
                one.shards.release_if_idle()

    def _hold(self, param: torch.nn.Parameter, shards: Shards) -> _Held:
        answers = self.modifier_rank is not None or shards.contexts == 0
        stays = shards.persist or shards.holds > 0
        edge = get_gradient_edge(param) if param.requires_grad and not in_backward() else None
        held = _Held(
            param,
            shards,
            fingerprint(shards.full) if answers else None,
            shards.renewals,
            shards.full.clone() if answers and stays else None,
            edge,
            _references(param),
        )
        shards.contexts += 1
        shards.holds += 1
        return held

    def _fail(self, held: list[_Held], error: BaseException) -> None:
        """The body raised: keep the old values, and let peers know that this rank ended otherwise."""
        for one in held:
            one.restore()
        if isinstance(error, DesyncError | CommunicationError):
            return
        for group in _groups(held):
            with suppress(Exception):
                leave(f"GatheredParameters raised {type(error).__name__}", group, channel=GATHER)

    def _check(self, held: list[_Held]) -> None:
        edited = [one.shards for one in held if one.changed()]
        for one in held:
            if any(one.shards is shards for shards in edited):
                one.restore()
        if not edited:
            for group in _groups(held):
                self._leave("leave GatheredParameters unedited", group, held)
            return
        names = ", ".join(f"'{shards.name}'" for shards in edited)
        for group in _groups(held):
            with suppress(DesyncError):
                meet(f"edited without modifier_rank: {names}", group, channel=GATHER)
        group = edited[0].everyone
        raise UsageError(
            f"{names} edited inside GatheredParameters without a modifier rank; the edit is dropped",
            rank=group.ranks[group.rank],
            fix="say whose edit counts: GatheredParameters(params, modifier_rank=0)",
        )

    def _leave(self, what: str, group: Group, held: list[_Held]) -> None:
        """Go on when every rank leaves; where graphs on all of them read the values later, they stay as long."""
        members = [one for one in held if one.shards.everyone == group]
        graph = torch.is_grad_enabled() and any(one.in_graph for one in members)
        if meet(what, group, channel=GATHER, note=int(graph)):
            for one in members:
                if one.shards.keep_for_graph is not None:
                    one.shards.keep_for_graph(
                        one.shards, partial(_in_graph, one.param, one.edge, one.references)
                    )

    def _spread(self, held: list[_Held]) -> None:
        for group in _groups(held):
            source = self._source(group)
            assert source is not None
            members = [one for one in held if one.shards.everyone == group]
            self._leave(f"leave GatheredParameters of rank {self.modifier_rank}", group, held)
            verdicts = torch.tensor([_verdict(one) for one in members], dtype=torch.uint8)
            verdicts = verdicts.to(members[0].shards.full.device)
            broadcast(verdicts, source, group, label="edited parameters")
            misshapen = None
            for one, verdict in zip(members, verdicts.tolist(), strict=True):
                shards = one.shards
                if shards.status is not ZeroParamStatus.AVAILABLE:
                    continue
                if verdict == _MISSHAPEN:
                    misshapen = one
                elif verdict == _EDITED or one.kept is not None:
                    if one.moved and one.param.data.shape == shards.shape:
                        shards.full[: shards.numel].copy_(one.param.data.reshape(-1))
                    broadcast(shards.full, source, group, label=shards.name)
                    shards.write_back()
                mark_available(one.param, shards.full[: shards.numel].view(shards.shape))
            if misshapen is not None:
                raise UsageError(
                    f"parameter '{misshapen.shards.name}': its .data on rank {self.modifier_rank}",
                    expected=f"shape {tuple(misshapen.shards.shape)}",
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


def _verdict(one: _Held) -> int:
    if one.shards.status is not ZeroParamStatus.AVAILABLE:
        return _SAME
    if one.moved:
        return _EDITED if one.param.data.shape == one.shards.shape else _MISSHAPEN
    assert one.before is not None
    return _SAME if one.before.matches(one.shards.full) else _EDITED


def _of(param: torch.nn.Parameter) -> Shards:
    shards = shards_of(param)
    assert shards is not None
    return shards


def _given(params: Any) -> list[torch.nn.Parameter]:
    """Every parameter of ``params``, once, in order."""
    if params is None:
        return []
    if isinstance(params, torch.nn.Module):
        params = params.parameters()
    given: list[Any] = [params] if isinstance(params, torch.Tensor) else list(params)
    return list({id(param): param for param in given if param is not None}.values())


def _in_graph(param: torch.nn.Parameter, edge: Any, references: int) -> bool:
    return edge is not None and _references(param) > references


def _references(param: torch.nn.Parameter) -> int:
    """How often torch itself holds the parameter: saved, or as the base of a view."""
    count = getattr(param, "_use_count", None)
    return int(count()) if count is not None else 0


def _groups(held: list[_Held]) -> list[Group]:
    return list(dict.fromkeys(one.shards.everyone for one in held if one.before is not None))


def _keep_for_gradient(shards: Shards) -> None:
    """In the backward of a custom function: stay whole until the gradient that it returns has arrived.

    Autograd lays a gradient out as its parameter is when it arrives, which fails if that has shape [0] by then.
    """
    handles: list[Any] = []

    def let_go(_: torch.Tensor | None = None) -> None:
        if handles:
            handles.pop().remove()
            shards.holds -= 1
            shards.release_if_idle()

    shards.holds += 1
    handles.append(shards.param.register_post_accumulate_grad_hook(let_go))
    torch.autograd.Variable._execution_engine.queue_callback(let_go)  # if none comes
