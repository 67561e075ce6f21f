"""Recompute activations in backward instead of keeping them, under the names that DeepSpeed users call.

Torch's own checkpointing does the work. What it lacks is added here: the named random states of model-parallel
dropout, replayed in recomputation as they were in forward, and keeping the saved inputs in CPU memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils import checkpoint as torch_checkpoint

from zeropipe.runtime.rng_tracker import CudaRNGStatesTracker
from zeropipe.utils.logging import logger

if TYPE_CHECKING:
    from zeropipe.config.schema_training import ActivationCheckpointing

_WITHOUT_EFFECT = {
    "partition_activations": "there is no model-parallel group to share them with",
    "contiguous_checkpointing": "torch's allocator keeps them",
    "num_checkpoints": "no buffer is allocated ahead",
    "synchronize": "streams order the work",
    "profile": "use torch.profiler",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What ``configure`` was told; None where it was not."""

    mpu: Any = None
    partition_activations: bool | None = None
    contiguous_checkpointing: bool | None = None
    num_checkpoints: int | None = None
    checkpoint_in_cpu: bool | None = None
    synchronize: bool | None = None
    profile: bool | None = None


class Checkpointer:
    """Activation checkpointing with its settings and random states."""

    def __init__(self) -> None:
        self.settings: Settings | None = None
        self.tracker = CudaRNGStatesTracker()
        self._said: set[str] = set()  # settings without effect that were spoken of

    @property
    def is_configured(self) -> bool:
        return self.settings is not None

    def configure(self, settings: Settings) -> None:
        self.settings = settings
        for name, reason in _WITHOUT_EFFECT.items():
            if getattr(settings, name) and name not in self._said:
                self._said.add(name)
                logger.warning("activation checkpointing: %s has no effect: %s", name, reason)

    def reset(self) -> None:
        """Back to the state before ``configure`` and before any seed."""
        self.settings = None
        self.tracker.reset()

    def checkpoint(
        self, function: Callable[..., Any], *args: Any, use_reentrant: bool = False, **kwargs: Any
    ) -> Any:
        states = self.tracker.get_states()
        recomputing = False

        def replayed(*inner: Any, **named: Any) -> Any:
            nonlocal recomputing
            with self.tracker.replaying(states) if recomputing else nullcontext():
                recomputing = True
                return function(*inner, **named)

        with self._saving():
            return torch_checkpoint.checkpoint(replayed, *args, use_reentrant=use_reentrant, **kwargs)

    def model_rank(self) -> int:
        """This rank's place among the model-parallel ones, as the configured ``mpu`` says; 0 without one."""
        mpu = self.settings.mpu if self.settings is not None else None
        for name in ("get_tensor_model_parallel_rank", "get_model_parallel_rank"):
            if hasattr(mpu, name):
                return int(getattr(mpu, name)())
        return 0

    def _saving(self) -> AbstractContextManager[Any]:
        if self.settings is None or not self.settings.checkpoint_in_cpu:
            return nullcontext()
        return save_on_cpu(pin_memory=torch.cuda.is_available())


# The one holder of state at module level: the interface that users know is made of module functions, which
# share settings and seeds and have no object to keep them in. reset() empties it.
CHECKPOINTER = Checkpointer()


def configure(
    mpu_: Any = None,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Say how ``checkpoint`` works from now on. Arguments win over the config's ``activation_checkpointing``.

    ``mpu_``: an object with ``get_model_parallel_rank()``, for the random states. ``deepspeed_config``: a parsed
    Config, a dict, or a path. Only ``checkpoint_in_cpu`` changes anything here; for each of the others that is
    asked for, the log says once why it has no effect.
    """
    section = _section(deepspeed_config)
    given: dict[str, Any] = {
        "partition_activations": partition_activations,
        "contiguous_checkpointing": contiguous_checkpointing,
        "num_checkpoints": num_checkpoints,
        "checkpoint_in_cpu": checkpoint_in_cpu,
        "synchronize": synchronize,
        "profile": profile,
    }
    settings = Settings(mpu=mpu_) if section is None else _settings(section, mpu_)
    CHECKPOINTER.configure(replace(settings, **{k: v for k, v in given.items() if v is not None}))


def _section(config: Any) -> ActivationCheckpointing | None:
    if config is None or hasattr(config, "activation_checkpointing"):
        return getattr(config, "activation_checkpointing", None)
    from zeropipe.config.parse import parse_config  # pydantic: only for those who give a config here

    return parse_config(config).activation_checkpointing


def _settings(section: ActivationCheckpointing, mpu: Any) -> Settings:
    given = section.model_dump()
    return Settings(
        mpu=mpu,
        partition_activations=given["partition_activations"],
        contiguous_checkpointing=given["contiguous_memory_optimization"],
        num_checkpoints=given["number_checkpoints"],
        checkpoint_in_cpu=section.cpu_checkpointing,
        synchronize=given["synchronize_checkpoint_boundary"],
        profile=given["profile"],
    )


def is_configured() -> bool:
    """Whether ``configure`` was called since the start or the last ``reset``."""
    return CHECKPOINTER.is_configured


def reset() -> None:
    """Forget the configuration and all named random states."""
    CHECKPOINTER.reset()


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, whose activations are recomputed in backward rather than kept.

    Gradients and draws are the same as without it: the default random states and the tracker's named ones are
    replayed. With ``checkpoint_in_cpu`` the saved inputs wait in CPU memory (pinned where there is CUDA).
    ``use_reentrant=True`` takes torch's older way, with the same result.
    """
    return CHECKPOINTER.checkpoint(function, *args, **kwargs)


def non_reentrant_checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """The same as ``checkpoint``, under the name that says how."""
    return CHECKPOINTER.checkpoint(function, *args)


def get_cuda_rng_tracker() -> CudaRNGStatesTracker:
    """The named random states that ``checkpoint`` replays; use ``fork()`` around model-parallel dropout."""
    return CHECKPOINTER.tracker


def model_parallel_cuda_manual_seed(seed: int) -> None:
    """Seed the default random state alike on all model-parallel ranks, and the tracker's one differently."""
    CHECKPOINTER.tracker.seed_model_parallel(seed, CHECKPOINTER.model_rank())
