"""A step on gradients that all ranks know of alike (``survey.py``): one update of all partitions, safe to raise in the
middle.

    jobs     edits | scale a | load a | scale b | load b | step a | step b | publish a | publish b | forget gradients
    raises     1        2        1         2        1         3        3          4           4             1

An update is a list of jobs, and a job may be done again until it has returned. So the next ``step`` after one that
raised (memory was short, a collective failed) goes on where that stopped: nothing is applied twice or left half done,
the bits are those of a step that never raised, and ranks that did not raise wait in the very collective that is next.

1   done again from its start, with the same result
2   a job by itself, since it is the one that must not be done twice: it raises before it multiplies, or not at all
3   a call of the optimizer. One kernel in place has happened or not; on copies, nothing has; on whole tensors, they are
    put back, unless they are too many to be kept: then the step is torn, and says so
4   what was sent is on its way, and is not sent again

    step by itself (``runs.py``)    flat masters of elementwise optimizers
    step together, in one call      what needs whole tensors, exchanges gradients itself, or is watched:

    call 1   |  a  |#####|  c  |        a and c share a step count; what b has is kept aside and put back
    call 2   |#####|  b  |#####|        then b, on its own count

What is kept aside costs no bits: whatever the optimizer computes of a tensor's element depends on that tensor alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch.optim import optimizer as torch_optimizer

from zeropipe.runtime.optimizers.shard_view import Communicates
from zeropipe.runtime.optimizers.state_kinds import Shared, split_state, state_keys
from zeropipe.runtime.zero.hold.autograd import Watch
from zeropipe.runtime.zero.hold.grads import GradStore
from zeropipe.runtime.zero.hold.partition import Cohort, Partition, copy_counts
from zeropipe.runtime.zero.hold.runs import Job, Runs, Update, leaves_early
from zeropipe.runtime.zero.survey import Unused
from zeropipe.tensor.host import Number, changes

# Elements that a call which does not happen in one kernel may change and still be undone; a copy of that much is cheap.
UNDO_NUMEL = 2**20


class Stepping:
    """Turns the reduced gradients of a window into an ``Update``.

    ``optimizer``: torch's, which holds the masters. ``elementwise``: it is known to be, so that a step may be several
    calls. ``pages_state``: masters and moments live in files.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, elementwise: bool, pages_state: bool) -> None:
        self._optimizer = optimizer
        self._elementwise, self._pages_state = elementwise, pages_state
        self._communicates = isinstance(optimizer, Communicates)

    def update(
        self, stores: Sequence[GradStore], factor: Number, unused: Unused, own: Communicates | None = None
    ) -> Update:
        """What steps all partitions on ``factor`` times their gradients.

        ``own``: the optimizer, where it exchanges each rank's own gradients in this step.
        """
        # What nobody used at all is not stepped: its masters, moments and counts stay as they are.
        busy = [s for s in stores if len(unused.get(s.partition, ())) < len(s.partition.params)]
        update = Update(self._optimizer.param_groups)
        update.add(*(store.partition.values.take_edits for store in stores))
        if own is not None:
            update.add(partial(_hand_over, own, stores, factor))
        elif not self._pages_state:
            for store in busy:
                update.add(*_load(store, factor, unused.get(store.partition, ())))
        sent = []
        if busy and self._goes_in_one_call([store.partition for store in busy], unused):
            update.add(partial(self._step_together, update, [store.partition for store in busy], unused))
        else:
            for store in busy:
                runs = Runs(update, self._optimizer, store, factor, unused.get(store.partition, ()))
                update.add(*runs.jobs())
                sent += [store] if leaves_early(store.partition) else []
        for store in busy:
            if store not in sent:
                update.add(*_publish(update, store.partition))
        update.add(update.arrive, *(store.partition.drop_gradients for store in stores))
        return update

    def _goes_in_one_call(self, partitions: Sequence[Partition], unused: Unused) -> bool:
        if not self._elementwise or any(p.rounding is not None for p in partitions):
            return not self._elementwise
        # Somebody who is told of steps is told of one; not where that would be wrong, or read whole files.
        simple = not self._pages_state and not any(p.state.apart or p in unused for p in partitions)
        return simple and _watched(self._optimizer)

    def _step_together(self, update: Update, partitions: Sequence[Partition], unused: Unused) -> None:
        # Whole tensors may be stepped in any number of calls: what they may change is kept, unless it is too much. One
        # that communicates cannot be undone on this rank alone.
        undo = None
        if not self._communicates and sum(p.master.numel() for p in partitions) <= UNDO_NUMEL:
            undo = _Undo(self._optimizer, [tensor for p in partitions for tensor in p.stepped])
        try:
            self._step_whole(partitions, unused)
        except BaseException:
            (update.tear if undo is None else undo.restore)()
            raise
        update.on_change()

    def _step_whole(self, partitions: Sequence[Partition], unused: Unused) -> None:
        flats = [p for p in partitions if p.flat]
        cohorts = {p: p.state.cohorts(unused.get(p, ())) for p in flats}
        # One that communicates has one count for all, as it wants it.
        counting = [p for p in flats if not self._communicates and (p.state.apart or p in unused)]
        after: dict[Partition, list[Shared]] = {p: [] for p in counting}
        gradients = {p: p.master.grad for p in flats}
        try:
            for level in range(max([1, *map(len, cohorts.values())])):
                now = [p for p in flats if level < len(cohorts[p])]
                asides = [_Aside(self._optimizer, p, cohorts[p][level], p in counting) for p in now]
                for p in partitions:
                    if p.flat:
                        p.master.grad = gradients[p] if p in now else None
                    elif level:
                        p.drop_gradients()  # stepped in the first call
                self._optimizer.step()
                for p, aside in zip(now, asides, strict=True):
                    aside.put_back()
                    if p in counting:
                        after[p].append(copy_counts(p.state.of_master()[1]))
        finally:
            for p in flats:
                p.master.grad = gradients[p]
        before = {p: next((c.shared for c in cohorts[p] if c.main), None) for p in counting}
        counts = [
            (p, p.state.counts_after(cohorts[p], after[p], unused.get(p, ()), before[p])) for p in counting
        ]
        for p, (main, apart) in counts:  # all at once, so that a raise leaves none of it
            p.state.set_counts(main, apart)


def _load(store: GradStore, factor: Number, unused: Sequence[int]) -> Iterator[Job]:
    """Set the gradients of what is stepped to ``factor`` times the store's."""
    partition, shard = store.partition, store.shard_at_masters()
    factor, in_place = partition.before_rounding(factor), shard.dtype == partition.master.dtype
    if in_place and changes(factor):
        yield partial(_scale, shard, factor)
    yield partial(partition.load_gradient, shard, 1.0 if in_place else factor, unused)


def _scale(shard: torch.Tensor, factor: Number) -> None:
    shard.mul_(factor)


def _hand_over(optimizer: Communicates, stores: Sequence[GradStore], factor: Number) -> None:
    """Give the optimizer ``factor`` times this rank's gradients: the whole buffer of each partition."""
    for store in stores:
        gradient = store.buffer.float().mul_(factor) if changes(factor) else store.buffer
        master = store.partition.master
        optimizer.set_local_gradient(master, gradient.to(master.device))


def _publish(update: Update, partition: Partition) -> Iterator[Job]:
    """Give every rank the new values; each message is sent once, whatever is done again."""
    if len(partition.values.runs) > 1:
        yield from (partial(update.send, partition, run) for run in partition.values.runs)
    else:
        yield partition.values.publish


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


class _Undo:
    """What a call may change: copies of tensors, their gradients and their state, to be put back where it raises."""

    def __init__(self, optimizer: torch.optim.Optimizer, tensors: Sequence[torch.Tensor]) -> None:
        self._state = optimizer.state
        self._before: list[tuple[torch.Tensor, dict[str, object]]] = []
        self._places: list[tuple[torch.Tensor, torch.Tensor]] = []
        keys = state_keys(optimizer)
        for tensor in tensors:
            if tensor.grad is None:
                continue
            moments, shared = split_state(optimizer.state.get(tensor, {}), keys)
            places = [tensor.detach(), tensor.grad, *moments.values()]
            self._places += [(place, place.clone()) for place in places if place.layout == torch.strided]
            # The tensors themselves come back as they are; what is shared may be changed in place or replaced.
            self._before.append((tensor, moments | copy_counts(shared)))

    def restore(self) -> None:
        for place, value in self._places:
            place.copy_(value)
        for tensor, state in self._before:
            held = self._state.get(tensor)
            if held is not None:
                held.clear()
                held.update(state)
                if not state:
                    del self._state[tensor]


class _Aside:
    """The elements of a master that a call is not meant for, and the count of those that it is meant for."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, partition: Partition, cohort: Cohort, own_count: bool
    ) -> None:
        self._partition = partition
        self._state = optimizer.state
        self._ranges = cohort.ranges
        numel = partition.master.numel()
        edges = pairwise([0, *(edge for run in cohort.ranges for edge in run), numel])
        self._others = [(a, b) for a, b in list(edges)[::2] if a < b]  # between the ranges
        self._known, shared = partition.state.of_master()
        self._anew = own_count and cohort.shared is None and shared is not None
        # What is made anew is made beside what is there, which no call touches then.
        wholes = [partition.master.detach(), *([] if self._anew else self._known.values())]
        self._kept = [(whole[a:b], whole[a:b].clone()) for whole in wholes for a, b in self._others]
        if own_count:
            state = optimizer.state[partition.master]
            state.clear()
            if not self._anew:
                state.update(copy_counts(cohort.shared) | self._known)

    def put_back(self) -> None:
        for place, value in self._kept:
            place.copy_(value)
        for key, made in self._partition.state.of_master()[0].items():
            old = self._known.get(key)
            if old is None:
                for a, b in self._others:
                    made[a:b].zero_()
            elif self._anew:
                for a, b in self._ranges:
                    old[a:b].copy_(made[a:b])
                self._state[self._partition.master][key] = old


def reduce_late(store: GradStore, watch: Watch | None) -> None:
    """Reduce the window's gradients of a store that was added after them: whole, in ``param.grad``."""
    for bucket in store.buckets:
        for index in bucket.tensors:
            grad = store.partition.params[index].grad
            if grad is None:
                continue
            if watch is not None:
                watch.look(store.partition.names[index], grad)
            store.accept(index, grad, keep_grad=False)
        store.launch(bucket).wait()


def install_zero_grad(optimizer: torch.optim.Optimizer, clear: Callable[[], None]) -> Callable[..., None]:
    """Let ``optimizer.zero_grad`` call ``clear``, a method, too; returns what stands in its place, if nothing did."""
    # Its param groups hold the masters by now, whose gradients exist only in the middle of a step. The method is kept
    # in the optimizer's own ``__dict__``, so that its class stays as it is, and weakly: users keep it for longer.
    optimizer_of, clear_of = weakref.ref(optimizer), weakref.WeakMethod(clear)

    def zero_grad(set_to_none: bool = True) -> None:
        wrapped, forget = optimizer_of(), clear_of()
        if wrapped is not None:
            type(wrapped).zero_grad(wrapped, set_to_none)
        if forget is not None:
            forget()

    optimizer.__dict__.setdefault("zero_grad", zero_grad)
    return zero_grad
