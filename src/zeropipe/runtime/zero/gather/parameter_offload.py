"""What trainers that generate text take off a model of stage 3, and put back afterwards: the hooks that gather.

They gather every parameter, remove the hooks, generate (each rank as many tokens as it likes) and register anew.
"""

from __future__ import annotations

import torch

from zeropipe.runtime.zero.gather.coordinator import Coordinator
from zeropipe.runtime.zero.gather.hooks import ModelHooks


class ParameterCoordinator:
    """The two calls about the recorded order of modules. There is nothing stale to drop: a step that runs other
    modules than the last is followed as it is, and the next plan is made from it."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    def is_invalid_trace(self) -> bool:
        """Whether no training step has been recorded yet."""
        return not self._coordinator.fetch_plan

    def _invalidate_trace(self) -> None:
        """Does nothing: see the class."""


class ParameterOffload:
    """``optimizer.parameter_offload``: ``forward_hooks`` are handles with ``remove()``; ``backward_hooks`` is
    empty, because backward is followed by hooks on tensors, which live for one pass."""

    def __init__(self, hooks: ModelHooks) -> None:
        self.module = hooks.module
        self.forward_hooks = hooks.handles
        self.backward_hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.param_coordinator = ParameterCoordinator(hooks.coordinator)
        self._hooks = hooks

    def _register_deepspeed_module(self, module: torch.nn.Module, count: list[int] | None = None) -> None:
        """Put the hooks back on the whole model; ``module`` is its root, ``count`` has no meaning here."""
        self._hooks.attach()
        self.forward_hooks = self._hooks.handles
