"""The engine's weights as a state dict: taken out, put in, and written in the precision that the model runs in."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from zeropipe.comm.collectives import broadcast_object
from zeropipe.comm.group import Group
from zeropipe.config.schema import Config
from zeropipe.errors import CheckpointError
from zeropipe.runtime.zero.hold.optimizer import ZeroOptimizer

_log = logging.getLogger("zeropipe")


def load_weights(
    module: torch.nn.Module,
    optimizer: ZeroOptimizer | None,
    state: Mapping[str, Any],
    strict: bool = True,
) -> Any:
    """Load ``state`` into the module, and take the masters anew from what was loaded.

    Returns what ``module.load_state_dict`` returns. The optimizer's moments stay.
    """
    outcome = module.load_state_dict(state, strict=strict)
    if optimizer is not None:
        for partition in optimizer.partitions:
            partition.values.refresh_master()
    return outcome


def drop_frozen(module: torch.nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """``state`` without the parameters that do not require gradients (buffers stay)."""
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: value for name, value in state.items() if name not in frozen}


def host_copy(state: Mapping[str, Any]) -> dict[str, Any]:
    """``state`` in host memory, each tensor with a storage of its own size; tied tensors stay tied."""
    copies: dict[tuple[Any, ...], torch.Tensor] = {}

    def copy(value: Any) -> Any:
        if not torch.is_tensor(value):
            return value
        where = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() == 0 or where not in copies:
            copies[where] = value.detach().cpu().clone()
        return copies[where]

    return {name: copy(value) for name, value in state.items()}


def write_weights(state: Mapping[str, Any], folder: str | os.PathLike[str], filename: str) -> Path:
    """Write ``state`` as ``folder/filename``, under a temporary name first, so that a kill leaves no half file."""
    target = Path(folder) / filename
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(host_copy(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


class EngineWeights:
    """The engine's calls about weights; ``module``, ``optimizer`` and ``_group`` are the engine's."""

    module: torch.nn.Module
    optimizer: ZeroOptimizer | None
    _config: Config
    _group: Group

    def module_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any]:
        """The module's state dict: references, as ``module.state_dict()`` gives them."""
        state = self.module.state_dict()
        return drop_frozen(self.module, state) if exclude_frozen_parameters else state

    def load_module_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
        """Load weights (the same on every rank); masters follow, the optimizer's moments stay.

        Returns what ``module.load_state_dict`` returns.
        """
        return load_weights(self.module, self.optimizer, state_dict, strict)

    def save_16bit_model(
        self,
        save_dir: str | os.PathLike[str],
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write the weights, in the precision that the model runs in, as one file for ``torch.load``.

        Collective: rank 0 writes, all return when the file is there. Returns False, and writes nothing, at stage
        3 without ``stage3_gather_16bit_weights_on_model_save``. Raises CheckpointError, on every rank, if the
        file cannot be written.
        """
        zero = self._config.zero_optimization
        if zero.stage == 3 and not zero.stage3_gather_16bit_weights_on_model_save:
            if self._group.ranks[self._group.rank] == 0:
                _log.warning(
                    "save_16bit_model wrote nothing: at stage 3 it needs the config key "
                    "zero_optimization.stage3_gather_16bit_weights_on_model_save: true"
                )
            return False
        state = self._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters)
        problem = None
        if self._group.ranks[self._group.rank] == 0:
            try:
                write_weights(state, save_dir, save_filename)
            except OSError as error:
                problem = str(error)
        problem = broadcast_object(problem, 0, self._group, label="save_16bit_model")
        if problem is not None:
            raise CheckpointError(
                f"the weights cannot be written: {problem}", fix="free space there, or save elsewhere"
            )
        return True

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any]:
        """The whole state dict in host memory on rank 0, an empty one elsewhere; collective; tied tensors stay tied.

        Empty and not None: clients pass it on to ``save_pretrained(state_dict=...)`` on every rank, which takes None
        for leave to ask the model itself, on these ranks alone.
        """
        state = self.module_state_dict(exclude_frozen_parameters)
        return host_copy(state) if self._group.ranks[self._group.rank] == 0 else {}

    _consolidated_16bit_state_dict = _zero3_consolidated_16bit_state_dict
