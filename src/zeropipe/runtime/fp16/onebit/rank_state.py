"""Error feedback in checkpoints: what each rank saves, and how another number of ranks takes it over.

What a rank holds is a debt to the average. The rule keeps the sum of all debts, as the average sees it:

* same ranks and nodes, same tensors: each rank takes back its own, bit for bit;
* otherwise, tensor by tensor, every rank takes the mean of the old worker errors (the mean over ranks is what
  reaches the average, so it is unchanged), and the elements of the server error that its new shard covers.

With a pipeline the ranks of a run average in several groups, one for each stage, each with its own tensors. A
tensor is looked up by name among all of them, so the model may be cut in another way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from zeropipe.errors import CheckpointError
from zeropipe.layout.flat import FlatShards, TensorSpec
from zeropipe.runtime.fp16.onebit.exchange import ERRORS, Exchange, Topology

RankState = dict[str, Any]  # world, rank, node_size: int; lanes: of each lane what ``Lane.rank_state`` gives
Values = dict[str, torch.Tensor]  # 0-D, or 1-D over a buffer
Tensors = tuple[tuple[str, tuple[int, ...]], ...]  # name and shape of each tensor of a buffer


def is_own(state: RankState, exchanges: Sequence[Exchange], topology: Topology) -> bool:
    """Whether ``state`` was saved by this very rank, among as many ranks and nodes, of lanes of these layouts."""
    place = (topology.group.size, topology.group.rank, topology.node_size)
    return (state["world"], state["rank"], state["node_size"]) == place and _tensors(state) == [
        _named(exchange.layout) for exchange in exchanges
    ]


def groups_of(states: Sequence[RankState]) -> list[list[RankState]]:
    """The states of ranks that averaged together, in rank order; one list for each pipeline stage.

    Raises CheckpointError when some ranks' are missing or come twice.
    """
    if not states:
        raise CheckpointError("load_rank_states needs the state of each rank of the saving run; found none")
    by_tensors: dict[Any, list[RankState]] = {}
    for state in states:
        by_tensors.setdefault(tuple(_tensors(state)), []).append(state)
    groups = [sorted(group, key=lambda state: int(state["rank"])) for group in by_tensors.values()]
    for group in groups:
        world, ranks = group[0]["world"], [state["rank"] for state in group]
        runs = {(state["world"], state["node_size"]) for state in group}
        if ranks != list(range(world)) or len(runs) > 1:
            raise CheckpointError(
                "load_rank_states needs the state of each rank of the saving run, once",
                expected=f"ranks 0..{world - 1}",
                found=ranks,
                fix="load every rank's file",
            )
    return groups


def own_values(state: RankState, lane: int) -> Values:
    """What this rank saved itself of one lane."""
    entry = state["lanes"][lane]
    return entry["further"] | {name: entry[name] for name in ERRORS if entry[name] is not None}


def shared_values(groups: Sequence[Sequence[RankState]], lane: int, exchange: Exchange) -> Values:
    """This rank's part of what all ranks saved, by the rule above.

    Raises CheckpointError when a tensor's is missing, or was saved with another shape.
    """
    layout, wanted = exchange.layout, _named(exchange.layout)
    joined = [[_join(group, number) for number in range(len(group[0]["lanes"]))] for group in groups]
    # The lane in this place if it holds the same tensors, else each tensor wherever it lies.
    whole = [lanes[lane] for lanes in joined if lane < len(lanes) and _named(lanes[lane][0]) == wanted]
    candidates = whole or [entry for lanes in joined for entry in lanes]
    parts = [_find(spec, candidates) for spec in layout.tensors]
    # Put together by tensor, so that neither padding nor the order of the saving run shows.
    full: Values = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        found = [part[name] for part in parts if name in part]
        if not found[0].dim():
            full[name] = torch.stack(found).mean(0)
            continue
        full[name] = found[0].new_zeros(layout.padded_numel if name in ERRORS else layout.numel)
        for index, part in enumerate(parts):
            if name in part:
                start, stop = layout.tensor_range(index)
                full[name][start:stop] = part[name]
    # Of the whole, the elements that this rank is to deliver.
    for name, (start, stop) in exchange.ranges.items():
        if name in full:
            full[name] = full[name][start:stop]
    return full


def _join(group: Sequence[RankState], lane: int) -> tuple[FlatShards, Values]:
    """One lane of one group: the mean worker error, the server error, the mean of all else, over its buffer."""
    lanes = [state["lanes"][lane] for state in group]
    values = {name: torch.stack([e["further"][name] for e in lanes]).mean(0) for name in lanes[0]["further"]}
    if lanes[0]["worker_error"] is not None:
        # A rank's place in its node says which part of the buffer its worker error covers: see ``Topology.shard``.
        size = int(group[0]["node_size"])
        places = [lanes[place::size] for place in range(size)]
        workers = [torch.stack([entry["worker_error"] for entry in nodes]).mean(0) for nodes in places]
        values["worker_error"] = torch.cat(workers)
        values["server_error"] = torch.cat([entry["server_error"] for nodes in places for entry in nodes])
    return FlatShards.from_json(lanes[0]["layout"]), values


def _find(spec: TensorSpec, candidates: Sequence[tuple[FlatShards, Values]]) -> Values:
    """What was saved of one tensor: numbers, and 1-D of ``spec.numel``."""
    shapes = []
    for layout, values in candidates:
        for index, saved in enumerate(layout.tensors):
            if saved.name == spec.name and saved.shape == spec.shape:
                start, stop = layout.tensor_range(index)
                return {name: v[start:stop] if v.dim() else v for name, v in values.items()}
            shapes += [saved.shape] if saved.name == spec.name else []
    raise CheckpointError(
        "the saved error feedback belongs to other parameters",
        expected=f"{spec.name} {spec.shape}",
        found=shapes or "no tensor of this name",
    )


def _tensors(state: RankState) -> list[Tensors]:
    return [_named(FlatShards.from_json(entry["layout"])) for entry in state["lanes"]]


def _named(layout: FlatShards) -> Tensors:
    return tuple((spec.name, spec.shape) for spec in layout.tensors)
