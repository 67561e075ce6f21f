"""The parameters that are exchanged together, seen as one flat run of fp32 state, sharded (ZeRO-1) or not.

    plain or stage 0     |------------------- buffer ------------------|     state covers the whole buffer
    stage 1              |--- shard 0 ---|=== shard 1 ===|-- shard 2 --|     state covers this rank's shard

What is exchanged always covers the whole buffer: a rank's local momentum is its own even where the average of
it is sharded. Of that average a sharded lane keeps only the messages it arrived in, one bit per element.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zeropipe.comm import collectives
from zeropipe.errors import CheckpointError, UnsupportedOptimizerError, UsageError
from zeropipe.layout.flat import flat_shards
from zeropipe.layout.numbers import number_of
from zeropipe.runtime.fp16.onebit.exchange import ERRORS, Exchange, Topology
from zeropipe.runtime.fp16.onebit.plan import Phases
from zeropipe.runtime.optimizers.shard_view import ShardView

Entry = Mapping[str, Any]  # one parameter's (or master's) part of ``optimizer.state``
PHASE = "phase_"  # prefix of keys in it


@dataclass(frozen=True, slots=True)
class Kept:
    """What an optimizer keeps of each lane beside counts and error feedback: names, saved as their kind says."""

    always: tuple[str, ...] = ("exp_avg", "exp_avg_sq")  # covers the state; zero at first
    later: tuple[str, ...] = ()  # likewise, from some phase on: all of them or none
    by_rank: tuple[str, ...] = ()  # of these, what differs by rank while ``later`` is there: saved for each
    sums: tuple[str, ...] = ()  # numbers that come and go with ``later``; they differ by rank too


class Lane:
    """State and wire of one param group (or of one master of it)."""

    def __init__(
        self,
        index: int,
        options: dict[str, Any],
        params: Sequence[nn.Parameter],
        view: ShardView | None,
        topology: Topology,
        kept: Kept,
        eps_inside: bool,
    ) -> None:
        # Whose state this is. ``options`` is the param group itself, number ``index``: schedules write into it.
        self.index, self.options, self.params = index, options, list(params)
        self.bound = view is not None
        self.eps_inside = eps_inside  # the root of the variance
        self.device = params[0].device

        # Which part of the buffer it covers: ``numel`` elements from ``start`` on, padding included.
        named = (
            (f"param_groups[{index}].{number}", tuple(p.shape), str(p.dtype).removeprefix("torch."))
            for number, p in enumerate(params)
        )
        self.layout = view.layout if view is not None else flat_shards(named, 1)
        self.sharded = self.layout.num_shards > 1
        self.shard = view.shard if view is not None else 0
        self.shard_group = view.group if view is not None else None
        self.start, _ = self.layout.shard_range(self.shard)
        self.numel = self.layout.shard_numel

        # What is kept from step to step, and saved: see ``Kept``. Only ``per_tensor`` an optimizer names as it goes.
        self.kept = kept
        self.step, self.variance_steps = 0, 0  # variance_steps: updates of the second moment
        self.own: dict[str, torch.Tensor] = {}  # name -> 1-D float32, numel
        self.per_tensor: dict[str, torch.Tensor] = {}  # name -> float64, CPU, one per tensor of the layout
        self.scalars: dict[str, float] = {}
        self.shown: dict[str, Any] | None = None  # the dict in the optimizer's ``state`` that shows this lane
        self.exchange = Exchange(self.layout.tensors, topology, self.device)
        for name in kept.always:
            self._allocate(name)

        # What is never saved, because the rest tells it: the average momentum where it is sharded, as it arrived
        # (uint8), and where v is 0 (1-D bool, layout.numel; None: nowhere), if that was looked at after v moved last.
        self._messages: torch.Tensor | None = None
        self.unused: torch.Tensor | None = None
        self._unused_known = False
        self._mask: Any = None  # the param group's, when the exchange was told what to hide

    def _allocate(self, name: str) -> torch.Tensor:
        self.own[name] = torch.zeros(self.numel, dtype=torch.float32, device=self.device)
        return self.own[name]

    @property
    def late(self) -> bool:
        """Whether what is kept ``later`` is there."""
        return bool(self.kept.later) and self.kept.later[0] in self.own

    def begin(self) -> None:
        """From now on there is what is kept ``later``: zeros."""
        for name in self.kept.later:
            self._allocate(name)
        self.scalars.update(dict.fromkeys(self.kept.sums, 0.0))

    def end(self) -> None:
        for name in self.kept.later:
            del self.own[name]

    # -- parameters and gradients -----------------------------------------------------------------------------

    def read(self) -> torch.Tensor:  # 1-D float32, numel
        """The parameter values that this rank's state covers: a master itself, or a copy of plain parameters."""
        return self.params[0].detach() if self.bound else self._join(self.params)

    def write(self, values: torch.Tensor) -> None:
        """Put back what ``read`` gave, after it was changed."""
        for param, part in zip(self.params, self._by_param(values), strict=True):
            if part.data_ptr() != param.data_ptr():
                param.detach().copy_(part)

    def _by_param(self, values: torch.Tensor) -> Sequence[torch.Tensor]:
        """``values`` (1-D, numel) as one view per parameter, in its shape."""
        return [values] if self.bound else self.split(values)

    def split(self, values: torch.Tensor) -> list[torch.Tensor]:
        """``values`` (1-D over the whole buffer) as one view per tensor of the layout, in its shape."""
        sizes = [spec.numel for spec in self.layout.tensors]
        parts = values[: self.layout.numel].split(sizes)
        return [part.view(spec.shape) for part, spec in zip(parts, self.layout.tensors, strict=True)]

    def gradient(self) -> torch.Tensor:  # 1-D float32, numel
        """The gradients that are on the parameters, in the cover of the state; a missing one counts as zeros."""
        for number, param in enumerate(self.params):
            if param.grad is not None and param.grad.is_sparse:
                raise UnsupportedOptimizerError(
                    "compressed optimizers do not take sparse gradients",
                    found=f"one on parameter {number} of param group {self.index}, {tuple(param.shape)}",
                    fix="build the embedding with sparse=False",
                )
        return self._join(p.grad for p in self.params)

    def own_gradient(self, given: torch.Tensor | None) -> torch.Tensor:  # 1-D float32, layout.numel
        """This rank's gradient of the whole buffer: ``given`` by an engine, or what is on the parameters.

        Raises UsageError for a shard whose engine did not give one.
        """
        if given is None and not self.sharded:
            given = self.gradient()
        if given is None or given.numel() < self.layout.numel:
            group = self.exchange.topology.group
            raise UsageError(
                f"a compressed step needs this rank's own gradient of param group {self.index}, not averaged",
                rank=group.ranks[group.rank],
                expected=f"{self.layout.numel} elements from set_local_gradient",
                found="none" if given is None else given.numel(),
            )
        return given.detach().view(-1)[: self.layout.numel].float()

    def _join(self, tensors: Iterable[torch.Tensor | None]) -> torch.Tensor:
        """One tensor for each parameter, end to end in float32; zeros stand for those that are None."""
        parts = [
            param.new_zeros(param.numel(), dtype=torch.float32)
            if tensor is None
            else tensor.detach().reshape(-1).float()
            for param, tensor in zip(self.params, tensors, strict=True)
        ]
        return parts[0] if self.bound else torch.cat(parts)

    # -- the exchange -----------------------------------------------------------------------------------------

    def count(self, dense: bool) -> None:
        """A step begins. Before a dense one messages, and what was seen of v, are of the past."""
        self.step += 1
        if dense:
            self.variance_steps += 1
            self._messages, self._unused_known = None, False

    def drop_noise(self) -> None:
        """Momentum of what has no variance is 0 (see ``hiding``), also where a run that did not hold to it saved it."""
        # But a v of 0 may be a sum of squares that vanished in fp32, and its momentum right: (1 - b2) g g < 2**-149
        # holds for no g above 2**-60 (b2 up to 1 - 2**-29), and no momentum is larger than the largest g.
        for name in self.own.keys() & {"exp_avg", "momentum_accumulator"}:
            values = self.own[name]
            values.masked_fill_((self.own["exp_avg_sq"] == 0) & (values.abs() > 2.0**-60), 0)

    def hiding(self) -> Exchange:
        """The exchange, told what a bit must not speak of: elements without variance, and those of the mask."""
        # A bit cannot say 0: what had no gradient in any dense step would get a momentum of plus or minus its tensor's
        # scale, and nothing tells how far such an element may move (its v is 0). Hidden, its momentum is exactly 0, as
        # dense Adam has it. So it is not moved now, nor thrown by a later dense step, whose denominator is
        # sqrt(0) + eps, nor by another optimizer that loads the state; and its first gradient in a dense step gives
        # m = (1 - b1) g, v = (1 - b2) g g, of which |m| / sqrt(v) = (1 - b1) / sqrt(1 - b2), what dense Adam moves it
        # by too.
        if not self._unused_known:
            assert not self.sharded, "a shard's are seen when its momentum is gathered"
            self._hide(self.own["exp_avg_sq"][: self.layout.numel] == 0)
        elif self.options.get("exp_avg_mask") is not self._mask:
            self._hide(self.unused)
        return self.exchange

    def _hide(self, unused: torch.Tensor | None) -> None:
        """``unused``: elements without variance, 1-D bool over the whole buffer."""
        self.unused = hidden = unused if unused is not None and bool(unused.any()) else None
        mask = self.options.get("exp_avg_mask")
        if mask is not None:
            masked = self._flat_mask(mask) == 0
            hidden = masked if hidden is None else masked.logical_or_(hidden)
        self.exchange.hide(hidden)
        # Last, so that a mask that was refused is refused again.
        self._unused_known, self._mask = True, mask

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
            if mask is not None and tuple(mask.shape) != spec.shape:
                raise UsageError(
                    f"exp_avg_mask of param group {self.index} has another shape than parameter {spec.name!r}",
                    expected=spec.shape,
                    found=tuple(mask.shape),
                    fix="give the parameter a param group of its own, or a list with one mask per parameter",
                )
            if mask is not None:
                part.copy_(mask)
        return flat

    def average_momentum(self, gradient: torch.Tensor, beta: float) -> None:
        """``exp_avg`` becomes the compressed average over ranks of ``beta * exp_avg + (1 - beta) * gradient``.

        ``gradient``: 1-D float32, this rank's own, over the whole buffer (``layout.numel``).
        """
        own = self.own["exp_avg"]
        full = self._whole_momentum() if self.sharded else own[: self.layout.numel]
        exchange = self.hiding()
        full.mul_(beta).add_(gradient * (1 - beta))  # as adam.follow
        messages = exchange.average(full, label="momentum")
        self._messages = messages if self.sharded else None
        if messages is not None:
            exchange.decode(messages, own, self.start)
        elif self.sharded:
            stop = min(self.start + self.numel, full.numel())
            own[: max(0, stop - self.start)] = full[self.start : stop]

    def _whole_momentum(self) -> torch.Tensor:  # 1-D float32, layout.numel
        """The average momentum of the whole buffer: unpacked, or gathered where the last step was dense."""
        if self._messages is not None:
            full = torch.empty(self.layout.numel, dtype=torch.float32, device=self.device)
            self.exchange.decode(self._messages, full)
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
        self._hide(unused)
        return full.masked_fill_(unused, 0)

    # -- what is shown and saved ------------------------------------------------------------------------------

    def publish(self, state: MutableMapping[torch.Tensor, dict[str, Any]], phases: Phases) -> None:
        """Write the lane's state under its parameters: tensors as views, in the parameter's shape.

        Under a master only what all ranks share appears, because an engine saves it as such: moments, and numbers.
        The error feedback is in the rank state.
        """
        common = {"step": self.step, "variance_steps": self.variance_steps, **phases.shown(), **self.scalars}
        views = {name: self._by_param(values) for name, values in self.own.items()}
        if self.bound:
            common |= {f"{PHASE}{key}": value for key, value in phases.to_json().items()}
            # A key for each tensor, so that a checkpoint can be cut and joined in any way without a look inside.
            for name, values in self.per_tensor.items():
                known = zip(self._keys(name), values.tolist(), strict=True)
                common |= {key: value for key, value in known if not math.isnan(value)}
            # A checkpoint of a larger buffer may have left keys of other tensors.
            self.shown = state[self.params[0]]
            self.shown.clear()
        else:
            views |= {name: value.unbind() for name, value in self.per_tensor.items()}
        for name, error in self.exchange.debts.items() if not self.bound else ():
            # The part that belongs to each parameter: 1-D, empty where another rank has it.
            start, stop = self.exchange.ranges[name]
            tensors = (self.layout.tensor_range(i) for i in range(len(self.params)))
            inside = ((min(max(a, start), stop), min(max(b, start), stop)) for a, b in tensors)
            views[name] = [error[a - start : b - start] for a, b in inside]
        for number, param in enumerate(self.params):
            state[param].update(common | {name: parts[number] for name, parts in views.items()})

    def restore(self, entries: Sequence[Entry], variance_steps: int) -> None:
        """Take over counts and what covers the state from ``entries``, one per parameter of the lane.

        ``variance_steps``: where they do not tell. Raises CheckpointError when a tensor does not fit.
        """
        self.step = int(entries[0].get("step", 0))
        self.variance_steps = int(entries[0].get("variance_steps", variance_steps))
        if self.kept.later and all(name in entries[0] for name in self.kept.later):
            self.begin()
        for name, values in self.own.items():
            # What the saving rank did by itself since the last exchange is not this rank's, so all begin there.
            if name in self.kept.later and name in self.kept.by_rank:
                continue
            for part, entry, param in zip(self._by_param(values), entries, self.params, strict=True):
                if name not in entry:
                    continue
                saved = entry[name]
                if saved.numel() != part.numel():
                    raise CheckpointError(
                        f"the saved {name} does not fit a parameter {tuple(param.shape)} of param group {self.index}",
                        expected=f"{part.numel()} elements",
                        found=saved.numel(),
                        fix="load the state into the model that it was saved from",
                    )
                part.copy_(saved.reshape(part.shape))
        self.drop_noise()  # left by earlier versions, or by DeepSpeed

    def rank_state(self) -> dict[str, Any]:
        """What only this rank knows: live tensors, and the layout by which others find their part of them."""
        further: dict[str, torch.Tensor] = {}
        if self.late:
            further = {name: torch.tensor(self.scalars[name], dtype=torch.float64) for name in self.kept.sums}
            further |= {name: self.own[name] for name in self.kept.by_rank}
        errors = {name: self.exchange.debts.get(name) for name in ERRORS}
        return {"layout": self.exchange.layout.to_json(), **errors, "further": further}

    def take(self, values: Mapping[str, torch.Tensor]) -> bool:
        """Take over what ``rank_state`` gave, shared out anew. Whether parameters have to follow."""
        if all(name in values for name in ERRORS):
            for name, error in self.exchange.errors().items():
                error.copy_(values[name])
        names = [name for name in self.kept.by_rank if name in values] if self.late else []
        for name in names:
            self.own[name][: values[name].numel()].copy_(values[name])
        if names:
            self.scalars.update({name: float(values[name]) for name in self.kept.sums})
            self.drop_noise()
        return bool(names)

    def numbers(self, name: str, entries: Sequence[Entry]) -> torch.Tensor:
        """A saved value with one number for each tensor: float64 on the CPU, NaN where none was saved."""
        places = (
            [(entries[0], key) for key in self._keys(name)] if self.bound else [(e, name) for e in entries]
        )
        return torch.tensor([float(entry.get(key, math.nan)) for entry, key in places], dtype=torch.float64)

    def _keys(self, name: str) -> list[str]:
        return [number_of(name, spec.name) for spec in self.layout.tensors]
