"""Counts micro-steps, boundaries and steps: the one clock of an engine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from zeropipe.config.batch import BatchSizes


@dataclass(slots=True)
class Clock:
    """What an engine counts.

    A micro-step ends with ``tick``; a boundary is the micro-step at which an optimizer step happens. By default
    that is every ``gradient_accumulation_steps``-th one; ``set_boundary`` overrides the count.
    """

    batch: BatchSizes
    micro_steps: int = 0
    global_steps: int = 0
    global_samples: int = 0
    skipped_steps: int = 0
    last_step_applied: bool = False
    forced_boundary: bool | None = None

    @property
    def is_boundary(self) -> bool:
        if self.forced_boundary is not None:
            return self.forced_boundary
        return (self.micro_steps + 1) % self.batch.gradient_accumulation_steps == 0

    def tick(self) -> None:
        """One micro-step is over."""
        self.micro_steps += 1
        self.last_step_applied = False

    def stepped(self, applied: bool) -> None:
        """One optimizer step was tried; ``applied`` is False when an overflow skipped it."""
        self.global_steps += 1
        self.global_samples += self.batch.train_batch_size
        self.skipped_steps += not applied
        self.last_step_applied = applied

    def state_dict(self) -> dict[str, int]:
        counted = ("micro_steps", "global_steps", "global_samples", "skipped_steps")
        return {key: value for key, value in asdict(self).items() if key in counted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, key, int(value))
