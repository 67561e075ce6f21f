"""``offload_states`` and ``reload_states`` of the engine: room on the device between phases of a program."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch

from zeropipe.errors import UsageError
from zeropipe.runtime.zero.hold import offload_states as states
from zeropipe.runtime.zero.hold.offload_states import OffloadStateTypeEnum as Kind

if TYPE_CHECKING:
    from zeropipe.runtime.engine.engine import DeepSpeedEngine

_FOR_FORWARD = frozenset({Kind.lp_params, Kind.hp_params})  # at stage 3 gathers read the masters


class EngineOffload:
    """The calls that move an engine's tensors off the device and back."""

    _away: frozenset[Kind] = frozenset()

    def offload_states(
        self,
        include: Iterable[object] | None = None,
        device: object = "cpu",
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """Move parameters, masters, gradients and optimizer state to host memory; not collective.

        ``include``: some of ``optim_states``, ``hp_params``, ``lp_params``, ``lp_grads`` and
        ``contiguous_grad_buffer`` (strings or ``OffloadStateTypeEnum``); default all. A forward or a step that
        needs what is away brings it back. Saving and ``safe_get_*`` work meanwhile. ``device``: only ``cpu``.

        Raises UsageError without an optimizer, and for another device or kind.
        """
        engine = cast("DeepSpeedEngine", self)
        name = getattr(device, "value", str(device))
        if name != "cpu":
            raise UsageError("offload_states: device", expected="cpu", found=name, fix="leave it out")
        optimizer = engine._need_optimizer("offload_states")
        optimizer.reducer.settle()
        kinds = states.wanted(include) - self._away
        states.move_states(optimizer, kinds, states.to_host(optimizer, pin_memory, non_blocking))
        if engine.device.type == "cuda":
            torch.cuda.current_stream(engine.device).synchronize()
            torch.cuda.empty_cache()
        self._away |= kinds

    def reload_states(self, non_blocking: bool = False) -> None:
        """Bring back what ``offload_states`` moved away; nothing to do where nothing is."""
        self._reload(frozenset(Kind), non_blocking)

    def _reload_for_forward(self) -> None:
        """Bring back what the coming forward reads, and where gradients will follow, their buffers."""
        if self._away:
            self._reload(frozenset(Kind) - {Kind.optim_states} if torch.is_grad_enabled() else _FOR_FORWARD)

    def _reload(self, kinds: frozenset[Kind], non_blocking: bool = False) -> None:
        engine = cast("DeepSpeedEngine", self)
        kinds &= self._away
        if kinds and engine.optimizer is not None:
            move = states.to_device(engine.optimizer, engine.device, non_blocking)
            states.move_states(engine.optimizer, kinds, move)
        self._away -= kinds
