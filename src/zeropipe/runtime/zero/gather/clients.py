"""Calls of clients that need a model's weights whole: an error names the one that the user wrote, and what to do."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

_WHOLE = "call it, on every rank, inside 'with zero.GatheredParameters(model.parameters(), modifier_rank=0):'"
_RESIZE = "resize before initialize, or call engine.destroy(), resize, and initialize again"
_GENERATE = "generate inside 'with zero.unsharded(model):', on every rank"

FIXES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "merge_and_unload": _WHOLE,
        "merge_adapter": _WHOLE,
        "unmerge_adapter": _WHOLE,
        "unload": _WHOLE,
        "add_weighted_adapter": _WHOLE,
        "resize_token_embeddings": _RESIZE,
        "generate": _GENERATE,
    }
)


def client_call() -> tuple[str, str] | None:
    """(``peft's merge_and_unload()``, what to do instead) where such a call is under way; None elsewhere."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_name
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if name in FIXES and package not in ("torch", "zeropipe"):
            return f"{package}'s {name}()", FIXES[name]
        frame = frame.f_back  # type: ignore[assignment]
    return None
