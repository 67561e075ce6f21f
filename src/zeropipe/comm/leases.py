"""Process groups that are started for an engine's own use: shared by those that need the same ranks, and destroyed
with their last user.

A group starts only when the whole world takes part, so all ranks decide together whether one is there already. A
user goes by saying so (its groups are then destroyed at once, where it was the last) or by being forgotten, which
ranks notice at different times: such groups are taken over, or destroyed on all ranks, when groups are next asked for.
Lanes, the process groups of a group's channels, are few and stay as long as the world.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from zeropipe.comm.collectives import all_gather_object, goes_in_one
from zeropipe.comm.group import Group, start_groups, start_lane, world
from zeropipe.given import Anything

Ranks = tuple[int, ...]


class _Lease:
    """One group and its users. ``said``: how many of them have not said that they go."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()
        self.said = 0

    def destroy(self) -> None:
        if self.group.pg is not None:
            dist.destroy_process_group(self.group.pg)


class Leases:
    """The leased groups of this process. Process groups belong to the process, and so does this."""

    def __init__(self) -> None:
        self._world: weakref.ref[dist.ProcessGroup] | None = None  # the one that the leases are of
        self._leases: dict[str, _Lease] = {}  # by the name of the process group, the same on all its ranks
        # Process groups of channels, by their group's ranks. They are not leased: the members alone start them, torch
        # names such a group by its ranks, and a second one of a name whose first is gone would find what that has
        # left in the store.
        self._lanes: dict[Ranks, tuple[weakref.ref[dist.ProcessGroup], ...]] = {}

    def take(self, lists: Iterable[Sequence[int]]) -> dict[Ranks, Group]:
        """This rank's group for each of ``lists`` that has it. Collective over the world, with the same lists.

        A group stays while somebody holds it: call ``hold`` before groups are asked for again.
        """
        everyone = world()
        wanted = list(dict.fromkeys(tuple(ranks) for ranks in lists))
        if everyone.size == 1:
            return dict.fromkeys(wanted, everyone)
        self._forget_if_stale()
        mine = {name: (lease.group.ranks, bool(lease.users)) for name, lease in self._leases.items()}
        reports = all_gather_object(mine, everyone, label="groups in use")
        # From here on all ranks see the same reports, so they decide alike without asking again.
        found: dict[Ranks, Group] = {}
        kept: set[str] = set()
        lacking: list[Ranks] = []
        for ranks in wanted:
            shared = [name for name in reports[ranks[0]] if all(name in reports[rank] for rank in ranks)]
            name = min((name for name in shared if reports[ranks[0]][name][0] == ranks), default=None)
            if ranks == everyone.ranks:
                found[ranks] = everyone
            elif name is None:
                lacking.append(ranks)
            else:
                kept.add(name)
                if everyone.rank in ranks:
                    found[ranks] = self._leases[name].group
        for ranks, group in start_groups(lacking).items():
            found[ranks] = group
            kept.add(self._add(group))
        # What no rank uses or takes over now is destroyed by all at once, in one order of names.
        used = {name for report in reports for name, (_, in_use) in report.items() if in_use}
        for name in sorted(self._leases.keys() - used - kept):
            self._leases.pop(name).destroy()
        return found

    def with_lanes(self, group: Group, channels: int) -> Group:
        """``group``, with a process group for each channel from 1 on where tags do not keep them apart.

        Collective among its members, the first time that these ranks ask.
        """
        if group.size == 1 or not goes_in_one(group):
            return group
        self._forget_if_stale()
        # Here and not at the first use: they start in one order on all ranks, and no rank is yet in the middle of
        # something that another has not begun.
        if group.ranks not in self._lanes:
            self._lanes[group.ranks] = tuple(
                start_lane(group, f"zeropipe: channel {channel}") for channel in range(1, channels + 1)
            )
        return replace(group, lanes=self._lanes[group.ranks])

    def hold(self, group: Group, user: Anything) -> None:
        """Let ``group`` and its hops stay while ``user`` (weakly referenced) is there; no matter for other groups."""
        for one in _with_hops(group):
            lease = self._leases.get(_name(one))
            if lease is not None and user not in lease.users:
                lease.users.add(user)
                lease.said += 1

    def drop(self, user: Anything) -> None:
        """``user`` needs its groups no more; those of which it was the last user end. Local; may be repeated."""
        self._forget_if_stale()
        for name, lease in list(self._leases.items()):
            if user in lease.users:
                lease.users.discard(user)
                lease.said -= 1
                if lease.said == 0:
                    self._leases.pop(name).destroy()

    def _add(self, group: Group) -> str:
        name = _name(group)
        self._leases[name] = _Lease(group)
        return name

    def _forget_if_stale(self) -> None:
        """Somebody may have ended torch.distributed, and the groups with it."""
        now = dist.group.WORLD if dist.is_initialized() else None
        if now is None or self._world is None or self._world() is not now:
            self._leases.clear()
            self._lanes.clear()
            self._world = None if now is None else weakref.ref(now)


def _with_hops(group: Group) -> list[Group]:
    return [group] if group.hops is None else [group, group.hops.across, group.hops.node]


def _name(group: Group) -> str:
    return "" if group.pg is None else str(group.pg.group_name)


LEASES = Leases()
