"""A linear layer in tiles, each a module of its own, so that stage 3 gathers one tile at a time.

    out     in_splits = 2
    splits | tile 0,0 | tile 0,1 |    y0 = tile00(x0) + tile01(x1)    bias: in the last tile of each row
           | tile 1,0 | tile 1,1 |    y1 = tile10(x0) + tile11(x1)    output: y0, y1 side by side

A tile is a unit like any other: gathered before its product, freed after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from itertools import pairwise
from operator import add
from typing import Any

import torch
from torch import nn

from zeropipe.errors import UsageError
from zeropipe.layout.balance import cut_evenly
from zeropipe.runtime.zero.gather.shards import shards_of
from zeropipe.runtime.zero.param import zero_param


class TiledLinear(nn.Module):
    """As ``linear_cls(in_features, out_features, bias)``, in ``out_splits`` x ``in_splits`` tiles (uneven ones too).

    Under stage 3 about 1 / (in_splits * out_splits) of the weight is gathered at a time.

    Args:
        in_features, out_features, bias: of the whole layer.
        in_splits: tiles along the input features; their results are added in order.
        out_splits: tiles along the output features.
        input_is_already_split: ``forward`` gets the list of the input's parts.
        combine_out_splits: False: ``forward`` returns the list of the output's parts.
        linear_cls: makes each tile, called as ``linear_cls(in, out, bias=..., **kwargs)``.
        init_linear: a layer to copy the values from (see ``copy_params_from``).

    With one tile the numbers are those of ``linear_cls`` bit for bit. Raises UsageError for splits that leave a
    tile empty.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        in_splits: int = 1,
        out_splits: int = 1,
        input_is_already_split: bool = False,
        combine_out_splits: bool = True,
        linear_cls: Callable[..., nn.Module] = nn.Linear,
        init_linear: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        for name, splits, features in (
            ("in_splits", in_splits, in_features),
            ("out_splits", out_splits, out_features),
        ):
            if not 1 <= splits <= features:
                raise UsageError(
                    f"TiledLinear: {name}",
                    expected=f"1 to {features}, the features that it divides",
                    found=splits,
                    fix="use fewer tiles",
                )
        # The layer that it stands for.
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias

        # How it is cut, and who cuts its input and joins its output.
        self.in_splits, self.out_splits = in_splits, out_splits
        self.input_is_already_split = input_is_already_split
        self.combine_out_splits = combine_out_splits
        self.in_parts = cut_evenly(in_features, in_splits)  # bounds, one more than parts
        self.out_parts = cut_evenly(out_features, out_splits)
        self.linears = nn.ModuleList(
            nn.ModuleList(
                # The bias once a row: the results of its tiles are added.
                linear_cls(inputs, outputs, bias=bias and place == in_splits - 1, **kwargs)
                for place, inputs in enumerate(_sizes(self.in_parts))
            )
            for outputs in _sizes(self.out_parts)
        )
        if init_linear is not None:
            self.copy_params_from(init_linear)

    def forward(self, input_: torch.Tensor | Sequence[torch.Tensor]) -> Any:  # [..., in] -> [..., out]
        return self._combine([reduce(add, results) for results in self._rows(input_)])

    @torch.no_grad()
    def copy_params_from(self, other: nn.Module) -> None:
        """Take the values of ``other``, a layer with ``weight`` [out, in] and ``bias`` [out] or None.

        Either may be shards (then this is collective). Raises UsageError for other shapes.
        """
        weight, bias = other.weight, other.bias
        assert isinstance(weight, torch.Tensor)
        expected = (self.out_features, self.in_features)
        if tuple(_shape(weight)) != expected or (bias is not None) != self.use_bias:
            raise UsageError(
                "TiledLinear.copy_params_from",
                expected=f"a weight of shape {expected} and {'a' if self.use_bias else 'no'} bias",
                found=f"shape {tuple(_shape(weight))} and {'no' if bias is None else 'a'} bias",
                fix="copy from a layer of the same features and the same bias argument",
            )
        # What is gathered here is this method's own copy, freed with it; ``other`` stays as it was.
        for row, rows in zip(self.linears, _value(weight).split(_sizes(self.out_parts)), strict=True):
            for tile, part in zip(row, rows.split(_sizes(self.in_parts), 1), strict=True):  # type: ignore[call-overload]
                _write(tile.weight, part)
        if isinstance(bias, torch.Tensor):
            for row, part in zip(self.linears, _value(bias).split(_sizes(self.out_parts)), strict=True):
                _write(row[-1].bias, part)  # type: ignore[index]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.use_bias}, "
            f"in_splits={self.in_splits}, out_splits={self.out_splits}"
        )

    def _rows(self, input_: torch.Tensor | Sequence[torch.Tensor]) -> Iterator[Iterator[Any]]:
        """For each row of tiles, what its tiles return, one after the other."""
        parts = self._split(input_)
        for row in self.linears:
            # Lazily: the caller adds a result to the sum before the next tile is gathered.
            # A part is made the tile's own tensor: its gradient is known as soon as that tile's backward is done, which
            # tells stage 3 to free the tile, while that of ``part`` itself waits for all tiles.
            yield (
                self._run(tile, part.view_as(part) if torch.is_grad_enabled() else part)
                for tile, part in zip(row, parts, strict=True)  # type: ignore[call-overload]
            )

    def _run(self, tile: nn.Module, part: torch.Tensor) -> Any:
        return tile(part)

    def _split(self, input_: torch.Tensor | Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        sizes = _sizes(self.in_parts)
        if not self.input_is_already_split:
            assert isinstance(input_, torch.Tensor)
            if input_.shape[-1] != self.in_features:
                found = input_.shape[-1]
                raise UsageError("TiledLinear: last dim of the input", expected=self.in_features, found=found)
            return input_.split(sizes, -1) if len(sizes) > 1 else [input_]
        given = [part.shape[-1] for part in input_]
        if given != sizes:
            raise UsageError("TiledLinear: last dims of the input's parts", expected=sizes, found=given)
        return list(input_)

    def _combine(self, outputs: Sequence[Any]) -> Any:
        if not self.combine_out_splits:
            return list(outputs)
        return torch.cat(list(outputs), -1) if len(outputs) > 1 else outputs[0]


class TiledLinearReturnBias(TiledLinear):
    """For a ``linear_cls`` that returns ``(output, bias)`` and leaves adding the bias to its caller; so does this.

    ``forward`` returns (output, bias), or (list of outputs, list of biases) without ``combine_out_splits``. The
    bias is None where the tiles return none.
    """

    def forward(self, input_: torch.Tensor | Sequence[torch.Tensor]) -> Any:
        outputs, biases = zip(*(reduce(_add_pairs, pairs) for pairs in self._rows(input_)), strict=True)
        return self._combine(outputs), None if all(b is None for b in biases) else self._combine(biases)

    def _run(self, tile: nn.Module, part: torch.Tensor) -> Any:
        given = tile(part)
        if not isinstance(given, tuple) or len(given) != 2:
            raise UsageError(
                "TiledLinearReturnBias: linear_cls must make modules that return (output, bias); "
                f"{type(tile).__name__} returned a {type(given).__name__}",
                fix="use TiledLinear, or name such a class",
            )
        return given


def _sizes(bounds: Sequence[int]) -> list[int]:
    return [end - start for start, end in pairwise(bounds)]


def _add_pairs(one: tuple[Any, Any], other: tuple[Any, Any]) -> tuple[Any, Any]:
    biases = [bias for bias in (one[1], other[1]) if bias is not None]
    return one[0] + other[0], reduce(add, biases) if biases else None


def _value(param: torch.Tensor) -> torch.Tensor:
    """The whole value of a parameter of any stage; collective for shards that are not gathered."""
    shards = shards_of(param)
    return param if shards is None else shards.whole()


def _shape(param: torch.Tensor) -> torch.Size:
    shards = shards_of(param)
    return param.shape if shards is None else shards.shape


def _write(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Set a parameter of any stage to ``value`` (its shape, the same on every rank)."""
    known, shards = zero_param(param), shards_of(param)
    # The master counts where there is one: a value alone would be overwritten from it by the next step.
    if known is not None and known.trained is not None:
        known.trained.write_value(value)
    elif shards is not None:
        shards.write(value)
    else:
        param.data.copy_(value)
