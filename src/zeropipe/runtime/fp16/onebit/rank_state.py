"""Error feedback in checkpoints: what each rank saves, and how another number of ranks takes it over.

What a rank holds is a debt to the average. The rule keeps the sum of all debts, as the average sees it:

* same ranks and nodes: each rank takes back its own, bit for bit;
* otherwise every rank takes the mean of the old worker errors (the mean over ranks is what reaches the
  average, so it is unchanged), and the elements of the server error that its new shard covers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from zeropipe.errors import CheckpointError, describe
from zeropipe.layout.flat import FlatShards
from zeropipe.runtime.fp16.onebit.exchange import Topology

RankState = dict[str, Any]  # world, rank, node_size: int; lanes: list of LaneState
LaneState = dict[str, Any]  # layout: JSON; worker_error, server_error: 1-D or None; further: name -> 1-D


def lane_state(
    layout: FlatShards,
    worker_error: torch.Tensor | None,
    server_error: torch.Tensor | None,
    further: Mapping[str, torch.Tensor],
) -> LaneState:
    """``layout``: of the exchange. ``further``: tensors over the whole buffer (``layout.numel``)."""
    return {
        "layout": layout.to_json(),
        "worker_error": worker_error,
        "server_error": server_error,
        "further": dict(further),
    }


def is_of(state: RankState, topology: Topology) -> bool:
    """Whether ``state`` was saved by this very rank, among as many ranks and nodes."""
    saved = (state["world"], state["rank"], state["node_size"])
    return saved == (topology.group.size, topology.group.rank, topology.node_size)


def check_complete(states: Sequence[RankState]) -> None:
    """Raises CheckpointError when ``states`` are not those of all ranks of one run."""
    if not states:
        raise CheckpointError("load_rank_states needs the state of each rank of the saving run; found none")
    first = states[0]
    ranks = sorted(state["rank"] for state in states)
    if ranks != list(range(first["world"])) or any(
        (s["world"], s["node_size"]) != (first["world"], first["node_size"]) for s in states
    ):
        raise CheckpointError(
            describe(
                "load_rank_states needs the state of each rank of the saving run, once",
                expected=f"ranks 0..{first['world'] - 1}",
                found=ranks,
                fix="load every rank's file",
            )
        )


def redistribute(
    states: Sequence[RankState], lane: int, layout: FlatShards, topology: Topology
) -> tuple[torch.Tensor | None, torch.Tensor | None, dict[str, torch.Tensor]]:
    """This rank's worker error, server error and further tensors of lane ``lane``, by the rule above.

    ``states``: of all old ranks, or this one's alone. ``layout``: of the new exchange. Errors are None where the
    old run had none yet. Raises CheckpointError when the states belong to other tensors.
    """
    by_rank = sorted(states, key=lambda state: int(state["rank"]))
    lanes: list[LaneState] = []
    for state in by_rank:
        if lane >= len(state["lanes"]):
            raise CheckpointError(
                describe(
                    "the saved ranks have fewer param groups", expected=lane + 1, found=len(state["lanes"])
                )
            )
        lanes.append(state["lanes"][lane])
    old = FlatShards.from_json(lanes[0]["layout"])
    if [t.shape for t in old.tensors] != [t.shape for t in layout.tensors]:
        raise CheckpointError(
            describe(
                "the saved error feedback belongs to other parameters",
                expected=[t.shape for t in layout.tensors],
                found=[t.shape for t in old.tensors],
            )
        )
    node_size = int(by_rank[0]["node_size"])
    mine = next((entry for state, entry in zip(by_rank, lanes, strict=True) if is_of(state, topology)), None)
    if mine is not None:
        return mine["worker_error"], mine["server_error"], mine["further"]
    further = {
        name: torch.stack([entry["further"][name] for entry in lanes]).mean(0) for name in lanes[0]["further"]
    }
    if lanes[0]["worker_error"] is None:
        return None, None, further
    nodes = len(lanes) // node_size
    worker = torch.cat(
        [
            torch.stack([lanes[node * node_size + local]["worker_error"] for node in range(nodes)]).mean(0)
            for local in range(node_size)
        ]
    )
    server = torch.cat(
        [
            lanes[node * node_size + local]["server_error"]
            for local in range(node_size)
            for node in range(nodes)
        ]
    )
    part = layout.shard_numel * topology.nodes
    start = topology.local * part
    shard_start, shard_stop = layout.shard_range(topology.shard)
    return (
        _cut(worker[: old.numel], start, start + part),
        _cut(server[: old.numel], shard_start, shard_stop),
        further,
    )


def _cut(full: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop), with zeros for those past the end."""
    out = full.new_zeros(stop - start)
    inside = full[start:stop]
    out[: inside.numel()] = inside
    return out
