"""What forwards wrote into their own parameters (``Embedding(max_norm=)``, clipping), joined for all ranks.

A forward sees the whole value and may write to it. Ranks then join: an element that some ranks changed gets their
value, which must be one; so rows that each rank shortened for its own batch end as in one process that saw all
batches. Until then the writer goes on with its own copy.

    use ends       the writer notes the value that it leaves        (a version, or a look through ``.data``, told of it)
    next meeting   its word carries "somebody wrote": all exchange what they have and cut it into shards anew
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from zeropipe.comm.collectives import all_gather
from zeropipe.comm.group import Group
from zeropipe.errors import UsageError
from zeropipe.runtime.zero.gather.shards import GATHER, Shards
from zeropipe.runtime.zero.status import ZeroParamStatus

_AT_ONCE = 2**22  # elements of each rank that are exchanged at a time
_BITS = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
}  # by element size; larger ones are cut into 64-bit words


def join(written: Collection[Shards], known: Sequence[Shards], everyone: Group) -> None:
    """Make what any rank wrote (here: to ``written``) the value of every rank. Collective.

    ``known``: all shards of the model, in the same order on every rank. Raises UsageError on every rank, and drops what
    was written, where ranks wrote different values to the same element.
    """
    mine = torch.tensor([shards in written for shards in known], dtype=torch.uint8)
    marks = mine.new_empty((everyone.size, len(known)))
    all_gather(
        marks.view(-1), mine, everyone, label="which parameters were written", channel=GATHER, guarded=True
    )
    some = [shards for shards, mark in zip(known, marks.amax(0).tolist(), strict=True) if mark]
    parted = [shards for shards in some if not _join_one(shards, everyone)]
    if parted:
        names = ", ".join(f"'{shards.name}'" for shards in parted)
        raise UsageError(
            f"forward wrote into parameter {names}, and ranks wrote different values to the same elements; what "
            "was written is dropped",
            rank=everyone.ranks[everyone.rank],
            fix="write what is the same on every rank (all_reduce what it is made from), keep the value in a "
            "buffer, or write between steps inside zero.GatheredParameters(param, modifier_rank=0)",
        )


def _join_one(shards: Shards, everyone: Group) -> bool:
    """Whether the ranks agreed; if not, the value is what it was before they wrote."""
    before = shards.settled()
    after = before if shards.writes.edits is None else shards.writes.edits
    if shards.writes.edits is None and shards.status is ZeroParamStatus.AVAILABLE:
        after = shards.full[: shards.numel]  # with edits between steps, which every rank has made
    shards.writes.edits = None
    kind = _BITS.get(before.element_size(), torch.int64)
    old, new = before.reshape(-1).view(kind), after.reshape(-1).view(kind)
    joined, agreed = torch.empty_like(old), True
    for old_run, new_run, run in zip(
        old.split(_AT_ONCE), new.split(_AT_ONCE), joined.split(_AT_ONCE), strict=True
    ):
        every = new_run.new_empty((everyone.size, new_run.numel()))
        all_gather(
            every.view(-1),
            new_run.contiguous(),
            everyone,
            label=f"{shards.name} as written",
            channel=GATHER,
            guarded=True,
        )
        changed = every != old_run
        run.copy_(every.gather(0, changed.byte().argmax(0, keepdim=True))[0])  # of the first who changed it
        agreed = agreed and not bool((changed & (every != run)).any())
    shards.write(joined.view(before.dtype).view(before.shape) if agreed else before)
    return agreed
