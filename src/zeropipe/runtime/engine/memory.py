"""What one rank holds on its device: measured beside what the stage's formula allows, and moved away for a while.

The formula is the one of the table "memory and traffic" in ``docs/architecture.md`` (P parameters, N ranks),
with the layout's padding included, so that a ratio other than 1 is memory that nobody planned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from zeropipe.errors import UsageError
from zeropipe.runtime.engine.parts import Parts
from zeropipe.runtime.optimizers.state_kinds import split_state, state_keys
from zeropipe.runtime.zero.hold import offload_states as states
from zeropipe.runtime.zero.hold.offload_states import OffloadStateTypeEnum as Kind
from zeropipe.runtime.zero.hold.optimizer import ZeroOptimizer
from zeropipe.runtime.zero.hold.partition import Partition
from zeropipe.runtime.zero.hold.shown import AbsentGradient

ADAM_MOMENTS = 2  # state that an Adam-like optimizer keeps per element, before it has made any


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """``kind``: ``parameters``, ``gradients`` or ``optimizer state`` (masters that are copies, and moments)."""

    kind: str
    bytes: int  # live on this rank; the storage that views share counts once
    formula: int  # what the stage promises, padding included

    @property
    def ratio(self) -> float:
        """Live over promised bytes; 1.0 where both are 0."""
        if self.formula == 0:
            return 1.0 if self.bytes == 0 else float("inf")
        return self.bytes / self.formula

    def __str__(self) -> str:
        return f"{self.kind} {self.bytes:,} B (formula {self.formula:,} B, ratio {self.ratio:.4f})"


def memory_report(module: torch.nn.Module, optimizer: ZeroOptimizer | None) -> tuple[MemoryRow, ...]:
    """The three rows for an engine's module and optimizer; before the first step there are no moments yet."""
    params = list(module.parameters())
    counted: set[int] = set()
    if optimizer is None:
        whole = sum(param.numel() * param.element_size() for param in params)
        return (
            MemoryRow("parameters", _bytes(params, counted), whole),
            MemoryRow("gradients", 0, 0),
            MemoryRow("optimizer state", 0, 0),
        )
    partitions = optimizer.partitions
    trained = {id(param) for partition in partitions for param in partition.params}
    held = [partition.values.stored()[0] for partition in partitions]
    live_params = _bytes([*params, *(tensor for tensors in held for tensor in tensors)], counted)
    live_grads = _bytes(_gradient_tensors(optimizer, params), counted)
    live_state = _bytes(_state_tensors(optimizer), counted)
    others = sum(p.numel() * p.element_size() for p in params if id(p) not in trained)
    budgets = [_budget(optimizer, partition) for partition in partitions]
    form_params, form_grads, form_state = (
        sum(column) for column in zip((others, 0, 0), *budgets, strict=True)
    )
    return (
        MemoryRow("parameters", live_params, form_params),
        MemoryRow("gradients", live_grads, form_grads),
        MemoryRow("optimizer state", live_state, form_state),
    )


def moments(optimizer: ZeroOptimizer, partition: Partition) -> int:
    """How many values of optimizer state there are per element: those that are there, 2 for Adam before."""
    if not optimizer.optimizer.state:
        return ADAM_MOMENTS if "betas" in optimizer.defaults else 0
    return len(partition.state.keys())


def _budget(optimizer: ZeroOptimizer, partition: Partition) -> tuple[int, int, int]:
    """Bytes of the partition's parameters, gradients and optimizer state on this rank."""
    own, whole = partition.master.numel(), partition.values.whole_numel
    accumulated = (optimizer.policy.accumulate_dtype or partition.dtype).itemsize
    _, values, copied = partition.values.stored()
    grads = (own if optimizer.policy.shards_gradients else whole) * accumulated
    master = own * partition.master.element_size()
    return values, grads, master * (moments(optimizer, partition) + copied)


def _gradient_tensors(
    optimizer: ZeroOptimizer, params: Iterable[torch.nn.Parameter]
) -> Iterator[torch.Tensor]:
    for store in optimizer.reducer.stores:
        yield store.shard
        yield from store.held
    for param in params:
        if param.grad is not None and not isinstance(param.grad, AbsentGradient):
            yield param.grad


def _state_tensors(optimizer: ZeroOptimizer) -> Iterator[torch.Tensor]:
    for partition in optimizer.partitions:
        yield partition.master.detach()
    keys = state_keys(optimizer.optimizer)
    for state in optimizer.optimizer.state.values():
        yield from split_state(state, keys)[0].values()


def _bytes(tensors: Iterable[torch.Tensor], counted: set[int]) -> int:
    """Bytes of the storages behind ``tensors`` that are not in ``counted`` yet, and are added to it."""
    total = 0
    for tensor in tensors:
        if tensor.layout != torch.strided:
            total += tensor._values().numel() * tensor.element_size()
            continue
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            total += storage.nbytes()
    return total


class Offloaded:
    """Room on the device between the phases of a program: which kinds of an engine's tensors are away."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._away: frozenset[Kind] = frozenset()

    def send(
        self, include: Iterable[object] | None, device: object, pin_memory: bool, non_blocking: bool
    ) -> None:
        """See ``engine.offload_states``."""
        name = getattr(device, "value", str(device))
        if name != "cpu":
            raise UsageError("offload_states: device", expected="cpu", found=name, fix="leave it out")
        optimizer, here = self._parts.need_optimizer("offload_states"), self._parts.device
        # A reduction under way reads what is about to move.
        optimizer.reducer.settle()
        kinds = states.wanted(include) - self._away
        states.move_states(optimizer, kinds, states.to_host(optimizer, pin_memory, non_blocking))
        if here.type == "cuda":
            # The copies are done before the allocator gives the memory back to the driver.
            torch.cuda.current_stream(here).synchronize()
            torch.cuda.empty_cache()
        self._away |= kinds

    def bring_back(self, kinds: Iterable[Kind] = Kind, non_blocking: bool = False) -> None:
        """Those of ``kinds`` that are away return to the device."""
        due = self._away.intersection(kinds)
        if due and self._parts.optimizer is not None:
            move = states.to_device(self._parts.optimizer, self._parts.device, non_blocking)
            states.move_states(self._parts.optimizer, due, move)
        self._away -= due

    def bring_back_for_forward(self) -> None:
        """What the coming forward reads, and where gradients will follow, their buffers."""
        if not self._away:
            return
        # At stage 3 gathers read the masters.
        reads = {Kind.lp_params, Kind.hp_params}
        self.bring_back(set(Kind) - {Kind.optim_states} if torch.is_grad_enabled() else reads)
