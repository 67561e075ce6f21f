"""What the model's forward is given beside the user's arguments, where the configuration asks for it: the length of a
curriculum, the share of layers to keep."""

from __future__ import annotations

import inspect
from typing import Any

from zeropipe.errors import ConfigError
from zeropipe.runtime.curriculum import CurriculumScheduler, ProgressiveLayerDrop
from zeropipe.runtime.engine.parts import Parts


class Regimes:
    """Of one engine. Raises ConfigError where the model's forward does not take what it would be given."""

    def __init__(self, parts: Parts) -> None:
        config, self._clock = parts.config, parts.clock
        self._step = 0  # of the last advance
        self.curriculum: CurriculumScheduler | None = None
        self.layer_drop: ProgressiveLayerDrop | None = None
        section, drop = config.curriculum_learning, config.progressive_layer_drop
        self._tells_length = section.enabled and section.curriculum_type == "seqlen"
        if section.enabled:
            self.curriculum = CurriculumScheduler(section)
        if drop.enabled:
            self.layer_drop = ProgressiveLayerDrop(drop.theta, drop.gamma)
        # A pipeline's layers are given what the one before returned; its data is cut by set_batch_fn.
        if parts.stages.size == 1:
            self._check_forward(parts.module)
        elif drop.enabled:
            raise ConfigError(
                "config key 'progressive_layer_drop.enabled' is true, and a pipeline's layers take no keywords",
                fix="remove the section, or read engine.progressive_layer_drop in your layers",
            )

    def _check_forward(self, module: Any) -> None:
        if not (self._tells_length or self.layer_drop):
            return
        takes = inspect.signature(module.forward).parameters
        if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in takes.values()):
            return
        wanted = {"curriculum_learning": ["curriculum_seqlen"] * self._tells_length}
        if self.layer_drop is not None:
            wanted["progressive_layer_drop"] = list(self.layer_drop.get_state())
        for section, names in wanted.items():
            missing = [name for name in names if name not in takes]
            if missing:
                raise ConfigError(
                    f"config section '{section}': the model's forward is given {', '.join(missing)}",
                    expected=f"a forward of {type(module).__name__} that takes it",
                    found=f"forward({', '.join(takes)})",
                    fix="add the keyword to forward and use it there, or remove the section",
                )

    def advance(self) -> bool:
        """Go to the coming step; whether the difficulty has changed."""
        step = self._clock.global_steps
        if self.layer_drop is not None:
            self.layer_drop.update_state(step)
        if self.curriculum is None:
            return False
        before = self.curriculum.current_difficulty
        if (
            step < self._step
        ):  # an earlier checkpoint was loaded; at its maximum the schedule would stay there
            self.curriculum.set_current_difficulty(self.curriculum.min_difficulty)
        self._step = step
        return self.curriculum.update_difficulty(step + 1) != before  # the first step is number 1

    def arguments(self) -> dict[str, Any]:
        """What forward is given in the coming step."""
        self.advance()
        given: dict[str, Any] = {} if self.layer_drop is None else self.layer_drop.get_state()
        if self._tells_length and self.curriculum is not None:
            given["curriculum_seqlen"] = self.curriculum.current_difficulty
        return given
