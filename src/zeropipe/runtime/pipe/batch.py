"""One batch of a pipeline: micro-batches in at its two ends, losses out, and what all ranks then tell each other.

first stage   the inputs of each micro-batch, from this rank's iterator
last stage    the labels, from an iterator that gives the same batches; the loss and its other terms
all ranks     one small sum: who has failed, and the losses of every replica
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from zeropipe.comm.collectives import all_gather_object, all_reduce
from zeropipe.comm.group import world
from zeropipe.errors import CommunicationError, UsageError
from zeropipe.given import Tree
from zeropipe.layout.slots import Fold, Sharing
from zeropipe.layout.slots import Tree as SlotTree
from zeropipe.runtime.dataloader import RepeatingLoader
from zeropipe.runtime.pipe.topology import PipelineParallelGrid
from zeropipe.runtime.pipe.wire import map_tensors
from zeropipe.tensor.host import HOST, sent

LossFn = Callable[..., Any]


class Data:
    """Where a pipeline's micro-batches come from, as users set it, and what makes ``(inputs, labels)`` of each."""

    def __init__(self, loader: Callable[[], Any]) -> None:
        self._loader = loader  # the engine's training data, asked when it is needed
        self._iterator: Iterator[Any] | None = None
        self.batch_fn: Callable[[Any], Any] | None = None

    def take(self, iterator: Iterator[Any] | None) -> None:
        """``iterator`` from now on; None: the loader, from its begin."""
        self._iterator = iterator

    def convert(self, batch_fn: Callable[[Any], Any] | None) -> None:
        self.batch_fn = batch_fn

    def show_next(self, look: Callable[[Any], None]) -> None:
        """Let ``look`` see the inputs of the next micro-batch, before anything is made of them."""
        convert = self.batch_fn

        def first(given: Any) -> Any:
            self.batch_fn = convert
            parts = given if convert is None else convert(given)
            look(parts[0])
            return parts

        self.batch_fn = first

    def iterator(self, given: Iterator[Any] | None, needed: bool = True) -> Iterator[Any] | None:
        """The one of a batch: what its caller gave, else what was set, else the loader again and again.

        None where it is not ``needed``: a rank between the two ends needs no data, and its program may have none.
        """
        if not needed:
            return None
        if given is None and self._iterator is None:
            loader = self._loader()
            if loader is None:
                raise UsageError(
                    "train_batch has no data",
                    fix="pass train_batch(data_iter), call engine.set_dataiterator, or give training_data "
                    "to initialize",
                )
            self._iterator = RepeatingLoader(loader)
        found = self._iterator if given is None else given
        assert found is not None, "one of the three"
        return found


@dataclass(slots=True)
class Batch:
    """``count`` micro-batches of one run on this rank, and what the loss function returns for each.

    The loss function returns a scalar; or a dict with the scalar under ``loss`` and other terms beside it; or a tuple
    whose first element is the loss.
    """

    count: int
    source: Callable[[], Iterator[Any] | None]  # of the micro-batches; None on a rank between the ends
    device: torch.device
    loss_fn: LossFn | None = None
    batch_fn: Callable[[Any], Any] | None = None  # makes (inputs, labels) of what the source yields
    factor: float = 1.0  # loss scale over micro-batches
    with_loss: bool = True
    keep_outputs: bool = False
    by_slot: bool = False  # a step, of which replicas' losses are averaged as its gradients are
    _parts: list[tuple[Any, Any]] = field(default_factory=list, init=False)  # inputs, labels

    # What the last stage has found, in the order in which it ran the micro-batches.
    outputs: list[Any] = field(default_factory=list, init=False)  # detached
    values: list[torch.Tensor] = field(default_factory=list, init=False)  # [] each, detached
    terms: dict[str, list[torch.Tensor]] = field(default_factory=dict, init=False)

    def load(self) -> None:
        """Draw all micro-batches before the first instruction, so that a step has its data or does not begin."""
        iterator = self.source()
        if iterator is None:
            return
        for number in range(self.count):
            try:
                given = next(iterator)
            except StopIteration:
                # Raised as an error of its own: a StopIteration would end a caller's generator in silence.
                raise UsageError(
                    "the data iterator ended inside a step",
                    expected=f"{self.count} micro-batches",
                    found=number,
                    fix="repeat the loader, drop the last incomplete batch, or lower gradient_accumulation_steps",
                ) from None
            parts = given if self.batch_fn is None else self.batch_fn(given)
            if not (isinstance(parts, (tuple, list)) and len(parts) == 2):
                length = f" of {len(parts)}" if hasattr(parts, "__len__") else ""
                raise UsageError(
                    "a pipeline's batch has two parts",
                    expected="(inputs, labels)",
                    found=f"a {type(parts).__name__}{length}",
                    fix="convert it with engine.set_batch_fn(fn); use None where there are no labels",
                )
            self._parts.append((parts[0], parts[1]))

    def inputs(self, micro_batch: int) -> Any:
        return self._on_device(self._parts[micro_batch][0])

    def loss(self, micro_batch: int, output: Tree) -> torch.Tensor | None:
        """What the model's output costs, scaled for backward; None where nothing is to be trained."""
        if self.keep_outputs:
            self.outputs.append(map_tensors(output, torch.Tensor.detach, "the model's output"))
        if not self.with_loss:
            return None
        labels = self._on_device(self._parts[micro_batch][1])
        loss, terms = _split(output if self.loss_fn is None else self.loss_fn(output, labels))
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            found = type(loss).__name__
            if isinstance(loss, torch.Tensor):
                found = f"a {loss.dtype} tensor of shape {tuple(loss.shape)}"
            raise UsageError(
                "the loss function" if self.loss_fn is not None else "the last layer (there is no loss_fn)",
                expected="a floating-point tensor with one element",
                found=found,
                fix="return loss.mean(), a dict with the key 'loss', or pass PipelineModule(loss_fn=...)",
            )
        self.values.append(loss.detach().reshape(()))
        for name, value in terms.items():
            self.terms.setdefault(name, []).append(_mean(name, value))
        if not torch.is_grad_enabled():
            return None
        if not loss.requires_grad:
            raise UsageError(
                "the loss depends on no trained parameter",
                fix="check that layers do not detach their output and that parameters require grad; "
                "checkpoint(..., use_reentrant=True) gives none where its input requires none: use False",
            )
        loss = loss.reshape(())
        # In fp32 at least: the scaled loss of an fp16 model would overflow by itself.
        return loss if self.factor == 1.0 else _wide(loss) * self.factor

    def row(self, names: list[str], how: str | None) -> torch.Tensor:
        """fp64?, the loss (``how``: avg or sum), the mean of each named term, the loss by micro-batch; 1D, fp64, on the
        device, which is not waited for. By slot each term comes by micro-batch too."""
        values = torch.stack([_wide(value) for value in self.values])
        loss = values.sum() if how == "sum" else values.mean()
        terms = [torch.stack(self.terms[name]) for name in names]
        means = terms if self.by_slot else [term.mean() for term in terms]
        is_wide = torch.full(
            (1,), float(values.dtype == torch.float64), dtype=torch.float64, device=self.device
        )
        return torch.cat([is_wide, *(self._wide_here(one) for one in (loss, *means, values))])

    def _wide_here(self, values: torch.Tensor) -> torch.Tensor:  # 1D
        if HOST.sees(values):  # terms that the loss function made of plain numbers
            return sent(values.view(-1).tolist(), torch.float64, self.device)
        return values.view(-1).to(self.device, torch.float64)

    @property
    def joined(self) -> Any:
        """The outputs of all micro-batches, along dim 0 where they are tensors that fit; None where there are none."""
        outputs = self.outputs
        if not outputs:
            return None
        tensors = all(isinstance(one, torch.Tensor) and one.dim() > 0 for one in outputs)
        if tensors and len({one.shape[1:] for one in outputs}) == 1:
            return torch.cat(outputs)
        return outputs

    def _on_device(self, value: Any) -> Any:
        move = torch.utils._pytree.tree_map_only
        return value if self.device.type == "cpu" else move(torch.Tensor, lambda t: t.to(self.device), value)


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


@dataclass(frozen=True, slots=True)
class Outcome:
    """The losses of a batch, averaged over the replicas; the same on every rank of a pipeline."""

    loss: torch.Tensor  # [], the mean or the sum over micro-batches
    terms: dict[str, torch.Tensor]  # [] each, means
    each: list[torch.Tensor]  # [] each, by micro-batch


class Settlement:
    """Ends each batch of a pipeline on all ranks alike; collective over the world. ``last``: the rank of the loss.

        whole  --attempt-->  under way  --settle: all ranks have agreed on its end-->  whole

    Under way, messages may be there that nobody would take: whoever raises there has ended the pipeline for good.
    """

    def __init__(
        self, grid: PipelineParallelGrid, device: torch.device, last: int, sharing: Sharing | None = None
    ) -> None:
        self._grid, self._device, self._last = grid, device, last
        self._sharing = sharing  # of the slots that batches of a step have
        self._names: list[str] = []  # of the loss function's other terms, as all ranks know them
        self._whole = True

    def need_whole(self, call: str) -> None:
        """Raises UsageError where an earlier batch never came to its end."""
        if not self._whole:
            raise UsageError(
                f"engine.{call}: this pipeline has stopped",
                rank=self._grid.global_rank,
                fix="a rank or its connection was lost in an earlier batch; restart from a checkpoint",
            )

    def attempt(self, run: Callable[[Batch], BaseException | None], batch: Batch) -> BaseException | None:
        """Run ``batch``; what has failed, for `settle`."""
        self._whole = False
        return run(batch)

    def settle(
        self, batch: Batch, how: str | None, failure: BaseException | None = None, first: bool = False
    ) -> Outcome | BaseException:
        """What came of ``batch``, or the error that this rank is to raise, as every rank then is.

        The error is ``failure`` where there is one (``first``: it arose here, it was not heard of from another rank),
        else a CommunicationError if another rank failed, or a UsageError if replicas have other terms.
        """
        grid = self._grid
        speaks = failure is None and batch.with_loss and grid.stage_id == self._last
        mine = sorted(batch.terms) if speaks else self._names
        # [1] Every rank fills in its own places and leaves zeros elsewhere, so the sum brings each value to every rank
        # as it was, and all compute the same mean from them:
        #   failed, by pipeline rank | new names | for each slice and replica: fp64?, loss, terms, losses
        head = grid.pipe_parallel_size + 1
        width = 2 + len(self._names) * (batch.count if batch.by_slot else 1) + batch.count
        replicas = grid.model_parallel_size * grid.data_parallel_size
        figures = torch.zeros(head + replicas * width, dtype=torch.float64, device=self._device)
        figures[grid.stage_id] = first
        figures[head - 1] = mine != self._names
        if speaks and mine == self._names:
            place = head + (grid.slice_parallel_id * grid.data_parallel_size + grid.data_parallel_id) * width
            figures[place : place + width] = batch.row(self._names, how)
        all_reduce(figures, world(), label="losses")
        told = figures.tolist()  # the one read of a batch
        *failed, news = told[:head]
        if news and failure is None and not any(failed):
            # [2] the terms changed: all ranks saw it in the sum, take over the new names, and sum again
            failure = self._learn(mine if speaks else None)
            if failure is None:
                return self.settle(batch, how)
        # [3] the last of the collectives is over; each rank raises what it knows
        self._whole = True
        if failure is not None:
            return failure
        if any(failed):
            ranks = ", ".join(str(rank) for rank, times in enumerate(failed) if times)
            return CommunicationError(
                f"pipeline rank(s) {ranks} failed in this batch, so no rank takes a step",
                rank=grid.global_rank,
                fix="read the traceback of the rank that failed; no message was lost, so the next batch may follow",
            )
        # [4] the mean of this slice's replicas
        rows = figures[head:].view(grid.model_parallel_size, grid.data_parallel_size, width)
        is_wide = bool(told[head + grid.slice_parallel_id * grid.data_parallel_size * width])
        of_slice = rows[grid.slice_parallel_id].to(torch.float64 if is_wide else torch.float32)
        if batch.by_slot and self._sharing is not None:
            each = of_slice[:, 2:].unflatten(
                1, (-1, batch.count)
            )  # [replicas, terms and the loss, micro-batches]
            *terms, loss = (self._over_slots(self._sharing, each[:, at]) for at in range(each.shape[1]))
            return Outcome(loss, dict(zip(self._names, terms, strict=True)), list(each[:, -1].mean(0)))
        return self._average(of_slice, batch.count)

    @staticmethod
    def _over_slots(sharing: Sharing, values: torch.Tensor) -> torch.Tensor:
        """The mean of the slots' ``values``, [replicas, micro-batches]."""
        tree = SlotTree(sharing.slots)
        fold = Fold(tree, torch.add)
        for rank, row in enumerate(values):
            for slot, value in zip(sharing.of(rank), row, strict=False):
                fold.put((slot, slot + 1), value)
        total = fold.take(tree.root)
        assert total is not None, "each slot has a loss"
        return total / sharing.slots

    def _average(self, rows: torch.Tensor, count: int) -> Outcome:
        """``rows``: [replicas, width]."""
        # One after the other in fp32 (fp64 where a loss is that), in one order: the same bits on every rank.
        total = rows[0]
        for row in rows[1:]:
            total = total + row
        total = total / len(rows)
        terms = {name: total[at] for at, name in enumerate(self._names, 2)}
        return Outcome(total[1], terms, list(total[len(total) - count :]))

    def _learn(self, mine: list[str] | None) -> UsageError | None:
        """Take over the names of the terms, which have changed."""
        gathered = all_gather_object(mine, world(), label="loss terms")
        (one, first), *others = ((rank, names) for rank, names in enumerate(gathered) if names is not None)
        for rank, names in others:
            if names != first:
                return UsageError(
                    f"the loss function returned other terms on rank {rank} than on rank {one}",
                    expected=first,
                    found=names,
                    fix="return the same terms on every replica",
                )
        self._names = first
        return None
