"""The stages of ZeRO as the enumeration that DeepSpeed's files and users name."""

from __future__ import annotations

from enum import IntEnum


class ZeroStageEnum(IntEnum):
    """What is divided among ranks: nothing, optimizer state, gradients too, parameters too."""

    # Their numbers are in files that DeepSpeed wrote, and in configurations.
    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3
    max_stage = 3
