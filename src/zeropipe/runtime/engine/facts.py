"""What an engine tells about itself: the read-only half of its interface, under the names that users know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from zeropipe.config.schema import Config
from zeropipe.runtime.engine.clock import Clock

if TYPE_CHECKING:
    from zeropipe.runtime.zero.hold.optimizer import ZeroOptimizer


class EngineFacts:
    """Read-only views of an engine's clock, config and optimizer."""

    clock: Clock
    optimizer: ZeroOptimizer | None
    _config: Config

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as it was given: the same dict."""
        return self._config.raw

    @property
    def global_steps(self) -> int:
        """Optimizer steps tried so far, skipped ones included."""
        return self.clock.global_steps

    @property
    def global_samples(self) -> int:
        return self.clock.global_samples

    @property
    def micro_steps(self) -> int:
        return self.clock.micro_steps

    @property
    def skipped_steps(self) -> int:
        """Steps that an overflow skipped."""
        return self.clock.skipped_steps

    def train_batch_size(self) -> int:
        return self.clock.batch.train_batch_size

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.clock.batch.micro_batch_size

    def gradient_accumulation_steps(self) -> int:
        return self.clock.batch.gradient_accumulation_steps

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the next ``step`` is an optimizer step."""
        return self.clock.is_boundary

    def was_step_applied(self) -> bool:
        """Whether the latest ``step`` changed the parameters (False off the boundary and after an overflow)."""
        return self.clock.last_step_applied

    def zero_optimization(self) -> bool:
        return self._config.zero_optimization.stage > 0

    def zero_optimization_stage(self) -> int:
        return self._config.zero_optimization.stage

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        return self._config.zero_optimization.stage3_gather_16bit_weights_on_model_save

    def fp16_enabled(self) -> bool:
        return self._config.precision == "fp16"

    def bfloat16_enabled(self) -> bool:
        return self._config.precision == "bf16"

    def gradient_clipping(self) -> float:
        return self._config.gradient_clipping

    def dynamic_loss_scale(self) -> bool:
        return self._config.fp16.enabled and self._config.fp16.loss_scale == 0

    @property
    def loss_scale(self) -> float:
        """The current loss scale, 1.0 without scaling."""
        return 1.0 if self.optimizer is None else self.optimizer.loss_scale

    def get_global_grad_norm(self) -> float | None:
        """L2 norm over all parameters of the last step's averaged gradients, before clipping."""
        return None if self.optimizer is None else self.optimizer.grad_norm

    def get_lr(self) -> list[float]:
        """The learning rate of each param group."""
        return [] if self.optimizer is None else [group["lr"] for group in self.optimizer.param_groups]

    def get_type(self) -> str | None:
        """The class name of the torch optimizer."""
        return None if self.optimizer is None else type(self.optimizer.optimizer).__name__

    @property
    def communication_data_type(self) -> torch.dtype | None:
        return None if self.optimizer is None else self.optimizer.policy.reduce_dtype
