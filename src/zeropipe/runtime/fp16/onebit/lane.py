"""The parameters that are exchanged together, seen as one flat run of fp32 state, sharded (ZeRO-1) or not.

    plain or stage 0     |------------------- buffer ------------------|     state covers the whole buffer
    stage 1              |--- shard 0 ---|=== shard 1 ===|-- shard 2 --|     state covers this rank's shard

What is exchanged always covers the whole buffer: a rank's local momentum is its own even where the average of
it is sharded. Of that average a sharded lane keeps only the messages it arrived in, one bit per element.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from zeropipe.comm import collectives
from zeropipe.comm.group import Group
from zeropipe.errors import UnsupportedOptimizerError, UsageError
from zeropipe.layout.flat import FlatShards, TensorSpec
from zeropipe.runtime.fp16.onebit.exchange import Exchange, Topology


class View(Protocol):
    """Which shard of which layout a 1-D master is, and who holds the others."""

    @property
    def layout(self) -> FlatShards: ...
    @property
    def shard(self) -> int: ...
    @property
    def group(self) -> Group: ...


class Lane:
    """State and wire of one param group (or of one master of it)."""

    def __init__(
        self, index: int, options: dict[str, Any], params: Sequence[nn.Parameter], view: View | None
    ) -> None:
        self.index = index  # of the param group
        self.options = options  # the param group itself, used in place
        self.params = list(params)
        self.bound = view is not None
        self.layout = view.layout if view is not None else _layout_of(index, params)
        self.shard = view.shard if view is not None else 0
        self.shard_group = view.group if view is not None else None
        self.start, _ = self.layout.shard_range(self.shard)  # of this rank's state in the buffer
        self.numel = self.layout.shard_numel  # of this rank's state, padding included
        self.device = params[0].device
        self.shown: Any = None  # the dict in the optimizer's ``state`` that shows this lane
        self.step = 0
        self.variance_steps = 0  # updates of the second moment
        self.own: dict[str, torch.Tensor] = {}  # name -> 1-D float32, numel
        self.per_tensor: dict[
            str, torch.Tensor
        ] = {}  # name -> float64 on the CPU, one per tensor of the layout
        self.scalars: dict[str, float] = {}
        self.worker_error: torch.Tensor | None = None  # 1-D float32, exchange.worker_numel
        self.server_error: torch.Tensor | None = None  # 1-D float32, exchange.server_numel
        self.messages: torch.Tensor | None = None  # uint8: the average momentum, where it is sharded
        self._exchange: Exchange | None = None
        self._mask_source: Any = None
        self.unused: torch.Tensor | None = (
            None  # 1-D bool, layout.numel: v is 0; None: nowhere. See ``hiding``
        )
        self._unused_known = False  # whether that was seen after v moved last
        self._told = True  # whether the exchange was told of what was seen; it begins by hiding nothing
        for name in ("exp_avg", "exp_avg_sq"):
            self.allocate(name)

    @property
    def sharded(self) -> bool:
        return self.layout.num_shards > 1

    def allocate(self, name: str) -> torch.Tensor:
        """A zeroed tensor that covers this rank's state."""
        self.own[name] = torch.zeros(self.numel, dtype=torch.float32, device=self.device)
        return self.own[name]

    def read(self) -> torch.Tensor:  # 1-D float32, numel
        """The parameter values that this rank's state covers: a master itself, or a copy of plain parameters."""
        if self.bound:
            return self.params[0].detach()
        return _join(self.params, (p.detach() for p in self.params), self.device)

    def write(self, values: torch.Tensor) -> None:
        """Put back what ``read`` gave, after it was changed."""
        if self.bound:
            if values.data_ptr() != self.params[0].data_ptr():
                self.params[0].detach().copy_(values)
            return
        for param, part in zip(self.params, self.split(values), strict=True):
            param.detach().copy_(part)

    def split(self, values: torch.Tensor) -> list[torch.Tensor]:
        """``values`` (1-D over the whole buffer) as one view per tensor of the layout, in its shape."""
        ranges = (self.layout.tensor_range(i) for i in range(len(self.layout.tensors)))
        return [
            values[start:stop].view(spec.shape)
            for (start, stop), spec in zip(ranges, self.layout.tensors, strict=True)
        ]

    def gradient(self) -> torch.Tensor:  # 1-D float32, numel
        """The gradients that are on the parameters, in the cover of the state; a missing one counts as zeros."""
        if self.bound:
            grad = self.params[0].grad
            zeros = torch.zeros_like(self.params[0], dtype=torch.float32)
            return zeros if grad is None else grad.detach().float()
        for number, param in enumerate(self.params):
            if param.grad is not None and param.grad.is_sparse:
                raise UnsupportedOptimizerError(
                    "compressed optimizers do not take sparse gradients",
                    found=f"one on parameter {number} of param group {self.index}, {tuple(param.shape)}",
                    fix="build the embedding with sparse=False",
                )
        return _join(self.params, (p.grad for p in self.params), self.device)

    def exchange(self, topology: Topology) -> Exchange:
        """This lane's exchange, made on first use."""
        if self._exchange is None:
            self._exchange = Exchange(self.layout.tensors, topology, self.device)
        return self._exchange

    def variance_moved(self) -> None:
        """To be called before each dense step: messages and what was seen of v are of the past then."""
        self.messages = None
        self._unused_known = False

    def drop_noise(self) -> None:
        """Momentum of what has no variance is 0 (see ``hiding``), also where a run that did not hold to it saved it.

        But a v of 0 may be a sum of squares that vanished in fp32, and its momentum right: (1 - b2) g g < 2**-149
        holds for no g above 2**-60 (b2 up to 1 - 2**-29), and no momentum is larger than the largest g.
        """
        for name in self.own.keys() & {"exp_avg", "momentum_accumulator"}:
            values = self.own[name]
            values.masked_fill_((self.own["exp_avg_sq"] == 0) & (values.abs() > 2.0**-60), 0)

    def hiding(self, topology: Topology) -> Exchange:
        """The exchange, told what a bit must not speak of: elements without variance, and those of the mask.

        A bit cannot say 0: what had no gradient in any dense step would get a momentum of plus or minus its tensor's
        scale, and nothing tells how far such an element may move (its v is 0). Hidden, its momentum is exactly 0,
        as dense Adam has it. So it is not moved now, nor thrown by a later dense step, whose denominator is
        sqrt(0) + eps, nor by another optimizer that loads the state; and its first gradient in a dense step gives
        m = (1 - b1) g, v = (1 - b2) g g, of which |m| / sqrt(v) = (1 - b1) / sqrt(1 - b2), what dense Adam moves
        it by too.
        """
        exchange, source = self.exchange(topology), self.options.get("exp_avg_mask")
        if not self._unused_known:
            assert not self.sharded, "a shard's are seen when its momentum is gathered"
            self._see_unused(self.own["exp_avg_sq"][: self.layout.numel] == 0)
        if not self._told or source is not self._mask_source:
            hidden = self.unused
            if source is not None:
                masked = self._flat_mask(source) == 0
                hidden = masked if hidden is None else masked.logical_or_(hidden)
            exchange.hide(hidden)
            self._mask_source, self._told = source, True
        return exchange

    def _see_unused(self, unused: torch.Tensor) -> None:
        self.unused = unused if bool(unused.any()) else None
        self._unused_known, self._told = True, False

    def errors(self, topology: Topology) -> tuple[torch.Tensor, torch.Tensor]:
        """The worker's and the server's error, zero at first."""
        if self.worker_error is None or self.server_error is None:
            self.worker_error, self.server_error = self.exchange(topology).errors()
        return self.worker_error, self.server_error

    def average_momentum(self, gradient: torch.Tensor, beta: float, topology: Topology) -> None:
        """``exp_avg`` becomes the compressed average over ranks of ``beta * exp_avg + (1 - beta) * gradient``.

        ``gradient``: 1-D float32, this rank's own, over the whole buffer (``layout.numel``).
        """
        own = self.own["exp_avg"]
        full = self._whole_momentum(topology) if self.sharded else own[: self.layout.numel]
        full.mul_(beta).add_(gradient * (1 - beta))  # as formulas.follow
        exchange = self.hiding(topology)
        messages = exchange.average(full, *self.errors(topology), label="momentum")
        if messages is not None:
            exchange.decode(messages, own, self.start)
            self.messages = messages if self.sharded else None
        elif self.sharded:
            self.messages = None
            stop = min(self.start + self.numel, full.numel())
            own[: max(0, stop - self.start)] = full[self.start : stop]

    def extents(self) -> list[tuple[int, int, int]]:
        """(tensor, start, stop) for each tensor with elements in this rank's state, counted in the state."""
        if self.sharded:
            return [(p.tensor, p.offset, p.offset + p.numel) for p in self.layout.pieces(self.shard)]
        ranges = (self.layout.tensor_range(i) for i in range(len(self.layout.tensors)))
        return [(i, start, stop) for i, (start, stop) in enumerate(ranges) if stop > start]

    def measure(
        self, norms: Sequence[torch.Tensor], maxima: Sequence[torch.Tensor], ranks: int
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Per tensor of the layout: the norm of each of ``norms`` and the largest value of each of ``maxima``.

        Both: 1-D over this rank's state, ``maxima`` not negative. The results are float64 on the CPU, 0 for an
        empty tensor. Summed by shard, in order, also where nothing is sharded (as if it were, over ``ranks``), so
        that all stages give the same bits. Collective where the state is sharded.
        """
        if self.sharded:
            pieces = [(0, p.tensor, p.offset, p.numel) for p in self.layout.pieces(self.shard)]
        else:
            cut = self.layout.reshard(ranks)
            starts = [cut.shard_range(shard)[0] for shard in range(ranks)]
            pieces = [
                (shard, p.tensor, starts[shard] + p.offset, p.numel)
                for shard in range(ranks)
                for p in cut.pieces(shard)
            ]
        rows = torch.zeros((1 if self.sharded else ranks, len(norms) + len(maxima), len(self.layout.tensors)))
        rows = rows.to(torch.float64)
        found = [
            torch.linalg.vector_norm(source[at : at + numel], dtype=torch.float64).square()
            if kind < len(norms)
            else source[at : at + numel].max().double()
            for _, _, at, numel in pieces
            for kind, source in enumerate((*norms, *maxima))
        ]
        if found:
            values = torch.stack(found).cpu().view(len(pieces), -1)
            for (row, tensor, _, _), column in zip(pieces, values, strict=True):
                rows[row, :, tensor] = column
        if self.sharded and self.shard_group is not None:
            gathered = torch.empty(
                (self.shard_group.size, rows.numel()), dtype=torch.float64, device=self.device
            )
            collectives.all_gather(
                gathered.view(-1), rows.view(-1).to(self.device), self.shard_group, label="norms per tensor"
            )
            rows = gathered.cpu().view(-1, *rows.shape[1:])
        total = rows[0]
        for row in rows[1:]:
            total[: len(norms)] += row[: len(norms)]
            torch.maximum(total[len(norms) :], row[len(norms) :], out=total[len(norms) :])
        return list(total[: len(norms)].sqrt()), list(total[len(norms) :])

    def _whole_momentum(self, topology: Topology) -> torch.Tensor:  # 1-D float32, layout.numel
        """The average momentum of the whole buffer: unpacked, or gathered where the last step was dense."""
        if self.messages is not None:
            full = torch.empty(self.layout.numel, dtype=torch.float32, device=self.device)
            self.exchange(topology).decode(self.messages, full)
            return full
        assert self.shard_group is not None
        # NaN stands for "no variance", which all ranks must know of all shards; a real one travels as infinity,
        # which spoils the run as visibly.
        own = self.own["exp_avg"].nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        own.masked_fill_(self.own["exp_avg_sq"] == 0, math.nan)
        padded = torch.empty(self.layout.padded_numel, dtype=torch.float32, device=self.device)
        collectives.all_gather(padded, own, self.shard_group, label="momentum to all")
        full = padded[: self.layout.numel]
        unused = full.isnan()
        self._see_unused(unused)
        return full.masked_fill_(unused, 0)

    def _flat_mask(self, source: Any) -> torch.Tensor:
        """One mask for all tensors of the group, or a sequence with one (or None) for each, as one flat run."""
        specs = self.layout.tensors
        masks = list(source) if isinstance(source, list | tuple) else [source] * len(specs)
        if len(masks) != len(specs):
            raise UsageError(
                f"exp_avg_mask of param group {self.index} has another length than the group",
                expected=f"{len(specs)} masks, one per parameter (None for those without)",
                found=len(masks),
            )
        flat = torch.ones(self.layout.numel, dtype=torch.float32, device=self.device)
        for mask, spec, part in zip(masks, specs, self.split(flat), strict=True):
            if mask is None:
                continue
            if tuple(mask.shape) != spec.shape:
                raise UsageError(
                    f"exp_avg_mask of param group {self.index} has another shape than parameter {spec.name!r}",
                    expected=spec.shape,
                    found=tuple(mask.shape),
                    fix="give the parameter a param group of its own, or a list with one mask per parameter",
                )
            part.copy_(mask)
        return flat


def _layout_of(index: int, params: Sequence[nn.Parameter]) -> FlatShards:
    specs = (
        TensorSpec(f"param_groups[{index}].{number}", tuple(p.shape), str(p.dtype).removeprefix("torch."))
        for number, p in enumerate(params)
    )
    return FlatShards(tuple(specs), 1)


def _join(
    params: Sequence[torch.Tensor], tensors: Iterable[torch.Tensor | None], device: torch.device
) -> torch.Tensor:
    """The tensors end to end in float32; zeros stand for those that are None."""
    parts = [
        torch.zeros(param.numel(), dtype=torch.float32, device=device)
        if tensor is None
        else tensor.detach().reshape(-1).float()
        for param, tensor in zip(params, tensors, strict=True)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, device=device)
