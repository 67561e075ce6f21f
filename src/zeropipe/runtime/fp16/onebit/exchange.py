"""Averages a flat tensor over ranks with one bit per element on the wire, in two rounds, with error feedback on both.

    rank 0   |-y00-|-y01-|-y02-|        every rank cuts its corrected values into one part per rank,
    rank 1   |-y10-|-y11-|-y12-|        compresses each part and sends part s to rank s    (all-to-all)
    rank 2   |-y20-|-y21-|-y22-|        rank s averages what it got, compresses the average
                                        and sends it to everybody                          (all-gather)

(1-bit Adam, arXiv 2102.02888, section 5: compressed_allreduce; Algorithm 1 lines 7-11 for both errors.)
A part's message holds one scale for each tensor in it, then the signs, so a small tensor is never drowned by
a large one. With ``node_size`` L > 1 the values are first averaged in full precision inside a node, and only
the nodes exchange bits: rank l of each node owns part l of the buffer, and part l is cut again by node.

What one bit cannot say of a run of n elements is kept, so nothing is lost on the way (section 4.2; the scale keeps
the norm):

    y = value + error            corrected value
    s = ||y||_2 / sqrt(n)        one fp32 number
    c = s * sign(y)              what every receiver computes
    error = y - c                kept, added to the next value
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zeropipe.comm import collectives
from zeropipe.comm.group import Group, new_groups, world
from zeropipe.errors import ConfigError, UsageError
from zeropipe.layout.flat import FlatShards, TensorSpec
from zeropipe.tensor.signs import add_signs_, pack_signs, set_signs_, sign_table

# Elements per shard come in multiples of this: whole bytes, 4-byte aligned messages, whole cache lines.
ALIGN = 64
ERRORS = ("worker_error", "server_error")  # what each side of an exchange owes


class Topology:
    """The groups of one exchange: ranks of a node, and ranks with the same place in each node."""

    def __init__(self, group: Group, node_size: int = 1) -> None:
        """Collective over the world when ``node_size`` > 1 (it starts groups).

        Raises ConfigError when the group does not consist of whole nodes.
        """
        if node_size < 1 or group.size % node_size:
            raise ConfigError(
                "node_size does not divide the ranks that average together",
                expected=f"a divisor of {group.size}",
                found=node_size,
                fix="set the optimizer's node_size to the ranks per node, or to 1 for no hierarchy",
            )
        self.group = group
        self.node_size = node_size
        self.nodes = group.size // node_size
        self.local, self.place = group.rank % node_size, group.rank // node_size
        self.node, self.across = self._groups()

    @property
    def shard(self) -> int:
        """The part of the buffer that this rank averages."""
        return self.local * self.nodes + self.place

    def _groups(self) -> tuple[Group, Group]:
        group, size = self.group, self.node_size
        if size == 1:
            return Group(ranks=(group.ranks[group.rank],), rank=0), group
        by_node = [group.ranks[n * size : (n + 1) * size] for n in range(self.nodes)]
        by_place = [group.ranks[place::size] for place in range(size)]
        if group.ranks == world().ranks:
            return new_groups(by_node), new_groups(by_place)
        # Several data-parallel groups live side by side: every rank of the world starts the groups of all.
        everyone = collectives.all_gather_object((by_node, by_place), world())
        seen = {tuple(map(tuple, nodes)): places for nodes, places in everyone}
        nodes = [ranks for lists in seen for ranks in lists]
        places = [ranks for lists in seen.values() for ranks in lists]
        return new_groups(nodes), new_groups(places)


class Exchange:
    """The compressed average of one buffer of named tensors, always laid out the same way, and what it owes.

    ``layout``: the buffer's tensors, cut into one shard per rank (padded to ``ALIGN``).
    """

    def __init__(self, tensors: Sequence[TensorSpec], topology: Topology, device: torch.device) -> None:
        self.layout = FlatShards(tuple(tensors), topology.group.size, ALIGN)
        self.topology = topology
        self._table = sign_table(torch.float32, device)

        # What the average is owed, by this rank's messages and by those that it sends as a server, and which elements
        # of the padded buffer each covers. The worker's: all of them, or this rank's part within a node.
        self.debts: dict[str, torch.Tensor] = {}  # empty until the first average: see ``errors``
        numel = self.layout.shard_numel * topology.nodes
        start = topology.local * numel
        self.ranges = dict(
            zip(ERRORS, ((start, start + numel), self.layout.shard_range(topology.shard)), strict=True)
        )

        # A message holds as many scales as the shard of most runs needs; others leave some unused.
        self._runs = [
            [slice(p.offset, p.offset + p.numel) for p in self.layout.pieces(shard)]
            for shard in range(self.layout.num_shards)
        ]
        self._scales = max(map(len, self._runs))
        self._message = 4 * self._scales + self.layout.shard_numel // 8  # bytes

        # What no bit may speak of, and how many elements of each run are left.
        self._hidden: torch.Tensor | None = None  # 1-D bool, layout.padded_numel
        self._counts: list[torch.Tensor | None] = [None] * self.layout.num_shards

    def errors(self) -> dict[str, torch.Tensor]:
        """The worker's and the server's error: 1-D float32 over their ranges, zero at first."""
        if not self.debts:
            sizes = {name: stop - start for name, (start, stop) in self.ranges.items()}
            self.debts = {name: self._table.new_zeros(numel) for name, numel in sizes.items()}
        return self.debts

    def scale_errors(self, factor: float) -> None:
        """What is owed, in another unit."""
        for error in self.debts.values():
            error.mul_(factor)

    def hide(self, elements: torch.Tensor | None) -> None:
        """Of these elements (1-D bool, ``layout.numel``; None: of none) values, errors and results are 0 from now on.

        The same on every rank. Hidden elements do not count in the scale of their tensor.
        """
        self._hidden = None
        self._counts = [None] * self.layout.num_shards
        if elements is None:
            return
        if elements.numel() != self.layout.numel:
            raise UsageError(
                "the mask does not cover the buffer", expected=self.layout.numel, found=elements.numel()
            )
        self._hidden = elements.new_ones(self.layout.padded_numel)
        self._hidden[: elements.numel()] = elements
        for shard, runs in enumerate(self._runs):
            at = self.layout.shard_range(shard)[0]
            counts = [(~self._hidden[at + run.start : at + run.stop]).sum() for run in runs]
            self._counts[shard] = torch.stack(counts).float() if counts else None

    def average(self, values: torch.Tensor, label: str = "onebit") -> torch.Tensor | None:
        """Average ``values`` (1-D, ``layout.numel``) over all ranks; the errors are updated.

        Returns the messages (uint8, 1-D) that ``decode`` reads, the same bytes on every rank. Where there is nobody to
        send bits to (or the buffer is empty), the exact average (plus what the errors held) is put into ``values`` and
        None is returned.
        """
        worker_error, server_error = self.errors().values()
        if self.layout.numel == 0:
            return None
        if self.topology.nodes == 1:
            self._average_exactly(values, label)
            return None

        # [1] Every rank corrects what it has and compresses the part of each server, which get them.
        self._correct(values, worker_error, label)
        nodes, shard_numel = self.topology.nodes, self.layout.shard_numel
        sent = worker_error.new_empty((nodes, self._message), dtype=torch.uint8)
        for node in range(nodes):
            part = worker_error[node * shard_numel : (node + 1) * shard_numel]
            self._compress(part, sent[node], self.topology.local * nodes + node)
        self._hide(worker_error, self.ranges["worker_error"][0])
        received = torch.empty_like(sent)
        across = self.topology.across
        collectives.all_to_all(received.view(-1), sent.view(-1), across, label=f"{label}: signs to servers")

        # [2] A server averages what it got, compresses that and sends it to everybody.
        self._serve(received, server_error)
        # What was sent is on its way: its memory can carry the average.
        own = sent[0]
        self._compress(server_error, own, self.topology.shard)
        self._hide(server_error, self.ranges["server_error"][0])
        collectives.all_gather(received.view(-1), own, across, label=f"{label}: signs to all")
        if self.topology.node_size == 1:
            return received.view(-1)
        gathered = received.new_empty(self.topology.group.size * self._message)
        collectives.all_gather(
            gathered, received.view(-1), self.topology.node, label=f"{label}: signs in node"
        )
        return gathered

    def decode(self, messages: torch.Tensor, out: torch.Tensor, start: int = 0) -> None:
        """Write elements [start, start + out.numel()) of the average that ``messages`` stand for into ``out``.

        Padding decodes to 0.
        """
        rows = messages.view(self.layout.num_shards, self._message)
        done = 0
        for piece in self.layout.cut(start, start + out.numel()):
            runs = self._runs[piece.shard]
            index = next(i for i, run in enumerate(runs) if run.start <= piece.offset < run.stop)
            scales, signs = self._open(rows[piece.shard])
            target = out[done : done + piece.numel]
            set_signs_(target, signs, piece.offset, scales[index], self._table)
            done += piece.numel
        out[done:] = 0
        self._hide(out[:done], start)

    def _correct(self, values: torch.Tensor, worker_error: torch.Tensor, label: str) -> None:
        """``worker_error += values``, averaged inside the node first."""
        if self.topology.node_size == 1:
            worker_error[: values.numel()] += values
        else:
            padded = worker_error.new_zeros(self.layout.padded_numel)
            padded[: values.numel()] = values
            start, stop = self.ranges["worker_error"]
            node = self.topology.node
            part = padded[start:stop]
            collectives.reduce_scatter(part, padded, node, op="avg", label=f"{label}: average in node")
            worker_error += part
        self._hide(worker_error, self.ranges["worker_error"][0])

    def _compress(self, values: torch.Tensor, message: torch.Tensor, shard: int) -> None:
        runs = self._runs[shard]
        scales, signs = self._open(message)
        scales[len(runs) :] = 0
        compress_(values, runs, signs, scales[: len(runs)], self._table, self._counts[shard])

    def _serve(self, received: torch.Tensor, server_error: torch.Tensor) -> None:
        """``server_error += average of the received parts``, summed in rank order."""
        runs = self._runs[self.topology.shard]
        total = torch.zeros_like(server_error)
        # In rank order on every server, so the sums do not depend on who came first.
        for message in received.unbind():
            scales, signs = self._open(message)
            for run, scale in zip(runs, scales, strict=False):
                add_signs_(total[run], signs, run.start, scale, self._table)
        server_error += total.div_(self.topology.nodes)
        self._hide(server_error, self.ranges["server_error"][0])

    def _average_exactly(self, values: torch.Tensor, label: str) -> None:
        size, start = self.topology.group.size, self.ranges["worker_error"][0]
        for error in self.errors().values():
            # Left by a run on more nodes, and delivered now; times ``size``, because only this rank holds it.
            stop = min(start + error.numel(), values.numel())
            if start < stop:
                values[start:stop] += error[: stop - start] * size
            error.zero_()
        if size > 1:
            collectives.all_reduce(values, self.topology.group, op="avg", label=f"{label}: average in node")
        self._hide(values, 0)

    def _open(self, message: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The scales (float32, 1-D) and the signs (uint8, 1-D) of one message, as views of it."""
        cut = 4 * self._scales
        return message[:cut].view(torch.float32), message[cut:]

    def _hide(self, buffer: torch.Tensor, start: int) -> None:
        if self._hidden is not None:
            buffer.masked_fill_(self._hidden[start : start + buffer.numel()], 0)


def compress_(
    values: torch.Tensor,
    runs: Sequence[slice],
    signs: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    counts: torch.Tensor | None = None,
) -> None:
    """Compress the corrected ``values`` (1-D) in place: they become the error that stays behind.

    ``signs``: uint8, ``packed_numel(values.numel())``, written. ``scales``: float32, one per run, written.
    ``counts``: float32, one per run: how many of its elements can be other than zero (default: all of them).
    Elements outside of every run keep their value; they must be zero if they are padding.
    """
    # In which sense c + error = y: ``error`` is the correctly rounded difference. In real arithmetic the sum is exact
    # wherever fp32 can hold the difference, in particular for all s/2 <= |y| <= 2s (Sterbenz); elsewhere it is off by
    # at most half a unit in the last place of ``error``, which is the best that an fp32 buffer can do. On an fp64
    # buffer with values that came from fp32 it is exact, bit for bit, while |y| and s are within 2**28 of each other.
    pack_signs(values, out=signs)
    # A shard may hold padding alone.
    if not runs:
        return
    norms = torch.stack([torch.linalg.vector_norm(values[run]) for run in runs])
    if counts is None:
        counts = norms.new_tensor([run.stop - run.start for run in runs], dtype=torch.float32)
    scales.copy_(norms / counts.clamp(min=1).sqrt())
    for run, scale in zip(runs, scales.unbind(), strict=True):
        add_signs_(values[run], signs, run.start, -scale, table)


def error_buffers(tensor: torch.Tensor, group: Group | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeroed worker and server errors for ``compressed_all_reduce`` of ``tensor``."""
    worker, server = _of_one(tensor, group or world()).errors().values()
    return worker[: tensor.numel()].clone(), server


def compressed_all_reduce(
    tensor: torch.Tensor, worker_error: torch.Tensor, server_error: torch.Tensor, group: Group | None = None
) -> torch.Tensor:
    """Average ``tensor`` over ``group`` (default: all ranks) with one bit per element each way, in place.

    ``tensor``: any shape and floating dtype, any number of elements. ``worker_error``: 1-D float32,
    ``tensor.numel()``; ``server_error``: 1-D float32, as ``error_buffers`` makes it; both are updated.
    Returns ``tensor``, which is the same on every rank afterwards. On each rank, what it sent plus its new
    worker error is ``tensor + worker_error`` as they were, and likewise for the server; see ``compress_`` for
    the exact sense. In a group of one nothing is sent, nothing is lost and the errors are delivered.

    Raises UsageError when an error buffer does not fit.
    """
    group = group or world()
    exchange = _of_one(tensor, group)
    worker, server = exchange.errors().values()
    for name, buffer, numel in (
        ("worker_error", worker_error, tensor.numel()),
        ("server_error", server_error, server.numel()),
    ):
        if buffer.dtype != torch.float32 or buffer.dim() != 1 or buffer.numel() != numel:
            raise UsageError(
                f"compressed_all_reduce: {name} does not fit the tensor and the group",
                rank=group.ranks[group.rank],
                expected=f"({numel},) float32",
                found=f"{tuple(buffer.shape)} {str(buffer.dtype).removeprefix('torch.')}",
                fix="make the buffers with error_buffers(tensor, group)",
            )
    values = tensor.detach().reshape(-1).float()
    # The caller's errors cover the tensor alone, the exchange's its padding too.
    worker[: tensor.numel()] = worker_error
    server.copy_(server_error)
    messages = exchange.average(values, label="compressed_all_reduce")
    worker_error.copy_(worker[: tensor.numel()])
    server_error.copy_(server)
    if messages is not None:
        values = torch.empty_like(values)
        exchange.decode(messages, values)
    with torch.no_grad():
        tensor.copy_(values.view(tensor.shape))
    return tensor


def _of_one(tensor: torch.Tensor, group: Group) -> Exchange:
    spec = TensorSpec("tensor", tuple(tensor.shape), "float32")
    return Exchange((spec,), Topology(group), tensor.device)
