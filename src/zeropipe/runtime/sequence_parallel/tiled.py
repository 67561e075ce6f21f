"""A sequence computed tile by tile, so that what a layer makes in between is there for one tile at a time.

Source: ALST, Bekman et al. 2025, arXiv:2506.13996. Each tile is an activation checkpoint: nothing but its input is
kept, and backward computes it again, one tile after the other::

    forward     tile 0 -> y0, forget   tile 1 -> y1, forget   ...            kept: x, y
    backward    ...   tile 1 again -> its gradients   tile 0 again -> its gradients

A parameter is used once a tile, and autograd hands on the sum of its gradients once, after the last of them. So it is
as if there were no tiles, at every ZeRO stage and under any factor of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from zeropipe.errors import UsageError
from zeropipe.given import Anything
from zeropipe.layout.balance import cut_evenly


def sequence_tiled_compute(
    fn: Callable[..., torch.Tensor],
    seqlen: int,
    shards: int,
    kwargs_to_shard: Mapping[str, torch.Tensor | None],
    kwargs_to_pass: Mapping[str, Any],
    grad_requiring_tensor_key: str | None = None,
    compute_params: Sequence[torch.nn.Parameter] | None = None,
    output_unshard_dimension: int = 1,
    output_reduction: str | None = "mean",
) -> torch.Tensor:
    """``fn(**tiles, **kwargs_to_pass)`` of ``shards`` tiles of the sequence, put together.

    Args:
        fn: of each tile; returns a tensor.
        seqlen: elements of dim 1 of each tensor that is cut.
        shards: how many tiles; the last ones are one token smaller where it does not divide ``seqlen``.
        kwargs_to_shard: tensors [batch, seqlen, ...] (or None, passed as it is).
        kwargs_to_pass: given to every tile.
        grad_requiring_tensor_key, compute_params: taken and not needed; autograd knows.
        output_unshard_dimension: along which the tiles' outputs follow one another.
        output_reduction: None: they do so. "sum": of all of them. "mean": each counts by its tokens.

    Raises UsageError for another reduction, no tile, or tensors of other lengths.
    """
    _check(shards, output_reduction, (None, "mean", "sum"))
    for name, value in kwargs_to_shard.items():
        if value is not None and (value.ndim < 2 or value.shape[1] != seqlen):
            raise UsageError(
                f"sequence_tiled_compute: {name!r}",
                expected=f"a tensor [batch, {seqlen}, ...]",
                found=tuple(value.shape),
            )
    tiles = _cut(kwargs_to_shard, seqlen, shards, 1)
    outputs = [_apart(fn, **tile, **kwargs_to_pass) for tile, _ in tiles]
    return _joined(outputs, [size for _, size in tiles], output_unshard_dimension, output_reduction)


class SequenceTiledCompute:
    """``sequence_tiled_compute`` as it is called with positions."""

    @staticmethod
    def apply(
        fn: Callable[..., torch.Tensor],
        seqlen: int,
        shards: int,
        keys_to_shard: Sequence[str],
        keys_to_pass: Sequence[str],
        grad_requiring_tensor_key: str | None,
        compute_params: Sequence[torch.nn.Parameter] | None,
        output_unshard_dimension: int,
        output_reduction: str | None,
        *args: Any,
    ) -> torch.Tensor:
        """``args``: the values of ``keys_to_shard``, then those of ``keys_to_pass``."""
        cut = dict(zip(keys_to_shard, args, strict=False))
        passed = dict(zip(keys_to_pass, args[len(cut) :], strict=True))
        return sequence_tiled_compute(
            fn, seqlen, shards, cut, passed, None, None, output_unshard_dimension, output_reduction
        )


class TiledMLP:
    """A layer that treats each token by itself, tile by tile."""

    @staticmethod
    def apply(
        fn: Callable[[Any, torch.Tensor], torch.Tensor],
        self: Anything,
        x: torch.Tensor,
        shards: int,
        compute_params: Sequence[torch.nn.Parameter] | None = None,
    ) -> torch.Tensor:
        """``fn(self, x)`` for ``x`` [batch, tokens, ...] or [tokens, ...], cut along its tokens into ``shards``."""
        _check(shards, None, (None,))
        dim = x.ndim - 2 if x.ndim > 1 else 0
        tiles = _cut({"x": x}, x.shape[dim], shards, dim)
        return torch.cat([_apart(fn, self, tile["x"]) for tile, _ in tiles], dim)


class TiledFusedLogitsLoss:
    """The head and the loss tile by tile, so that the logits of all tokens are never there at once."""

    @staticmethod
    def apply(
        fn: Callable[..., torch.Tensor],
        self: Anything,
        x: torch.Tensor,
        y: torch.Tensor,
        mask: torch.Tensor | None,
        shards: int,
        compute_params: Sequence[torch.nn.Parameter] | None = None,
        output_reduction: str = "mean",
    ) -> torch.Tensor:
        """``fn(self, x, y)``, or ``fn(self, x, y, mask)`` with a mask, of tiles whose batch and tokens are one dim.

        ``x`` [batch, tokens, ...], ``y`` [batch, tokens, ...], ``mask`` [batch, tokens]. "sum" is the sum of what
        ``fn`` returns, exact where that is a sum; "mean" weighs each tile by its tokens, with a mask by those that the
        mask has, exact where ``fn`` returns the mean over them.

        Raises UsageError for another reduction, no tile, or shapes that do not fit.
        """
        _check(shards, output_reduction, ("mean", "sum"))
        for name, value in (("y", y), ("mask", mask)):
            if value is not None and (value.ndim < 2 or value.shape[:2] != x.shape[:2]):
                raise UsageError(
                    f"TiledFusedLogitsLoss: {name}",
                    expected=f"[batch, tokens, ...] = {tuple(x.shape[:2])}, as x",
                    found=tuple(value.shape),
                )
        flat = [None if t is None else t.flatten(0, 1) for t in (x, y, mask)]
        tokens = x.shape[0] * x.shape[1]
        tiles = _cut(dict(zip(("x", "y", "mask"), flat, strict=True)), tokens, shards, 0)
        names = ("x", "y") if mask is None else ("x", "y", "mask")
        outputs = [_apart(fn, self, *(tile[name] for name in names)) for tile, _ in tiles]
        if output_reduction == "mean" and mask is not None:
            shares = torch.stack([tile["mask"].count_nonzero() for tile, _ in tiles])
            # The mean of a tile without a token is no number, and no part of the mean of all.
            values = torch.stack(outputs).where(shares > 0, 0.0)
            return (values * shares).sum() / shares.sum().clamp(min=1)
        return _joined(outputs, [size for _, size in tiles], 0, output_reduction)


def _check(shards: int, reduction: str | None, known: tuple[str | None, ...]) -> None:
    if shards < 1:
        raise UsageError("tiles of a sequence: shards", expected="at least 1", found=shards)
    if reduction not in known:
        raise UsageError(
            "tiles of a sequence: output_reduction",
            expected=" or ".join(map(repr, known)),
            found=repr(reduction),
        )


def _cut(
    tensors: Mapping[str, torch.Tensor | None], tokens: int, shards: int, dim: int
) -> list[tuple[dict[str, Any], int]]:
    """The tiles, each with its number of tokens; fewer than ``shards`` where there are fewer tokens."""
    bounds = cut_evenly(tokens, min(shards, tokens)) if tokens else (0, 0)
    return [
        (
            {name: None if t is None else t.narrow(dim, start, end - start) for name, t in tensors.items()},
            end - start,
        )
        for start, end in pairwise(bounds)
    ]


def _apart(fn: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return fn(*args, **kwargs)
    return checkpoint(fn, *args, use_reentrant=False, **kwargs)  # type: ignore[no-any-return]


def _joined(
    outputs: Sequence[torch.Tensor], sizes: Sequence[int], dim: int, reduction: str | None
) -> torch.Tensor:
    if reduction is None:
        return torch.cat([o if o.ndim else o.unsqueeze(0) for o in outputs], dim)
    if reduction == "sum":
        return torch.stack([o.sum() for o in outputs]).sum()
    total = sum(sizes)
    return torch.stack([o.mean() * (size / total) for o, size in zip(outputs, sizes, strict=True)]).sum()
