"""One update of all partitions: whole, in pieces, overlapped with messages, from files; safe to raise in the middle.

    jobs    edits | scale a | load a | scale b | load b | step a | step b | publish a | publish b | forget gradients

An update is a list of jobs, and a job may be done again until it has returned. So the next ``step`` after one that
raised (memory was short, a collective failed) goes on where that stopped: nothing is applied twice or left half done,
the bits are those of a step that never raised, and ranks that did not raise wait in the very collective that is next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch.optim import optimizer as torch_optimizer

from zeropipe.comm.collectives import Work
from zeropipe.comm.record import SEAM
from zeropipe.errors import UsageError
from zeropipe.runtime.zero.hold.grads import GradStore
from zeropipe.runtime.zero.hold.partition import Partition, copy_of
from zeropipe.runtime.zero.hold.step_runs import Job, Range, Runs, alone, is_fused, told_of_return
from zeropipe.runtime.zero.hold.step_whole import Undo, step_whole
from zeropipe.runtime.zero.hold.survey import Communicates, hand_over

# Elements that a call which does not happen in one kernel may change and still be undone; a copy of that much is cheap.
UNDO_NUMEL = 2**20

Unused = Sequence[tuple[Partition, list[int]]]  # what no rank gave a gradient


class Update:
    """What is left to do of one update."""

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()
        self._works: list[Work] = []  # new values on their way
        self.changed = False  # a master or a moment is no longer what it was
        self._torn = False  # part of a call was done, and cannot be undone

    def add(self, jobs: Iterable[Job]) -> None:
        self._jobs += jobs

    def run(self) -> None:
        """Do what is left. Raises UsageError where an earlier raise left something that cannot be gone on with."""
        if self._torn:
            raise UsageError(
                "the step that raised before has changed part of the optimizer's state and cannot be repeated: this "
                "optimizer does not step in one kernel. Fix: load a checkpoint"
            )
        try:
            while self._jobs:
                more = self._jobs[0]()
                self._jobs.popleft()
                self._jobs.extendleft(reversed(more or ()))
        except BaseException:
            SEAM.keep(*self._works)  # the transport reads and writes the values, whatever becomes of this
            raise

    def on_change(self) -> None:
        self.changed = True

    def done(self, more: list[Job]) -> None:
        """The current job will raise, but must not be done again; ``more`` follows it."""
        self._jobs.popleft()
        self._jobs.extendleft(reversed(more))

    def tear(self) -> None:
        self._torn = self.changed = True

    def send(self, partition: Partition, run: Range) -> None:
        """Start to give every rank the new values of a run of each shard."""
        self._works.append(partition.values.publish_run(*run))

    def arrive(self) -> None:
        while self._works:
            self._works[0].wait()
            self._works.pop(0)


class Stepping:
    """Turns the reduced gradients of a window into an ``Update``.

    ``optimizer``: torch's, which holds the masters. ``elementwise``: it is known to be, so that a step may be several
    calls. ``pages_state``: masters and moments live in files.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, elementwise: bool, pages_state: bool) -> None:
        self._optimizer = optimizer
        self._elementwise = elementwise
        self._pages_state = pages_state
        self._communicates = isinstance(optimizer, Communicates)

    def update(self, stores: Sequence[GradStore], factor: float, unused: Unused) -> Update:
        """What steps all partitions on ``factor`` times their gradients."""
        left_out = {id(partition): indices for partition, indices in unused}
        busy = [s for s in stores if len(left_out.get(id(s.partition), ())) < len(s.partition.params)]
        update = Update()
        for store in stores:
            update.add([store.partition.values.take_edits])
        for store in () if self._pages_state else busy:
            update.add(_load(store, factor, left_out.get(id(store.partition), ())))
        watched = _watched(self._optimizer)
        together: list[Partition] = []
        sent: set[int] = set()
        for store in busy:
            partition = store.partition
            simple = not partition.state.apart and id(partition) not in left_out
            if not partition.flat or not self._elementwise or (watched and simple and not self._pages_state):
                together.append(partition)
            elif simple and not self._pages_state and self._in_one_kernel(partition):
                update.add([partial(self._alone, update, partition)])
            else:
                runs = self._runs(update, store, factor, left_out.get(id(partition), ()))
                overlaps = _overlaps(partition)
                sent |= {id(partition)} if overlaps else set()
                update.add(self._windows(update, runs, partition, overlaps))
        if together:
            alone = len(together) < len(busy)
            update.add([partial(self._together, update, together, left_out, alone)])
        for store in busy:
            if id(store.partition) not in sent:
                update.add(_publish(update, store.partition))
        update.add([update.arrive])
        update.add([store.partition.drop_gradients for store in stores])
        return update

    def own_update(self, optimizer: Communicates, stores: Sequence[GradStore], factor: float) -> Update:
        """What steps an optimizer that exchanges each rank's own gradients by itself."""
        update = Update()
        for store in stores:
            update.add([store.partition.values.take_edits])

        def step() -> None:
            hand_over(optimizer, stores, factor)
            try:
                self._optimizer.step()
            except BaseException:
                update.tear()
                raise
            update.on_change()

        update.add([step])
        for store in stores:
            update.add(_publish(update, store.partition))
        update.add([update.arrive])
        return update

    def _in_one_kernel(self, partition: Partition) -> bool:
        """Whether the master is stepped as it is; not where the first state is there and pieces can travel early."""
        overlaps = _overlaps(partition) and bool(self._optimizer.state.get(partition.master))
        return is_fused(self._optimizer, partition.group_index) and not overlaps

    def _alone(self, update: Update, partition: Partition) -> None:
        """Step one flat master whose step is one kernel: the counts are all that a raise can leave changed."""
        state = self._optimizer.state
        returned: list[bool] = []
        before = {key: copy_of(value) for key, value in (partition.state.of_master()[1] or {}).items()}
        known = partition.master in state and bool(state[partition.master])
        try:
            with alone(self._optimizer, partition.group_index) as members:
                members.append(partition.master)
                with told_of_return(self._optimizer) as returned:
                    self._optimizer.step()
        except BaseException:
            if returned:
                update.on_change()
                update.done([])
            elif known:
                state[partition.master].update(before)
            else:
                state.pop(partition.master, None)
            raise
        update.on_change()

    def _runs(self, update: Update, store: GradStore, factor: float, unused: Sequence[int]) -> Runs:
        partition = store.partition
        if self._pages_state:
            return Runs(
                self._optimizer, partition, lambda: store.shard, factor, unused, update.on_change, update.done
            )

        def gradient() -> torch.Tensor:
            assert partition.master.grad is not None
            return partition.master.grad

        return Runs(self._optimizer, partition, gradient, 1.0, unused, update.on_change, update.done)

    def _windows(self, update: Update, runs: Runs, partition: Partition, overlaps: bool) -> Iterator[Job]:
        if overlaps:
            return runs.jobs(partition.values.runs, lambda run: partial(update.send, partition, run))
        numel = partition.master.numel()
        size = partition.offload.policy.sub_group_numel if self._pages_state else numel
        windows = [(at, min(at + size, numel)) for at in range(0, numel, max(size, 1))]
        return runs.jobs(windows, lambda window: None)

    def _together(
        self,
        update: Update,
        partitions: Sequence[Partition],
        left_out: Mapping[int, Sequence[int]],
        alone: bool,
    ) -> None:
        """One call for optimizers that need whole tensors, or whose steps somebody watches."""
        undo = None
        if not self._communicates and sum(p.master.numel() for p in partitions) <= UNDO_NUMEL:
            undo = Undo(self._optimizer, [tensor for p in partitions for tensor in p.stepped])
        try:
            step_whole(self._optimizer, partitions, left_out, not self._communicates, alone)
        except BaseException:
            if undo is None:
                update.tear()
            else:
                undo.restore()
            raise
        update.on_change()


def _load(store: GradStore, factor: float, unused: Sequence[int]) -> Iterator[Job]:
    """Set the gradients of what is stepped to ``factor`` times the store's."""
    partition, shard = store.partition, store.shard
    in_place = shard.dtype == partition.master.dtype and shard.device == partition.master.device
    if in_place and factor != 1.0:
        yield partial(_scale, shard, factor)
    yield partial(partition.load_gradient, shard, 1.0 if in_place else factor)
    yield partial(partition.drop_gradients, unused)


def _scale(shard: torch.Tensor, factor: float) -> None:
    shard.mul_(factor)


def _publish(update: Update, partition: Partition) -> Iterator[Job]:
    """Give every rank the new values; each message is sent once, whatever is done again."""
    if len(partition.values.runs) > 1:
        for run in partition.values.runs:
            yield partial(update.send, partition, run)
    else:
        yield partition.values.publish


def _overlaps(partition: Partition) -> bool:
    """Whether new values are sent in several messages, each of which can leave before the next piece is stepped.

    Ranks may differ in when they send: they send each other the same.
    """
    return partition.master.device.type == "cpu" and len(partition.values.runs) > 1


def _watched(optimizer: torch.optim.Optimizer) -> bool:
    """Whether somebody is told of the optimizer's steps, and would be told of pieces."""
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    own = vars(optimizer).get("step")  # torch's schedulers put a wrapper here that pieces do not disturb
    return any(hooks) or (own is not None and not hasattr(own, "_wrapped_by_lr_sched"))
