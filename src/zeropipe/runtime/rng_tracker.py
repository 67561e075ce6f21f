"""Named random states beside the default one, so that model-parallel ranks can agree on some draws and not others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from zeropipe.errors import UsageError

MODEL_PARALLEL_RNG = "model-parallel-rng"
# Keeps the model-parallel seeds away from the data-parallel one; the value Megatron-LM users know.
_MODEL_PARALLEL_OFFSET = 2718


def _get_state() -> torch.Tensor:
    return torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.get_rng_state()


def _set_state(state: torch.Tensor) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state)
    else:
        torch.set_rng_state(state)


def _seed(seed: int) -> None:
    if torch.cuda.is_available():
        torch.cuda.manual_seed(seed)
    else:
        torch.manual_seed(seed)


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
        before = _get_state()
        _seed(seed)
        self._states[name] = _get_state()
        self._seeds[seed] = name
        _set_state(before)

    @contextmanager
    def fork(self, name: str = MODEL_PARALLEL_RNG) -> Iterator[None]:
        """Raises UsageError for a name that was not added."""
        if name not in self._states:
            raise UsageError(
                f"there is no random state {name!r}",
                found=f"{', '.join(self._states) or 'none'}",
                fix="call model_parallel_cuda_manual_seed(seed) or add(name, seed) first",
            )
        before = _get_state()
        _set_state(self._states[name])
        try:
            yield
        finally:
            self._states[name] = _get_state()
            _set_state(before)

    @contextmanager
    def replaying(self, states: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Draw from ``states``, taken earlier by ``get_states``, and afterwards go on as if nothing was drawn."""
        now = self.get_states()
        self.set_states(states)
        try:
            yield
        finally:
            self.set_states(now)

    def seed_model_parallel(self, seed: int, model_rank: int) -> None:
        """The default state from ``seed``, alike on all model-parallel ranks, and one that differs among them."""
        self.reset()
        _seed(seed)
        self.add(MODEL_PARALLEL_RNG, seed + _MODEL_PARALLEL_OFFSET + model_rank)
