"""What an engine is made of: the one record that its other parts, a save and a load work on."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from zeropipe.comm.group import SELF, Group
from zeropipe.config.schema import Config
from zeropipe.errors import UsageError
from zeropipe.runtime.engine.clock import Clock
from zeropipe.runtime.engine.mixed_inputs import MixedInputs
from zeropipe.runtime.zero.gather.sharded_model import ShardedModel
from zeropipe.runtime.zero.hold.optimizer import ZeroOptimizer

_log = logging.getLogger("zeropipe")


@dataclass(slots=True, eq=False)
class Parts:
    """What an engine is made of; ``build`` puts it together, and the engine's other parts work on it."""

    # For its whole life.
    module: torch.nn.Module
    config: Config
    clock: Clock
    group: Group
    device: torch.device
    mpu: Any = None
    collate_fn: Any = None
    stages: Group = SELF  # of a pipeline: each of these ranks knows the names of its own stages alone

    # Until ``drop``.
    optimizer: ZeroOptimizer | None = None
    sharded: ShardedModel | None = None  # stage 3
    mixed: MixedInputs | None = None  # of a model that keeps some tensors wide

    # Users exchange these on the engine, and whoever works with them (a step, a checkpoint) must see the new one.
    lr_scheduler: Any = None
    training_dataloader: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that tells."""
        return self.group.ranks[self.group.rank] == 0

    def say(self, text: str) -> None:
        if text and self.first:
            _log.warning(text)

    def need_optimizer(self, call: str) -> ZeroOptimizer:
        if self.optimizer is None:
            raise UsageError(
                f"engine.{call}: this engine has no optimizer. Fix: pass optimizer= to initialize, or name one in "
                "the config; for inference call engine(batch) alone"
            )
        return self.optimizer

    def drop(self) -> None:
        """The engine is destroyed: what is left is a module and its figures."""
        self.optimizer = self.sharded = self.mixed = self.lr_scheduler = self.training_dataloader = None
