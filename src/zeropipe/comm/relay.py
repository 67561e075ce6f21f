"""A gather in two hops (``layout/two_hops.py``): what a rank received from other nodes it hands on inside its own.

Where ranks tell each other what they gather, a rank hands on as soon as it has heard that all gather the same, and it
hears that before anything else that it waits for on the channel: a rank that started a gather ahead of its use and
then has no use for it keeps nobody waiting.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from datetime import timedelta
from typing import Any

import torch

from zeropipe.comm.exchange import (
    NEVER,
    SECOND_HOP,
    Work,
    gather_exchange,
    greet,
    peers,
    receive_from,
    since_parting,
    tag_of,
    waiting,
)
from zeropipe.comm.group import Group, Hops
from zeropipe.comm.record import SEAM
from zeropipe.errors import CommunicationError

_AT_ONCE = timedelta(milliseconds=1)


def two_hop_gather(
    output: torch.Tensor,
    shard: torch.Tensor,
    group: Group,
    what: str,
    label: str,
    async_op: bool,
    channel: int,
    guarded: bool,
    note: int,
    native: Callable[..., Any] | None,
) -> Work:
    """As ``collectives.all_gather``, for a group with ``hops``. ``native``: the backend's all-gather, unless gloo's."""
    assert group.hops is not None
    if native is not None:
        return _native_gather(output, shard, group.hops, what, label, async_op, native)
    own = output.tensor_split(group.size)[group.rank]
    if own.data_ptr() != shard.data_ptr():
        own.copy_(shard)
    match = since_parting(label, group, channel) if guarded else ""
    relay = RelayedGather(output, group.hops, what, label, channel, async_op, match)
    if not guarded:
        return waiting(what, relay.both)
    work = waiting(what, relay.finish)
    work.greeting = greet(label, group, channel, note, relay=relay)
    return work


class RelayedGather:
    """On gloo: the first hop is under way, the second begins with ``hand_on``."""

    def __init__(
        self,
        output: torch.Tensor,  # 1D, the group's shards end to end, of which this rank's own is there
        hops: Hops,
        what: str,
        label: str,
        channel: int,
        async_op: bool,
        match: str,  # as gather_exchange's label
    ) -> None:
        self._hops, self._what, self._label, self._channel = hops, what, label, channel
        self._async = async_op
        self._match = match
        self._output = output
        self._shards = output.tensor_split(len(hops.plan.nodes) * hops.node.size)
        cuts = [(owner, self._shards[shard]) for owner, shard in hops.plan.first(hops.node.rank)]
        event(output, hops, label, async_op, first=True)
        self._first = gather_exchange(cuts, hops.across, what, channel, label=self._match)
        self._second: Work | None = None

    def hand_on(self) -> None:
        """Wait for the first hop and start the second."""
        try:
            self._first.wait()
            event(self._output, self._hops, self._label, self._async, first=False)
            cuts = [(owner, self._shards[shard]) for owner, shard in self._hops.plan.second()]
            node = self._hops.node
            self._second = gather_exchange(cuts, node, self._what, self._channel, SECOND_HOP, self._match)
        except BaseException:
            self.give_up()
            raise

    def give_up(self) -> None:
        """Nothing will be handed on: close the connections inside the node, so that nobody there waits for it.

        A message that does not arrive in time makes gloo close them; its abort leaves the peers waiting.
        """
        node = self._hops.node
        with suppress(Exception):
            wanted = torch.empty(1)
            receive_from(wanted, peers(node)[0], node, tag_of(self._channel, NEVER)).wait(_AT_ONCE)

    def both(self) -> None:
        self.hand_on()
        self.finish()

    def finish(self) -> None:
        """Wait for the second hop."""
        if self._second is None:
            raise CommunicationError(f"{self._what} was given up, because its first hop had failed")
        self._second.wait()


def _native_gather(
    output: torch.Tensor,
    shard: torch.Tensor,
    hops: Hops,
    what: str,
    label: str,
    async_op: bool,
    gather: Callable[..., Any],
) -> Work:
    """By the backend's own all-gather, ``gather(output, shard, pg, async_op=True)``: one call across nodes, then one
    per node's run of shards. On a GPU the second hop waits for the first on the device, on a stream of its own."""
    nodes = len(hops.plan.nodes)
    received = output.new_empty((nodes, shard.numel()))  # of this place, from every node
    event(output, hops, label, async_op, first=True)
    first = gather(received.view(-1), shard, hops.across.pg, async_op=True)
    on_gpu = output.device.type == "cuda"
    with torch.cuda.stream(torch.cuda.Stream(output.device)) if on_gpu else nullcontext():
        first.wait()
        event(output, hops, label, async_op, first=False)
        runs = zip(output.tensor_split(nodes), received, strict=True)
        handles = [gather(run, part, hops.node.pg, async_op=True) for run, part in runs]

    def keep(received: torch.Tensor = received) -> None:
        """The device reads ``received`` until the second hop is over."""

    return Work(what, handles, keep)


def event(output: torch.Tensor, hops: Hops, label: str, async_op: bool, first: bool) -> None:
    """Tell who listens of one hop: its group, and the bytes that each of its members then has."""
    nbytes = output.numel() * output.element_size()
    group = hops.across if first else hops.node
    SEAM.pass_through(
        "all_gather",
        group.size,
        nbytes // hops.node.size if first else nbytes,
        label,
        async_op,
        group.ranks,
    )
