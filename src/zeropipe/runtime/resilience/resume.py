"""Goes on from the newest good state that there is, and says which it was and why."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal

from zeropipe.checkpoint.loader import nothing_there
from zeropipe.runtime.engine.checkpoints import Checkpoints


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where a run goes on: the same on every rank."""

    step: int  # optimizer steps that are done
    source: Literal["memory", "disk", "nothing"]
    why: str  # a sentence for the log: what was taken, and why nothing newer was
    client_state: dict[str, Any] = field(default_factory=dict)


def resume(
    checkpoints: Checkpoints, folder: str | os.PathLike[str] | None = None, *, trust: bool = False
) -> Resumed:
    """See ``engine.resume``."""
    if folder is None:
        return Resumed(checkpoints.step, "nothing", "no folder was given")
    back = checkpoints.restore(checkpoints.on_disk(folder, trust=trust))
    if back is None:
        return Resumed(checkpoints.step, "nothing", nothing_there(folder, None))
    path, client_state = back
    return Resumed(checkpoints.step, "disk", f"the newest good checkpoint is {path}", client_state)
