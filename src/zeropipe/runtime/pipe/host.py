"""What surrounds the compute of a pipeline step: data in, loss out, and the calls to whoever shards the parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, Protocol

import torch

from zeropipe.errors import UsageError
from zeropipe.runtime.pipe.containers import map_tensors
from zeropipe.runtime.pipe.feed import Feed, Losses
from zeropipe.runtime.pipe.tied import Gradients, Tie, sum_gradients


class Sharding(Gradients, Protocol):
    """What the owner of parameters and gradients offers a pipeline."""

    def reduce(self) -> None:
        """Reduce the gradients of all this rank's stages over the data axis."""

    def unshard(self, stage: int) -> None:
        """Gather the parameters of ``stage`` and keep them."""

    def reshard(self, stage: int) -> None:
        """Release them."""


class TrainingHost:
    """The host of one rank's executor. ``stages``: those of this rank; ``sharding`` None: forward only."""

    def __init__(
        self, stages: Collection[int], ties: Iterable[Tie], device: torch.device, sharding: Sharding | None
    ) -> None:
        self._stages, self._ties, self._device, self._sharding = stages, list(ties), device, sharding
        self._complete: set[int] = set()  # stages whose gradients are complete
        self._load: Callable[[], Feed] = _no_feed
        self._feed = Feed(None, None, 0)
        self._losses: Losses | None = None
        self._factor = 1.0
        self._keep = False
        self.outputs: list[Any] = []

    def begin(
        self,
        load: Callable[[], Feed],
        losses: Losses | None,
        factor: float = 1.0,
        keep_outputs: bool = False,
    ) -> None:
        """Say what the next run is about. ``factor``: loss scale over micro-batches."""
        self._load, self._losses, self._factor, self._keep = load, losses, factor, keep_outputs
        self._complete.clear()
        self.outputs = []

    def start(self) -> None:
        self._feed = self._load()

    def first_input(self, micro_batch: int) -> Any:
        return self._to_device(self._feed.inputs(micro_batch))

    def loss(self, micro_batch: int, output: Any) -> torch.Tensor | None:
        if self._keep:
            self.outputs.append(map_tensors(output, torch.Tensor.detach, "the model's output"))
        if self._losses is None:
            return None
        labels = self._to_device(self._feed.labels(micro_batch))
        loss = self._losses.compute(output, labels)
        if not torch.is_grad_enabled():
            return None
        if not loss.requires_grad:
            raise UsageError(
                "the loss depends on no trained parameter",
                fix="check that layers do not detach their output and that parameters require grad; "
                "checkpoint(..., use_reentrant=True) gives none where its input requires none: use False",
            )
        # In fp32 at least: the scaled loss of an fp16 model would overflow by itself.
        wide = loss if loss.dtype in (torch.float32, torch.float64) else loss.float()
        return loss if self._factor == 1.0 else wide * self._factor

    def unshard(self, stage: int) -> None:
        if self._sharding is not None:
            self._sharding.unshard(stage)

    def reshard(self, stage: int) -> None:
        if self._sharding is not None:
            self._sharding.reshard(stage)

    def reduce_tied(self, stage: int) -> None:
        if self._sharding is not None:
            sum_gradients(self._ties, self._sharding)

    def reduce_grad(self, stage: int) -> None:
        # One reduction for all stages of the rank: its buckets run over the borders of stages.
        self._complete.add(stage)
        if self._sharding is not None and self._complete.issuperset(self._stages):
            self._sharding.reduce()

    def _to_device(self, value: Any) -> Any:
        if self._device.type == "cpu":
            return value
        return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(self._device), value)


def _no_feed() -> Feed:
    raise AssertionError("begin was not called")
