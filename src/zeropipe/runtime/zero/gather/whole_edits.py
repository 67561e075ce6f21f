"""Edits inside ``GatheredParameters`` of what every rank holds whole: at stages 0 to 2, and what is not trained.

There is nothing to gather, but a script that is written for stage 3 lets one rank edit, so its values have to reach
the others here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from zeropipe.comm.collectives import broadcast
from zeropipe.comm.group import Group
from zeropipe.errors import UsageError
from zeropipe.runtime.zero.param import ZeroParam, zero_param

_SAME, _EDITED, _MISSHAPEN = 0, 1, 2  # what the modifier rank says of each parameter


def know_whole(module: torch.nn.Module, group: Group) -> None:
    """Let the parameters that ``group``'s ranks hold whole, and that no optimizer trains, be known as such."""
    for name, param in module.named_parameters():
        if zero_param(param) is None:
            param._zero = ZeroParam(name, group=group)  # type: ignore[attr-defined]


def forget_whole(module: torch.nn.Module) -> None:
    """Undo ``know_whole``."""
    for param in module.parameters():
        known = zero_param(param)
        if known is not None and known.group is not None:
            del param._zero  # type: ignore[attr-defined]


def holders(param: torch.Tensor) -> Group | None:
    """The ranks that hold ``param`` whole; None where it is shards, or no engine's."""
    known = zero_param(param)
    if known is None or known.shards is not None:
        return None
    return known.group if known.trained is None else known.trained.group


@dataclass(slots=True, eq=False)
class _Whole:
    param: torch.nn.Parameter
    name: str
    group: Group
    place: torch.Tensor  # what ``.data`` was at the entry: a view of the partition's buffer
    before: torch.Tensor  # its value then

    def verdict(self) -> int:
        here = self.param.data
        if here.shape != self.place.shape:
            return _MISSHAPEN
        moved = here.data_ptr() != self.place.data_ptr()
        return _EDITED if moved or not torch.equal(here, self.before) else _SAME

    def write(self, value: torch.Tensor) -> None:
        """Through autograd's eyes, so that the masters learn of it as of any edit in place."""
        self.param.data = self.place
        self.param.detach().copy_(value)


class WholeEdits:
    """The whole parameters of one entry. ``source``: the modifier rank's index in a group."""

    def __init__(self, params: Iterable[torch.nn.Parameter], source: Callable[[Group], int | None]) -> None:
        self._source = source
        self._held: list[_Whole] = []
        for param in params:
            group = holders(param)
            assert group is not None
            self._source(group)  # refuses a rank that does not hold it
            known = zero_param(param)
            name = "" if known is None else known.name
            self._held.append(_Whole(param, name, group, param.data, param.detach().clone()))

    def restore(self) -> None:
        """The body raised: the values at the entry."""
        for one in self._held:
            if one.verdict() != _SAME:
                one.write(one.before)

    def spread(self) -> None:
        """Give every rank the modifier's values; edits of other ranks are dropped. Collective."""
        for group in dict.fromkeys(one.group for one in self._held):
            source = self._source(group)
            assert source is not None
            members = [one for one in self._held if one.group == group]
            own = [one.verdict() for one in members]
            verdicts = torch.tensor(own, dtype=torch.uint8, device=members[0].place.device)
            broadcast(verdicts, source, group, label="edited parameters")
            for one, mine, verdict in zip(members, own, verdicts.tolist(), strict=True):
                if verdict == _EDITED:
                    value = one.param.data.clone() if group.rank == source else torch.empty_like(one.before)
                    broadcast(value, source, group, label=one.name)
                    one.write(value)
                elif mine != _SAME:
                    one.write(one.before)
            for one, verdict in zip(members, verdicts.tolist(), strict=True):
                if verdict == _MISSHAPEN:
                    raise UsageError(
                        f"parameter '{one.name}': its .data on the modifier rank",
                        expected=f"shape {tuple(one.place.shape)}",
                        found="another one",
                        fix="assign a new torch.nn.Parameter to the module instead",
                    )
