"""What grows or falls with the steps of a run beside the learning rate: the difficulty of samples (a curriculum, arXiv
2108.06084) and the share of layers that run (progressive layer drop, arXiv 2010.13369).

Both are functions of the step alone, so a run that was resumed goes on with what it would have had.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from zeropipe.config.schema_data import Curriculum
from zeropipe.errors import ConfigError, UsageError

Schedule = Callable[[int], int]
_WANTED = {
    "fixed_linear": ("total_curriculum_step", "difficulty_step"),
    "fixed_root": ("total_curriculum_step", "difficulty_step", "root_degree"),
    "fixed_discrete": ("difficulty", "max_step"),
    "custom": (),
}


class CurriculumScheduler:
    """The difficulty at each step.

    ``config``: ``min_difficulty``, ``max_difficulty``, ``schedule_type`` and ``schedule_config``, as in the
    configuration. ``fixed_linear`` and ``fixed_root`` reach the maximum at ``total_curriculum_step``, along the line or
    the ``root_degree``-th root, in multiples of ``difficulty_step``; ``fixed_discrete`` lists each ``difficulty`` and
    the ``max_step`` up to which it holds. Raises ConfigError for what is missing or out of range.
    """

    def __init__(self, config: Mapping[str, Any] | Curriculum) -> None:
        given = config if isinstance(config, Mapping) else config.model_dump()
        kind, options = given.get("schedule_type"), dict(given.get("schedule_config") or {})
        missing = [
            name for name in ("min_difficulty", "max_difficulty", "schedule_type") if given.get(name) is None
        ]
        if kind is not None and kind not in _WANTED:
            raise ConfigError(
                "curriculum: schedule_type", expected=f"one of {', '.join(_WANTED)}", found=repr(kind)
            )
        missing += [f"schedule_config.{n}" for n in _WANTED.get(str(kind), ()) if options.get(n) is None]
        if missing:
            raise ConfigError(
                f"curriculum: {', '.join(missing)} missing", fix="give it beside the others in the section"
            )
        self.min_difficulty, self.max_difficulty = given["min_difficulty"], given["max_difficulty"]
        self.schedule_type, self.schedule_config = str(kind), options
        self.current_difficulty: int = self.min_difficulty
        self._schedule: Schedule | None = None if kind == "custom" else self._fixed()

    def _fixed(self) -> Schedule:
        options = self.schedule_config
        if self.schedule_type == "fixed_discrete":
            levels, ends = list(options["difficulty"]), list(options["max_step"])
            if len(levels) != len(ends) + 1:
                raise ConfigError(
                    "curriculum: schedule_config.max_step",
                    expected=f"{len(levels) - 1} steps, one less than difficulties",
                    found=len(ends),
                )
            return lambda step: next(
                (level for level, end in zip(levels, ends, strict=False) if step <= end), levels[-1]
            )
        total, unit, degree = (
            options["total_curriculum_step"],
            options["difficulty_step"],
            options.get("root_degree", 1),
        )
        for name, value in (
            ("total_curriculum_step", total),
            ("difficulty_step", unit),
            ("root_degree", degree),
        ):
            if not value > 0:
                raise ConfigError(f"curriculum: schedule_config.{name}", expected="above 0", found=value)
        low, high = self.min_difficulty, self.max_difficulty

        def rising(step: int) -> int:
            reached = math.floor((step / total) ** (1.0 / degree) * (high - low) + low)
            # Whole units, of which the first is not below the minimum.
            whole = reached - reached % unit
            return min(int(whole if whole >= low else whole + unit), high)

        return rising

    def set_custom_get_difficulty(self, schedule_function: Schedule) -> None:
        """``schedule_function(step)`` is the difficulty from now on; ``custom`` needs one."""
        self._schedule = schedule_function

    def get_difficulty(self, global_steps: int) -> int:
        """The difficulty of a step, counted from 0. Raises UsageError for ``custom`` without a function."""
        if self._schedule is None:
            raise UsageError(
                "the curriculum's schedule_type is 'custom', and there is no function",
                fix="call set_custom_get_difficulty(function of the step)",
            )
        return self._schedule(global_steps)

    def update_difficulty(self, global_steps: int) -> int:
        """Go to a step; at the maximum it stays. Returns the difficulty."""
        if self.current_difficulty < self.max_difficulty:
            self.current_difficulty = self.get_difficulty(global_steps)
        return self.current_difficulty

    def get_current_difficulty(self) -> int:
        return self.current_difficulty

    def set_current_difficulty(self, difficulty: int) -> None:
        self.current_difficulty = difficulty

    @property
    def state(self) -> dict[str, Any]:
        """What the schedule is, and where: a new dict."""
        return {
            "min_difficulty": self.min_difficulty,
            "max_difficulty": self.max_difficulty,
            "current_difficulty": self.current_difficulty,
            "schedule_type": self.schedule_type,
            "schedule_config": self.schedule_config,
        }

    def get_state(self) -> dict[str, Any]:
        return self.state

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go to the difficulty of a ``state``."""
        self.current_difficulty = state["current_difficulty"]


class ProgressiveLayerDrop:
    """The share of layers that run: 1 at first, falling to ``theta`` as ``(1 - theta) exp(-gamma step) + theta``."""

    def __init__(self, theta: float = 0.5, gamma: float = 0.001) -> None:
        self.theta, self.gamma = theta, gamma
        self.current_theta = 1.0

    def update_state(self, global_step: int) -> None:
        """Go to a step, counted from 0."""
        self.current_theta = (1.0 - self.theta) * math.exp(-self.gamma * global_step) + self.theta

    def get_theta(self) -> float:
        return self.current_theta

    def get_state(self) -> dict[str, Any]:
        """What the model's forward is given."""
        return {"progressive_layer_drop": True, "pld_theta": self.current_theta}
