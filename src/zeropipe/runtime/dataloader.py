"""A data loader that knows its place: it advances epochs by itself and resumes on exactly the next sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler

from zeropipe.errors import CheckpointError, UsageError
from zeropipe.given import DataLike
from zeropipe.layout.slots import Sharing


class SlotSampler(Sampler[int]):
    """Samples for one rank, dealt to the slots of a step and not to ranks: a slot has the same on any number of them.

    Step after step takes ``batch_size`` samples for each slot, in an order that depends on ``seed`` and epoch; the
    last step repeats a few from the epoch's begin, or (``drop_last``) is left out. Where a pass of this rank counts for
    nothing it gets the samples of its slot before once more. For a loader of your own: ``DataLoader(dataset,
    batch_size, sampler=engine.slot_sampler(dataset))``, with ``set_epoch`` at each epoch, as torch's
    DistributedSampler wants it.
    """

    def __init__(
        self,
        dataset: DataLike,
        batch_size: int,
        sharing: Sharing,
        rank: int,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        samples, step = len(dataset), batch_size * sharing.slots
        self._samples, self._step = samples, step
        self._steps = samples // step if drop_last else -(-samples // step)
        self._batch, self._shuffle = batch_size, shuffle
        slots = list(sharing.of(rank))
        self._slots = slots + slots[-1:] * (sharing.passes - len(slots))
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = torch.arange(self._samples)
        if self._shuffle:
            order = torch.randperm(
                self._samples, generator=torch.Generator().manual_seed(self.seed + self.epoch)
            )
        for step in range(self._steps):
            for slot in self._slots:
                first = step * self._step + slot * self._batch
                yield from (int(order[at % self._samples]) for at in range(first, first + self._batch))

    def __len__(self) -> int:
        return self._steps * len(self._slots) * self._batch


class _From(Sampler[int]):
    """This rank's samples of an epoch, from the ``start``-th on: what was consumed is not even loaded."""

    def __init__(self, inner: DistributedSampler[Any] | SlotSampler) -> None:
        self.inner = inner
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        return iter(list(self.inner)[self.start :])

    def __len__(self) -> int:
        return max(0, len(self.inner) - self.start)


class ZeroDataLoader:
    """Micro-batches for one data-parallel rank, in an order that depends on seed and epoch only.

    A map-style dataset is shuffled by seed and epoch and dealt out with torch's DistributedSampler, which repeats
    a few samples so that every rank has as many (``drop_last``: leaves a few out, and the last short batch).
    An IterableDataset is iterated as it is: dividing it among ranks is its own affair; its ``set_epoch(epoch)``
    is called where it has one. ``seed`` must be the same on every rank.

    Iterating yields the rest of the current epoch, and an epoch that was yielded to its end is followed by the
    next one, newly shuffled. Breaking off and iterating again starts the epoch over. ``state_dict`` counts every
    batch that was yielded as consumed. Iterating never draws from torch's global random state.

    ``sharing``: samples are dealt to slots (``SlotSampler``), and positions are counted in whole steps.

    Raises UsageError for a batch size below 1, and for an IterableDataset that is to be dealt to slots.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        drop_last: bool = False,
        seed: int = 0,
        shuffle: bool = True,
        pin_memory: bool = False,
        sharing: Sharing | None = None,
    ) -> None:
        if batch_size < 1:
            raise UsageError("batch_size of the data loader", expected="at least 1", found=batch_size)
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self._drop_last = drop_last
        self._post_process: Callable[[Any, dict[str, Any]], Any] | None = None

        # The place: of this epoch, samples of this rank, or batches where the dataset has no order. Positions are saved
        # in ``_unit``: ``_mine`` of this rank stand for ``_all``. ``_resume``: the next iteration goes on here.
        self.epoch, self._consumed, self._resume = 0, 0, False
        iterable = isinstance(dataset, IterableDataset)
        self._unit, self._mine, self._all = (
            ("batches", 1, 1) if iterable else ("samples", 1, data_parallel_size)
        )
        if sharing is not None:
            self._mine, self._all = batch_size * sharing.passes, batch_size * sharing.slots

        # Without a generator of its own each iteration would draw a seed from the global state.
        self._generator = torch.Generator()
        self._sampler: _From | None = None
        if sharing is not None:
            if iterable:
                raise UsageError(
                    "an IterableDataset cannot be dealt to slots: it divides itself among ranks",
                    fix="give a dataset with a length, or read engine.slots in a loader of your own",
                )
            self._sampler = _From(
                SlotSampler(dataset, batch_size, sharing, data_parallel_rank, shuffle, seed, drop_last)
            )
        elif not iterable:
            self._sampler = _From(
                DistributedSampler(
                    dataset, data_parallel_size, data_parallel_rank, shuffle, seed=seed, drop_last=drop_last
                )
            )
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=self._sampler,
            collate_fn=collate_fn,
            num_workers=num_workers,
            drop_last=drop_last,
            generator=self._generator,
            pin_memory=pin_memory,
        )

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank. Raises TypeError for an iterable dataset without a length."""
        if self._sampler is None:
            return len(self._loader)
        samples = len(self._sampler.inner)
        return samples // self.batch_size if self._drop_last else -(-samples // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of ``epoch``; the current one's position is kept where it is that one already."""
        if epoch != self.epoch:
            self.epoch, self._consumed, self._resume = epoch, 0, False

    def __iter__(self) -> Iterator[Any]:
        if not self._resume:
            self._consumed = 0
        self._resume = False
        # By seed and epoch, so that what workers draw is the same in a run that was resumed.
        self._generator.manual_seed(self.seed + self.epoch)
        batches = self._stream() if self._sampler is None else self._map(self._sampler)
        made = self._post_process
        return batches if made is None else (made(batch, self.state_dict()) for batch in batches)

    def post_process(self, made: Callable[[Any, dict[str, Any]], Any] | None) -> None:
        """From the next iteration on yield ``made(batch, state)``; ``state``: the place after the batch."""
        self._post_process = made

    def _map(self, sampler: _From) -> Iterator[Any]:
        sampler.inner.set_epoch(self.epoch)
        sampler.start = self._consumed
        left = len(self._loader)
        if left == 0:
            self._next_epoch()
        for batch in self._loader:
            left -= 1
            self._consumed += self.batch_size
            if left == 0:
                # Before the last yield: a loop may never ask for one more.
                self._next_epoch()
            yield batch

    def _stream(self) -> Iterator[Any]:
        skip = self._consumed
        # A stream has no order of ours: what was consumed is read again and dropped.
        setter = getattr(self.dataset, "set_epoch", None)
        if setter is not None:
            setter(self.epoch)
        for index, batch in enumerate(self._loader):
            if index < skip:
                continue
            self._consumed = index + 1
            yield batch
        self._next_epoch()

    def _next_epoch(self) -> None:
        self.epoch, self._consumed = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Epoch and position, the same on every data-parallel rank."""
        return {"epoch": self.epoch, "seed": self.seed, self._unit: self._consumed // self._mine * self._all}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken: the next iteration yields exactly the samples that were left.

        The number of ranks and the batch size may have changed: the position is in samples of all ranks, and
        where it is not a multiple of the ranks it is rounded down. An iterable dataset is read from its start
        and the consumed batches dropped. Raises CheckpointError where ``state`` is of another kind of dataset.
        """
        if self._unit not in state or "epoch" not in state:
            raise CheckpointError(
                "the data position was saved for another kind of dataset",
                expected=f"keys epoch, {self._unit}",
                found=f"keys {', '.join(map(str, state))}",
                fix="resume with the dataset that was trained on, or do not load its position",
            )
        # Places are counted over all ranks: their number and the batch may be others now.
        self.epoch = int(state["epoch"])
        self.seed = int(state.get("seed", self.seed))
        if self._sampler is not None:
            self._sampler.inner.seed = self.seed
        self._consumed = int(state[self._unit]) // self._all * self._mine
        self._resume = True


build_dataloader = ZeroDataLoader  # the name under which users make one


class RepeatingLoader:
    """``loader`` again and again without an end; saving and loading of its position pass through.

    Raises UsageError when the loader is empty, rather than turn for ever.
    """

    def __init__(self, loader: DataLike) -> None:
        self.loader = loader
        self._iterator: Iterator[Any] = iter(())

    def __iter__(self) -> RepeatingLoader:
        return self

    def __len__(self) -> int:
        return len(self.loader)

    def __next__(self) -> Any:
        # What is left of this round, else the first of the next; a loader that gives none twice has none.
        for _ in range(2):
            for value in self._iterator:
                return value
            self._iterator = iter(self.loader)
        raise UsageError(
            "the training data gives no micro-batch",
            expected="a loader that gives at least one each time it is gone through",
            found=f"none from a {type(self.loader).__name__}",
            fix="give more samples than one micro-batch takes on each rank, set dataloader_drop_last to false, "
            "or, where the loader is an iterator, pass it to train_batch(data_iter)",
        )

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.loader.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loader.load_state_dict(state)
        self._iterator = iter(())
