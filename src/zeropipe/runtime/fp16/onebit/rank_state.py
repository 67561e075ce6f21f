"""Error feedback in checkpoints: what each rank saves, and how another number of ranks takes it over.

What a rank holds is a debt to the average. The rule keeps the sum of all debts, as the average sees it:

* same ranks and nodes, same tensors: each rank takes back its own, bit for bit;
* otherwise, tensor by tensor, every rank takes the mean of the old worker errors (the mean over ranks is what
  reaches the average, so it is unchanged), and the elements of the server error that its new shard covers.

With a pipeline the ranks of a run average in several groups, one for each stage, each with its own tensors. A
tensor is looked up by name among all of them, so the model may be cut in another way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zeropipe.errors import CheckpointError
from zeropipe.layout.flat import FlatShards, TensorSpec
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


def is_own(state: RankState, layouts: Sequence[FlatShards], topology: Topology) -> bool:
    """Whether ``state`` was saved by this very rank, among as many ranks and nodes, of lanes of these layouts."""
    saved = (state["world"], state["rank"], state["node_size"])
    if saved != (topology.group.size, topology.group.rank, topology.node_size):
        return False
    return [_tensors(entry) for entry in state["lanes"]] == [_tensors_of(layout) for layout in layouts]


def groups_of(states: Sequence[RankState]) -> list[list[RankState]]:
    """The states of ranks that averaged together, in rank order; one list for each pipeline stage.

    Raises CheckpointError when some ranks' are missing or come twice.
    """
    if not states:
        raise CheckpointError("load_rank_states needs the state of each rank of the saving run; found none")
    by_tensors: dict[Any, list[RankState]] = {}
    for state in states:
        by_tensors.setdefault(tuple(_tensors(entry) for entry in state["lanes"]), []).append(state)
    groups = [sorted(group, key=lambda state: int(state["rank"])) for group in by_tensors.values()]
    for group in groups:
        first, ranks = group[0], [state["rank"] for state in group]
        if ranks != list(range(first["world"])) or any(
            (s["world"], s["node_size"]) != (first["world"], first["node_size"]) for s in group
        ):
            raise CheckpointError(
                "load_rank_states needs the state of each rank of the saving run, once",
                expected=f"ranks 0..{first['world'] - 1}",
                found=ranks,
                fix="load every rank's file",
            )
    return groups


@dataclass(frozen=True, slots=True)
class Debt:
    """What one lane of one rank takes over."""

    worker_error: torch.Tensor | None  # 1-D; None where the saving run had none yet
    server_error: torch.Tensor | None
    further: dict[str, torch.Tensor]  # 0-D, or 1-D of at least layout.numel


def own_debt(state: RankState, lane: int) -> Debt:
    """What this rank saved itself."""
    entry = state["lanes"][lane]
    return Debt(entry["worker_error"], entry["server_error"], entry["further"])


def shared_debt(
    groups: Sequence[Sequence[RankState]], lane: int, layout: FlatShards, topology: Topology
) -> Debt:
    """This rank's part of what all ranks saved, by the rule above. ``layout``: of the new exchange.

    Raises CheckpointError when a tensor's is missing, or was saved with another shape.
    """
    joined = [[_join(group, number) for number in range(len(group[0]["lanes"]))] for group in groups]
    whole = [
        lanes[lane] for lanes in joined if lane < len(lanes) and lanes[lane].tensors == _tensors_of(layout)
    ]
    candidates = whole or [entry for lanes in joined for entry in lanes]
    parts = [_find(spec, candidates) for spec in layout.tensors]
    names = dict.fromkeys(name for part in parts for name in part)
    full = {name: _assemble([part.get(name) for part in parts], layout) for name in names}
    worker, server = full.pop("worker_error", None), full.pop("server_error", None)
    if worker is None or server is None:
        return Debt(None, None, full)
    size = layout.shard_numel * topology.nodes
    start, (shard_start, shard_stop) = topology.local * size, layout.shard_range(topology.shard)
    return Debt(_cut(worker, start, start + size), _cut(server, shard_start, shard_stop), full)


@dataclass(frozen=True, slots=True)
class _Joined:
    """One lane of one group: the mean worker error, the server error, the mean of all else, over its buffer."""

    layout: FlatShards
    values: dict[str, torch.Tensor]  # 0-D, or 1-D of at least layout.numel

    @property
    def tensors(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return _tensors_of(self.layout)


def _join(group: Sequence[RankState], lane: int) -> _Joined:
    lanes = [state["lanes"][lane] for state in group]
    values = {
        name: torch.stack([entry["further"][name] for entry in lanes]).mean(0) for name in lanes[0]["further"]
    }
    if lanes[0]["worker_error"] is not None:
        node_size = int(group[0]["node_size"])
        nodes, places = range(len(group) // node_size), range(node_size)
        values["worker_error"] = torch.cat(
            [torch.stack([lanes[n * node_size + p]["worker_error"] for n in nodes]).mean(0) for p in places]
        )
        values["server_error"] = torch.cat(
            [lanes[n * node_size + p]["server_error"] for p in places for n in nodes]
        )
    return _Joined(FlatShards.from_json(lanes[0]["layout"]), values)


def _find(spec: TensorSpec, candidates: Sequence[_Joined]) -> dict[str, torch.Tensor]:
    """What was saved of one tensor: name of the value -> 0-D, or 1-D of ``spec.numel``."""
    shapes = []
    for entry in candidates:
        for index, saved in enumerate(entry.layout.tensors):
            if saved.name == spec.name and saved.shape == spec.shape:
                start, stop = entry.layout.tensor_range(index)
                return {name: v[start:stop] if v.dim() else v for name, v in entry.values.items()}
            shapes += [saved.shape] if saved.name == spec.name else []
    raise CheckpointError(
        "the saved error feedback belongs to other parameters",
        expected=f"{spec.name} {spec.shape}",
        found=shapes or "no tensor of this name",
    )


def _assemble(parts: Sequence[torch.Tensor | None], layout: FlatShards) -> torch.Tensor:
    """The tensors' parts of one value as one buffer (``layout.numel``); numbers of all parts as their mean."""
    found = [part for part in parts if part is not None]
    if not found[0].dim():
        return torch.stack(found).mean(0)
    out = found[0].new_zeros(layout.numel)
    for index, part in enumerate(parts):
        if part is not None:
            start, stop = layout.tensor_range(index)
            out[start:stop] = part
    return out


def _tensors(entry: LaneState) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return _tensors_of(FlatShards.from_json(entry["layout"]))


def _tensors_of(layout: FlatShards) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((spec.name, spec.shape) for spec in layout.tensors)


def _cut(full: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop), with zeros for those past the end."""
    out = full.new_zeros(stop - start)
    inside = full[start:stop]
    out[: inside.numel()] = inside
    return out
