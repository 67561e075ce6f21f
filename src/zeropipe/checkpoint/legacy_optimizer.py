"""Takes apart what DeepSpeed's and torch's optimizers leave in a file: hyperparameters, tensors, one-value entries."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch

from zeropipe.checkpoint import constants as k
from zeropipe.errors import CheckpointError
from zeropipe.runtime.optimizers.state_kinds import split_state


def hyperparameters(state: Any) -> tuple[dict[str, Any], ...]:
    groups = state.get("param_groups", ()) if isinstance(state, dict) else ()
    return tuple({key: v for key, v in group.items() if key != "params"} for group in groups)


def moments(
    base: Any, index: int, per_element: Set[str] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, one-value entries) that an optimizer state dict holds for parameter ``index``.

    ``per_element``: the keys of the former; None for flat buffers, whose state is 1D.
    """
    if not isinstance(base, dict):
        raise CheckpointError(
            "this DeepSpeed checkpoint was saved with elastic_checkpoint, whose format is not read",
            fix="save it again without `elastic_checkpoint`, or convert it to the universal format first",
        )
    state = base.get("state", {}).get(index, {})
    if per_element is None:
        per_element = {key for key, v in state.items() if isinstance(v, torch.Tensor) and v.dim() > 0}
    return split_state(state, per_element)


def buffer_order(states: list[Any], group: int) -> list[str]:
    """Names in the order in which they lie in the buffer, which need not be that of the parameters."""
    names: dict[str, None] = {}
    for state in states:
        mappings = state.get(k.PARAM_SLICE_MAPPINGS)
        if not mappings:
            return []
        for name, address in sorted(mappings[group].items(), key=lambda item: item[1].start):
            if address.numel:
                names[name] = None
    return list(names)
