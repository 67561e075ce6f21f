"""Shows the lanes' flat state under each parameter, where users and checkpoints read it, and takes it back."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch

from zeropipe.errors import CheckpointError, describe
from zeropipe.runtime.fp16.onebit.exchange import Topology
from zeropipe.runtime.fp16.onebit.lane import Lane

Entry = Mapping[str, Any]  # one parameter's part of ``optimizer.state``


def publish(
    lane: Lane,
    state: MutableMapping[torch.Tensor, dict[str, Any]],
    extra: Mapping[str, Any],
    topology: Topology | None,
) -> None:
    """Write the lane's state under its parameters: tensors as views, in the parameter's shape."""
    common = {"step": lane.step, "variance_steps": lane.variance_steps, **extra, **lane.scalars}
    if lane.bound:
        shown = state[lane.params[0]]
        shown.update(common | lane.own | lane.per_tensor)
        if lane.worker_error is not None and lane.server_error is not None:
            shown.update(worker_error=lane.worker_error, server_error=lane.server_error)
        return
    views: dict[str, Sequence[torch.Tensor]] = {name: lane.split(value) for name, value in lane.own.items()}
    views.update({name: value.unbind() for name, value in lane.per_tensor.items()})
    if topology is not None and lane.worker_error is not None:
        views.update(_error_views(lane, topology))
    for number, param in enumerate(lane.params):
        state[param].update(common | {name: parts[number] for name, parts in views.items()})


def restore_tensors(lane: Lane, entries: Sequence[Entry], more: Sequence[str]) -> None:
    """Fill the moments and the tensors named in ``more`` from saved entries, one per parameter of the lane.

    Raises CheckpointError when one does not fit.
    """
    for name in ("exp_avg", "exp_avg_sq", *more):
        target = lane.own[name] if name in lane.own else lane.allocate(name)
        parts = [target] if lane.bound else lane.split(target)
        _fill(lane, name, parts, entries)


def restore_errors(lane: Lane, entries: Sequence[Entry], topology: Topology) -> None:
    """Fill the error feedback, which this very rank saved.

    Raises CheckpointError when it does not fit.
    """
    worker, server = lane.errors(topology)
    if lane.bound:
        views: dict[str, list[torch.Tensor]] = {"worker_error": [worker], "server_error": [server]}
    else:
        views = _error_views(lane, topology)
    for name, parts in views.items():
        _fill(lane, name, parts, entries)


def _error_views(lane: Lane, topology: Topology) -> dict[str, list[torch.Tensor]]:
    """The part of each error that belongs to each parameter: 1-D, empty where another rank has it."""
    exchange = lane.exchange(topology)
    worker, server = lane.errors(topology)
    covers = {
        "worker_error": (worker, exchange.worker_range),
        "server_error": (server, exchange.layout.shard_range(topology.shard)),
    }
    found: dict[str, list[torch.Tensor]] = {}
    for name, (buffer, (start, stop)) in covers.items():
        ranges = (exchange.layout.tensor_range(i) for i in range(len(lane.params)))
        inside = ((min(max(a, start), stop), min(max(b, start), stop)) for a, b in ranges)
        found[name] = [buffer[a - start : b - start] for a, b in inside]
    return found


def _fill(lane: Lane, name: str, parts: Sequence[torch.Tensor], entries: Sequence[Entry]) -> None:
    for part, entry, param in zip(parts, entries, lane.params, strict=True):
        if name not in entry:
            continue
        saved = entry[name]
        if saved.numel() != part.numel():
            raise CheckpointError(
                describe(
                    f"the saved {name} does not fit a parameter {tuple(param.shape)} of param group {lane.index}",
                    expected=f"{part.numel()} elements",
                    found=saved.numel(),
                    fix="load the state into the model that it was saved from",
                )
            )
        part.copy_(saved.reshape(part.shape))
