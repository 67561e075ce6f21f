"""Names for numbers of an optimizer's state that belong to one tensor of a flat, beside those of the whole flat.

    step                                 of all tensors of the flat
    last_factor of blocks.0.weight       of one of them

    never stepped of head.weight         it has no state, and its moments in the flat mean nothing

What one tensor has of its own stands in for what the flat has under that key. So a checkpoint can be cut and joined
in any way, flat by flat or tensor by tensor, and no number is lost or given to a tensor that it is not of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_OF = " of "
NEVER_STEPPED = "never stepped"


def number_of(key: str, tensor: str) -> str:
    """The name of ``tensor``'s own ``key``."""
    return f"{key}{_OF}{tensor}"


def split_numbers(
    numbers: Mapping[str, Any], tensors: Iterable[str]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(what all tensors share, tensor -> key -> its own), in the time of one look at each."""
    known, shared, own = set(tensors), {}, dict[str, dict[str, Any]]()
    for name, value in numbers.items():
        parts = name.split(_OF)
        # A tensor's name may have these letters in it, a key has not.
        tensor = _OF.join(parts[1:])
        if tensor in known:
            own.setdefault(tensor, {})[parts[0]] = value
        else:
            shared[name] = value
    return shared, own
