"""Reads the configuration's pipeline section against how the module was cut."""

from __future__ import annotations

from typing import Protocol

from zeropipe.errors import ConfigError
from zeropipe.runtime.pipe.module import PipelineModule
from zeropipe.runtime.pipe.schedule import find_kind
from zeropipe.runtime.pipe.sharding import Unshard


class PipelineSection(Protocol):
    """The configuration's ``pipeline`` section, as far as it is read here."""

    schedule: str
    num_chunks: int
    stages: int | None

    @property
    def model_fields_set(self) -> set[str]: ...


def pick_schedule(section: PipelineSection, module: PipelineModule) -> tuple[str, int]:
    """The schedule's name and chunks: the configuration's where it says, else the module's.

    Raises ConfigError where the configuration's schedule needs other layers on a rank than the module has built.
    """
    chosen = "schedule" in section.model_fields_set
    kind = find_kind(section.schedule if chosen else module.schedule or "1f1b")
    low, high = kind.chunks
    fits = kind.placement is module.placement or module.num_chunks == 1
    if not kind.trains or not fits or not low <= module.num_chunks <= high:
        wanted = kind.default_chunks
        raise ConfigError(
            f"config key pipeline.schedule: {kind.name!r} needs other stages on a rank than the module has",
            expected=f"a module built for {kind.name!r} ({wanted} stage(s) a rank)",
            found=f"{module.num_chunks} stage(s) a rank, built for {module.schedule or '1f1b'!r}",
            fix=f"PipelineModule(..., schedule={kind.name!r}), which decides which layers a rank builds",
        )
    if "num_chunks" in section.model_fields_set and section.num_chunks != module.num_chunks:
        raise ConfigError(
            "config key pipeline.num_chunks differs from the module",
            expected=module.num_chunks,
            found=section.num_chunks,
            fix=f"PipelineModule(..., num_chunks={section.num_chunks})",
        )
    if section.stages not in (None, module.num_stages):
        raise ConfigError(
            "config key pipeline.stages differs from the module",
            expected=module.num_stages,
            found=section.stages,
            fix="remove the key, or build PipelineModule with that many stages",
        )
    return kind.name, module.num_chunks


def shard_policy(zero_stage: int) -> Unshard:
    """When a stage's parameters are gathered, for a ZeRO stage."""
    return Unshard.STEP if zero_stage >= 3 else Unshard.NEVER
