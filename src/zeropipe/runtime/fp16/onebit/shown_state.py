"""Shows the lanes' flat state under each parameter, where users and checkpoints read it, and takes it back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from zeropipe.errors import CheckpointError
from zeropipe.layout.numbers import number_of
from zeropipe.runtime.fp16.onebit.exchange import Topology
from zeropipe.runtime.fp16.onebit.lane import Lane

_PHASE = "phase_"  # prefix of keys in ``state``
Entry = Mapping[str, Any]  # one parameter's part of ``optimizer.state``


def publish(
    lane: Lane,
    state: MutableMapping[torch.Tensor, dict[str, Any]],
    extra: Mapping[str, Any],
    topology: Topology | None,
    phases: Mapping[str, int],
) -> None:
    """Write the lane's state under its parameters: tensors as views, in the parameter's shape.

    Under a master only what all ranks share appears, because an engine saves it as such: moments, and numbers.
    The error feedback is in ``rank_state``.
    """
    common = {"step": lane.step, "variance_steps": lane.variance_steps, **extra, **lane.scalars}
    if lane.bound:
        numbers: dict[str, Any] = {f"{_PHASE}{key}": value for key, value in phases.items()}
        # A key for each tensor, so that a checkpoint can be cut and joined in any way without a look inside.
        for name, values in lane.per_tensor.items():
            known = zip(_keys_of(lane, name), values.tolist(), strict=True)
            numbers |= {key: value for key, value in known if not math.isnan(value)}
        lane.shown = state[lane.params[0]]
        lane.shown.clear()  # what a checkpoint of a larger buffer held of other tensors
        lane.shown.update(common | numbers | lane.own)
        return
    views: dict[str, Sequence[torch.Tensor]] = {name: lane.split(value) for name, value in lane.own.items()}
    views.update({name: value.unbind() for name, value in lane.per_tensor.items()})
    if topology is not None and lane.worker_error is not None:
        views.update(_error_views(lane, topology))
    for number, param in enumerate(lane.params):
        state[param].update(common | {name: parts[number] for name, parts in views.items()})


def saved_phases(entries: Iterable[Entry]) -> dict[str, int] | None:
    """Where the optimizer stood, as ``publish`` wrote it under a master; None where nothing says so."""
    for entry in entries:
        found = {k.removeprefix(_PHASE): int(v) for k, v in entry.items() if k.startswith(_PHASE)}
        if found:
            return found
    return None


def restore_tensors(lane: Lane, entries: Sequence[Entry], more: Sequence[str]) -> None:
    """Fill the moments and the tensors named in ``more`` from saved entries, one per parameter of the lane.

    Raises CheckpointError when one does not fit.
    """
    for name in ("exp_avg", "exp_avg_sq", *more):
        target = lane.own[name] if name in lane.own else lane.allocate(name)
        parts = [target] if lane.bound else lane.split(target)
        _fill(lane, name, parts, entries)


def per_tensor(lane: Lane, name: str, entries: Sequence[Entry]) -> torch.Tensor:
    """A saved value with one number for each tensor: float64 on the CPU, NaN where none was saved."""
    found = (
        [(entries[0], key) for key in _keys_of(lane, name)] if lane.bound else [(e, name) for e in entries]
    )
    return torch.tensor([float(entry.get(key, math.nan)) for entry, key in found], dtype=torch.float64)


def _keys_of(lane: Lane, name: str) -> list[str]:
    return [number_of(name, spec.name) for spec in lane.layout.tensors]


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
                f"the saved {name} does not fit a parameter {tuple(param.shape)} of param group {lane.index}",
                expected=f"{part.numel()} elements",
                found=saved.numel(),
                fix="load the state into the model that it was saved from",
            )
        part.copy_(saved.reshape(part.shape))
