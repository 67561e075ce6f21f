"""Recompute activations in backward instead of keeping them, under the names that DeepSpeed users call.

Torch's own checkpointing does the work. What it lacks is added here: the named random states of model-parallel
dropout, replayed in recomputation as they were in forward, and keeping the saved inputs in CPU memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils import checkpoint as torch_checkpoint

from zeropipe.errors import UsageError
from zeropipe.given import Anything, Mpu
from zeropipe.utils.logging import logger

__all__ = [
    "CudaRNGStatesTracker",
    "checkpoint",
    "configure",
    "get_cuda_rng_tracker",
    "is_configured",
    "model_parallel_cuda_manual_seed",
    "non_reentrant_checkpoint",
    "reset",
]

# Argument of ``configure`` -> the key of the config's section, why it has no effect.
_WITHOUT_EFFECT = {
    "partition_activations": (
        "partition_activations",
        "there is no model-parallel group to share them with",
    ),
    "contiguous_checkpointing": ("contiguous_memory_optimization", "torch's allocator keeps them"),
    "num_checkpoints": ("number_checkpoints", "no buffer is allocated ahead"),
    "synchronize": ("synchronize_checkpoint_boundary", "streams order the work"),
    "profile": ("profile", "use torch.profiler"),
}
MODEL_PARALLEL_RNG = "model-parallel-rng"
# Keeps the model-parallel seeds away from the data-parallel one; the value Megatron-LM users know.
_MODEL_PARALLEL_OFFSET = 2718


def _default() -> Any:
    """Whose ``get_rng_state``, ``set_rng_state`` and ``manual_seed`` are those of the default state."""
    return torch.cuda if torch.cuda.is_available() else torch


class CudaRNGStatesTracker:
    """Random states by name, of the current CUDA device, or of the CPU on a machine without one.

    Inside ``fork(name)`` draws come from that state and advance it; the default state stands still.
    """

    def __init__(self) -> None:
        self._states: dict[str, torch.Tensor] = {}  # uint8, as torch gives them
        self._seeds: dict[int, str] = {}

    def reset(self) -> None:
        self._states, self._seeds = {}, {}

    def get_states(self) -> dict[str, torch.Tensor]:
        """A copy, which later draws do not change."""
        return {name: state.clone() for name, state in self._states.items()}

    def set_states(self, states: Mapping[str, torch.Tensor]) -> None:
        self._states = {name: state.clone() for name, state in states.items()}

    def add(self, name: str, seed: int) -> None:
        """Start the state ``name`` from ``seed``. Raises UsageError where either was used before."""
        if name in self._states:
            raise UsageError(f"the random state {name!r} exists", fix="reset() the tracker first")
        if seed in self._seeds:
            raise UsageError(
                f"seed {seed} is that of the random state {self._seeds[seed]!r}", fix="use another seed"
            )
        before = _default().get_rng_state()
        _default().manual_seed(seed)
        self._states[name] = _default().get_rng_state()
        self._seeds[seed] = name
        _default().set_rng_state(before)

    @contextmanager
    def fork(self, name: str = MODEL_PARALLEL_RNG) -> Iterator[None]:
        """Raises UsageError for a name that was not added."""
        if name not in self._states:
            raise UsageError(
                f"there is no random state {name!r}",
                found=f"{', '.join(self._states) or 'none'}",
                fix="call model_parallel_cuda_manual_seed(seed) or add(name, seed) first",
            )
        before = _default().get_rng_state()
        _default().set_rng_state(self._states[name])
        try:
            yield
        finally:
            self._states[name] = _default().get_rng_state()
            _default().set_rng_state(before)

    @contextmanager
    def replaying(self, states: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Draw from ``states``, taken earlier by ``get_states``, and afterwards go on as if nothing was drawn."""
        now = self.get_states()
        self.set_states(states)
        try:
            yield
        finally:
            self.set_states(now)


@dataclass
class Checkpointing:
    """What the functions below share."""

    tracker: CudaRNGStatesTracker = field(default_factory=CudaRNGStatesTracker)

    # What ``configure`` was told.
    is_configured: bool = False
    mpu: Any = None
    in_cpu: bool = False

    # Arguments without effect that the log has spoken of: once in a process, whatever is reset.
    said: set[str] = field(default_factory=set)


# The one holder of state at module level: the interface that users know is made of module functions, which share
# settings and seeds and have no object to keep them in. They stay functions, since models keep them, and are copied and
# pickled with what they keep: a bound method would take its object along.
SHARED = Checkpointing()


def configure(
    mpu_: Mpu = None,
    deepspeed_config: Anything = None,
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
    section = getattr(deepspeed_config, "activation_checkpointing", None)
    if deepspeed_config is not None and not hasattr(deepspeed_config, "activation_checkpointing"):
        from zeropipe.config.parse import parse_config  # pydantic: only for those who give a config here

        section = parse_config(deepspeed_config).activation_checkpointing
    told: dict[str, Any] = {} if section is None else section.model_dump()
    given = {
        "partition_activations": partition_activations,
        "contiguous_checkpointing": contiguous_checkpointing,
        "num_checkpoints": num_checkpoints,
        "synchronize": synchronize,
        "profile": profile,
    }
    SHARED.mpu, SHARED.is_configured = mpu_, True
    SHARED.in_cpu = bool(told.get("cpu_checkpointing") if checkpoint_in_cpu is None else checkpoint_in_cpu)
    for name, (key, reason) in _WITHOUT_EFFECT.items():
        asked = told.get(key) if given[name] is None else given[name]
        if asked and name not in SHARED.said:
            SHARED.said.add(name)
            logger.warning("activation checkpointing: %s has no effect: %s", name, reason)


def is_configured() -> bool:
    """Whether ``configure`` was called since the start or the last ``reset``."""
    return SHARED.is_configured


def reset() -> None:
    """Forget the configuration and all named random states."""
    SHARED.is_configured, SHARED.mpu, SHARED.in_cpu = False, None, False
    SHARED.tracker.reset()


def checkpoint(function: Callable[..., Any], *args: Any, use_reentrant: bool = False, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, whose activations are recomputed in backward rather than kept.

    Gradients and draws are the same as without it: the default random states and the tracker's named ones are
    replayed. With ``checkpoint_in_cpu`` the saved inputs wait in CPU memory (pinned where there is CUDA).
    ``use_reentrant=True`` takes torch's older way, with the same result.
    """
    tracker = SHARED.tracker
    states = tracker.get_states()
    recomputing = False

    def replayed(*inner: Any, **named: Any) -> Any:
        nonlocal recomputing
        # Torch calls this in forward, and again for each recomputation. The default states it replays itself.
        with tracker.replaying(states) if recomputing else nullcontext():
            recomputing = True
            return function(*inner, **named)

    pinned = torch.cuda.is_available()
    with save_on_cpu(pin_memory=pinned) if SHARED.in_cpu else nullcontext():
        return torch_checkpoint.checkpoint(replayed, *args, use_reentrant=use_reentrant, **kwargs)


def non_reentrant_checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """The same as ``checkpoint``, under the name that says how."""
    return checkpoint(function, *args)


def get_cuda_rng_tracker() -> CudaRNGStatesTracker:
    """The named random states that ``checkpoint`` replays; use ``fork()`` around model-parallel dropout."""
    return SHARED.tracker


def model_parallel_cuda_manual_seed(seed: int) -> None:
    """Seed the default random state alike on all model-parallel ranks, and the tracker's one differently."""
    # This rank's place among the model-parallel ones, as the configured ``mpu`` says; 0 without one.
    names = ("get_tensor_model_parallel_rank", "get_model_parallel_rank")
    rank = next((int(getattr(SHARED.mpu, name)()) for name in names if hasattr(SHARED.mpu, name)), 0)
    SHARED.tracker.reset()
    _default().manual_seed(seed)
    SHARED.tracker.add(MODEL_PARALLEL_RNG, seed + _MODEL_PARALLEL_OFFSET + rank)
