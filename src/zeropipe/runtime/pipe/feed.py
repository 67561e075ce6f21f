"""Hands micro-batches to the two ends of a pipeline, and gathers what the loss function says about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from zeropipe.errors import UsageError

LossFn = Callable[..., Any]


class Feed:
    """The micro-batches of one step on a rank that runs the first or the last stage (or both).

    A batch is ``(inputs, labels)``, or what ``batch_fn`` makes of it. Every such rank draws from an iterator of its
    own, and all iterators give the same batches.
    """

    def __init__(
        self, iterator: Iterator[Any] | None, batch_fn: Callable[[Any], Any] | None, count: int
    ) -> None:
        self.count = count
        self._batches: list[tuple[Any, Any]] = []
        if iterator is None:
            return
        for number in range(count):
            try:
                batch = next(iterator)
            except StopIteration:
                # Raised as an error of its own: a StopIteration would end a caller's generator in silence.
                raise UsageError(
                    "the data iterator ended inside a step",
                    expected=f"{count} micro-batches",
                    found=number,
                    fix="repeat the loader, drop the last incomplete batch, or lower gradient_accumulation_steps",
                ) from None
            self._batches.append(_pair(batch if batch_fn is None else batch_fn(batch)))

    def inputs(self, micro_batch: int) -> Any:
        return self._batches[micro_batch][0]

    def labels(self, micro_batch: int) -> Any:
        return self._batches[micro_batch][1]


def _pair(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    found = f"a {type(batch).__name__}" + (f" of {len(batch)}" if hasattr(batch, "__len__") else "")
    raise UsageError(
        "a pipeline's batch has two parts",
        expected="(inputs, labels)",
        found=found,
        fix="convert it with engine.set_batch_fn(fn); use None where there are no labels",
    )


class Repeat:
    """Goes through ``loader`` again and again."""

    def __init__(self, loader: Any) -> None:
        self._loader, self._iterator = loader, iter(loader)

    def __iter__(self) -> Repeat:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._iterator)
        except StopIteration:
            self._iterator = iter(self._loader)
        try:
            return next(self._iterator)
        except StopIteration:
            raise UsageError(
                "the training data gives no micro-batch",
                expected="a loader that gives at least one each time it is gone through",
                found=f"none from a {type(self._loader).__name__}",
                fix="give more samples than one micro-batch takes on each rank, set dataloader_drop_last to false, "
                "or, where the loader is an iterator, pass it to train_batch(data_iter)",
            ) from None


class Losses:
    """What the loss function returned for each micro-batch of a step, on the rank of the last stage.

    It returns a scalar; or a dict with the scalar under ``loss`` and other terms beside it; or a tuple whose first
    element is the loss.
    """

    def __init__(self, loss_fn: LossFn | None) -> None:
        self._loss_fn = loss_fn
        self.values: list[torch.Tensor] = []  # [] each, detached
        self.terms: dict[str, list[torch.Tensor]] = {}

    def row(self, names: list[str], count: int, how: str | None) -> torch.Tensor:
        """fp64?, the loss (``how``: avg or sum), the mean of each named term, each of ``count`` losses; 1D, fp64."""
        values = torch.stack([_wide(value) for value in self.values])
        loss = values.sum() if how == "sum" else values.mean()
        means = [torch.stack(self.terms[name]).mean() for name in names]
        is_wide = torch.tensor(values.dtype == torch.float64)
        return torch.stack([one.to("cpu", torch.float64) for one in (is_wide, loss, *means, *values)])

    def compute(self, output: Any, labels: Any) -> torch.Tensor:
        """The loss to minimise, with its graph; everything returned is noted."""
        returned = output if self._loss_fn is None else self._loss_fn(output, labels)
        loss, terms = _split(returned)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            found = (
                f"a {loss.dtype} tensor of shape {tuple(loss.shape)}"
                if isinstance(loss, torch.Tensor)
                else type(loss).__name__
            )
            raise UsageError(
                "the loss function" if self._loss_fn is not None else "the last layer (there is no loss_fn)",
                expected="a floating-point tensor with one element",
                found=found,
                fix="return loss.mean(), a dict with the key 'loss', or pass PipelineModule(loss_fn=...)",
            )
        self.values.append(loss.detach().reshape(()))
        for name, value in terms.items():
            self.terms.setdefault(name, []).append(_mean(name, value))
        return loss.reshape(())


def _wide(value: torch.Tensor) -> torch.Tensor:
    """In fp32 at least."""
    return value if value.dtype == torch.float64 else value.float()


def _mean(name: str, value: Any) -> torch.Tensor:
    try:
        return _wide(torch.as_tensor(value).detach()).mean()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"the loss function's term {name!r}",
            expected="a number or a tensor",
            found=type(value).__name__,
            fix="return only numbers beside the loss",
        ) from error


def _split(returned: Any) -> tuple[Any, dict[str, Any]]:
    if isinstance(returned, dict):
        return returned.get("loss"), {k: v for k, v in returned.items() if k != "loss"}
    if isinstance(returned, (tuple, list)) and returned:
        return returned[0], {f"term_{i}": v for i, v in enumerate(returned[1:], 1)}
    return returned, {}
