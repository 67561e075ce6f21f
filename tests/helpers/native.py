"""The native rung: what NCCL carries, on CPUs, and a log of what each communicator was asked for.

NCCL has no tags. On one communicator every rank must issue the same collectives in the same order, or they hang or mix
their data. gloo is as strict for its own collectives, so a backend that is gloo under another name takes every path
that NCCL takes: zeropipe knows gloo by name alone, and starts it beside this one, for words, as beside NCCL. What is
issued is logged where torch.distributed is called, not where zeropipe says that it calls, and compared between ranks
after every task.

gloo adds floats in an order of its own. Among more than two ranks they are added in the order of ranks, from what gloo
has moved, so that what is proved to the bit elsewhere is proved to the bit here.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

BACKEND = "strict"
Entry = tuple[str, int, str]  # op, bytes, dtype
# By communicator (its name and ranks): what this rank issued there. A message is of a pair of ranks.
Issued = dict[tuple[str, tuple[int, ...]], list[Entry]]

# Where in the positional arguments the tensor stands whose bytes all ranks share; None: there is none.
_COLLECTIVES = {
    "all_reduce": 0,
    "broadcast": 0,
    "reduce": 0,
    "all_gather_into_tensor": 0,
    "all_gather_single": 0,
    "reduce_scatter_tensor": 1,
    "reduce_scatter_single": 1,
    "all_to_all_single": 1,
    "all_gather_object": None,
    "broadcast_object_list": None,
    "barrier": None,
}


_SUMS = ("all_reduce", "reduce", "reduce_scatter_tensor", "reduce_scatter_single")


class Log:
    """Every call of torch.distributed that moves something, in order."""

    def __init__(self) -> None:
        self._issued: Issued = defaultdict(list)
        self._depth = 0  # an object travels by collectives of tensors, whose sizes are torch's own affair
        self._batch: list[tuple[tuple[int, int], Any, Entry]] | None = None  # messages that begin together

    @classmethod
    def install(cls) -> Log:
        """Register the backend and log what this process issues from now on. Before zeropipe is imported."""
        import torch.distributed as dist

        def make(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
            return dist.ProcessGroupGloo(store, rank, size, timeout)

        dist.Backend.register_backend(BACKEND, make, devices=["cpu"])
        log = cls()
        for name, at in _COLLECTIVES.items():
            if hasattr(dist, name):
                setattr(dist, name, log._logged(name, at, getattr(dist, name)))
        for name in ("all_gather_single_coalesced", "allgather_into_tensor_coalesced"):
            if hasattr(dist.ProcessGroup, name):
                method = getattr(dist.ProcessGroup, name)
                setattr(dist.ProcessGroup, name, log._logged_method(method))
        dist.batch_isend_irecv = log._logged_batch(dist.batch_isend_irecv)
        for name in ("send", "recv"):
            setattr(dist.ProcessGroup, name, log._logged_message(name, getattr(dist.ProcessGroup, name)))
        return log

    def take(self) -> Issued:
        found, self._issued = dict(self._issued), defaultdict(list)
        return found

    def _add(self, pg: Any, entry: Entry, pair: tuple[int, ...] | None = None) -> None:
        import torch.distributed as dist

        if dist.get_backend(pg) == "gloo":  # beside the strict one, for words: it has tags, and no order
            return
        ranks = tuple(dist.get_process_group_ranks(pg))
        among = ranks if pair is None else tuple(sorted(ranks[at] for at in pair))
        self._issued[str(pg.group_name) + ("" if pair is None else " messages"), among].append(entry)

    def _logged(self, name: str, at: int | None, call: Callable[..., Any]) -> Callable[..., Any]:
        import torch.distributed as dist

        @functools.wraps(call)
        def logged(*args: Any, **kwargs: Any) -> Any:
            if self._depth == 0:
                group = kwargs.get("group") or next(
                    (a for a in args if isinstance(a, dist.ProcessGroup)), None
                )
                size, kind = (0, "") if at is None else (args[at].nbytes, str(args[at].dtype))
                self._add(group or dist.group.WORLD, (name, size, kind))
            self._depth += 1
            try:
                if name in _SUMS:
                    return _sum(name, call, *args, **kwargs)
                return call(*args, **kwargs)
            finally:
                self._depth -= 1

        return logged

    def _logged_method(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def logged(pg: Any, outputs: Sequence[Any], *args: Any) -> Any:
            sizes = "+".join(str(output.nbytes) for output in outputs)
            self._add(pg, (f"all_gather of {sizes}", sum(o.nbytes for o in outputs), str(outputs[0].dtype)))
            return call(pg, outputs, *args)

        return logged

    def _logged_batch(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def logged(ops: Sequence[Any]) -> Any:
            self._batch = []
            try:
                return call(ops)
            finally:
                batch, self._batch = self._batch, None
                # The two directions of a pair have no order between them, the messages of one have.
                for way, pg, entry in sorted(batch, key=lambda message: message[0]):
                    self._add(pg, entry, way)

        return logged

    def _logged_message(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def logged(pg: Any, tensors: Sequence[Any], peer: int, tag: int) -> Any:
            here = pg.rank()
            way = (here, peer) if name == "send" else (peer, here)
            entry = (f"{way[0]} to {way[1]}", sum(t.nbytes for t in tensors), str(tensors[0].dtype))
            if self._batch is None:
                self._add(pg, entry, way)
            else:
                self._batch.append((way, pg, entry))
            return call(pg, tensors, peer, tag)

        return logged


class _Summed:
    """The handle of a sum that is taken once its terms are there."""

    def __init__(self, work: Any, finish: Callable[[], None]) -> None:
        self._work, self._finish = work, finish

    def wait(self) -> None:
        self._work.wait()
        finish, self._finish = self._finish, lambda: None
        finish()

    def is_completed(self) -> bool:
        return bool(self._work.is_completed())


def _sum(name: str, call: Callable[..., Any], *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
    """A reduction; of floats among many ranks in the order of ranks, 16 bits in fp32 with one rounding."""
    import torch
    import torch.distributed as dist
    from torch.utils._python_dispatch import _disable_current_modes as no_mode

    group = kwargs.get("group") or next(
        (a for a in args if isinstance(a, dist.ProcessGroup)), dist.group.WORLD
    )
    size, tensor = dist.get_world_size(group), args[0]
    if size < 3 or not tensor.dtype.is_floating_point:
        return call(*args, async_op=async_op, **kwargs)
    op = next(a for a in args if isinstance(a, dist.ReduceOp | dist.ReduceOp.RedOpType))
    input = args[1] if name.startswith("reduce_scatter") else tensor
    terms = input.new_empty((size, tensor.numel()))
    if input is tensor:
        work = dist.all_gather_into_tensor(terms.view(-1), tensor.reshape(-1), group, async_op=True)
    else:
        work = dist.all_to_all_single(terms.view(-1), input, group=group, async_op=True)

    @no_mode()  # what stands in for a backend's own work is none of what a test counts
    def finish() -> None:
        wide = torch.promote_types(tensor.dtype, torch.float32)
        if op in (dist.ReduceOp.MAX, dist.ReduceOp.MIN):
            total = terms.amax(0) if op == dist.ReduceOp.MAX else terms.amin(0)
        else:
            total = terms[0].to(wide, copy=True)
            for term in terms[1:]:
                total += term
            total /= size if op == dist.ReduceOp.AVG else 1
        if name != "reduce" or args[1] == dist.get_rank():
            tensor.copy_(total.view(tensor.shape))

    handle = _Summed(work, finish)
    if not async_op:
        handle.wait()
    return handle if async_op else None


def compare(issued: Sequence[Issued]) -> None:
    """Raise AssertionError where ranks issued different things over one communicator."""
    for rank, of_rank in enumerate(issued):
        for (name, ranks), mine in of_rank.items():
            for other in ranks:
                theirs = issued[other].get((name, ranks), [])
                if theirs == mine:
                    continue
                at = next((i for i, pair in enumerate(zip(mine, theirs)) if pair[0] != pair[1]), None)  # noqa: B905
                at = min(len(mine), len(theirs)) if at is None else at
                raise AssertionError(
                    f"communicator {name} of ranks {ranks}: call {at} differs. Rank {rank} of {len(mine)}: "
                    f"{mine[max(at - 2, 0) : at + 3]}; rank {other} of {len(theirs)}: "
                    f"{theirs[max(at - 2, 0) : at + 3]}"
                )
