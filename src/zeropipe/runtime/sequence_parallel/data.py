"""Batches of whole sequences, from a loader that knows nothing of it, as runs of tokens of the ranks that share them.

Each rank's loader gives other samples, as in data parallelism. The ranks of a sequence take turns in their batches::

    rank 0's loader   batch p                      rank 0   1st half of p, then 1st half of q
    rank 1's loader             batch q            rank 1   2nd half of p, then 2nd half of q
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.nn.functional import pad
from torch.utils._pytree import tree_map_only
from torch.utils.data import IterableDataset

from zeropipe.comm.collectives import all_gather_object
from zeropipe.comm.group import Group, from_process_group
from zeropipe.errors import UsageError
from zeropipe.given import DataLike, ProcessGroup
from zeropipe.layout.flat import in_lines

IGNORED = -100  # a label that no loss counts
_TOKENS = ("input_ids", "inputs_embeds")
_ENDED = "ended"


def shard_batch(batch: Mapping[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """The part of a batch of whole sequences that the ``rank``-th of ``ranks`` computes.

    ``batch``: tensors by name; ``input_ids`` [batch, tokens] or ``inputs_embeds`` [batch, tokens, ...] say which dims
    are the tokens. Tensors [batch, tokens, ...] and [n, batch, tokens] are cut, all else is passed as it is (lengths of
    packed sequences, say, which are those of the whole). ``labels`` become ``shift_labels``, each token's label that of
    its successor, as in causal models, since the successor may be another rank's. ``position_ids`` are added where
    there are none. Where ``ranks`` does not divide the tokens they are filled up at the end: labels -100, masks 0,
    positions that go on.

    Raises UsageError for a batch that does not say which dims are its tokens, and for labels of whole sequences.
    """
    tokens = next((batch[key] for key in _TOKENS if batch.get(key) is not None), None)
    if tokens is None or tokens.ndim < 2:
        raise UsageError(
            "a batch to divide among ranks",
            expected="a dict with input_ids [batch, tokens] or inputs_embeds [batch, tokens, ...]",
            found=f"{type(batch).__name__} of {list(batch)}",
        )
    size, length = tokens.shape[:2]
    whole = dict(batch)
    if whole.get("labels") is not None and "shift_labels" not in whole:
        if whole["labels"].shape != (size, length):
            raise UsageError(
                "a batch to divide among ranks: labels",
                expected=f"one for each token, {(size, length)}",
                found=tuple(whole["labels"].shape),
                fix="divide batches of causal models alone; a label of a whole sequence is no rank's own",
            )
        whole["shift_labels"] = pad(whole.pop("labels")[:, 1:], (0, 1), value=IGNORED)
    if whole.get("position_ids") is None:
        whole["position_ids"] = torch.arange(length, device=tokens.device).expand(size, -1)
    missing = in_lines(length, ranks) - length
    run = (length + missing) // ranks

    def part(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        # [n, batch, tokens]: positions in time, height and width.
        dim = next((at for at in (1, 2) if value.shape[at - 1 : at + 1] == (size, length)), None)
        if dim is None:
            return value
        if missing:
            value = _filled(name, value, dim, missing)
        return value.narrow(dim, rank * run, run).contiguous()

    return {name: part(name, value) for name, value in whole.items()}


def _filled(name: str, value: torch.Tensor, dim: int, missing: int) -> torch.Tensor:
    if name == "position_ids":
        last = value.narrow(dim, value.shape[dim] - 1, 1)
        return torch.cat([value, last + torch.arange(1, missing + 1, device=value.device)], dim)
    fill = IGNORED if name.endswith("labels") else 0
    return pad(value, (0, 0) * (value.ndim - 1 - dim) + (0, missing), value=fill)


class UlyssesSPDataLoaderAdapter:
    """A loader of this rank's runs of tokens, from each rank's own loader ``dl`` of whole sequences (dicts of tensors).

    Args:
        dl: a loader; those of the ranks of a sequence give different samples, in any lengths.
        sp_rank, sp_world_size, sp_group: this rank's place, and the ranks that share a sequence.
        device: where the tensors go.

    Its length is ``len(dl) * sp_world_size``. Iterating is collective over the group. Where loaders end at different
    times the others' batches are still given. An error of one rank's loader is raised on all of them.
    """

    # For whoever makes a loader of this one's attributes, as accelerate's skip_first_batches does to resume: what it
    # iterates are micro-batches, which come one by one and from no worker.
    batch_size = None
    num_workers = 0
    prefetch_factor = None
    drop_last = False

    def __init__(
        self,
        dl: DataLike,
        sp_rank: int,
        sp_group: ProcessGroup,
        sp_world_size: int,
        device: torch.device | str | None = None,
    ) -> None:
        self.dl, self.sp_rank, self.sp_world_size, self.device = dl, sp_rank, sp_world_size, device
        self.sp_group = sp_group
        self._group = sp_group if isinstance(sp_group, Group) else from_process_group(sp_group)
        self.dataset = _MicroBatches(self)
        self._iterator: Iterator[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.dl) * self.sp_world_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = iter(self.dl)
        while found := self._next_of_all(batches):
            waiting = deque(found)
            # A loader of accelerate tells its last batch when it hands it out; here that is so for the last part.
            last = getattr(self.dl, "end_of_dataloader", None)
            while waiting:
                part = shard_batch(waiting.popleft(), self.sp_rank, self.sp_world_size)
                if last is not None:
                    self.dl.end_of_dataloader = last and not waiting
                yield (
                    part
                    if self.device is None
                    else tree_map_only(torch.Tensor, lambda t: t.to(self.device), part)
                )

    def __next__(self) -> dict[str, Any]:
        """The next one of an iteration of its own, which starts again after its end."""
        self._iterator = iter(self) if self._iterator is None else self._iterator
        try:
            return next(self._iterator)
        except StopIteration:
            self._iterator = None
            raise

    def collate_fn(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dl, "set_epoch"):
            self.dl.set_epoch(epoch)

    def _next_of_all(self, batches: Iterator[Any]) -> list[dict[str, Any]]:
        """The coming batch of each rank's loader, in the order of ranks; of those that have one."""
        mine: Any = _ENDED
        error: Exception | None = None
        try:
            # Tensors of a GPU would name this rank's device.
            mine = tree_map_only(torch.Tensor, lambda t: t.cpu(), dict(next(batches)))
        except StopIteration:
            pass
        except Exception as raised:
            error, mine = raised, f"{type(raised).__name__}: {raised}"
        everyone = all_gather_object(mine, self._group, label="batches of a sequence")
        if error is not None:
            raise error
        for rank, theirs in zip(self._group.ranks, everyone, strict=True):
            if isinstance(theirs, str) and theirs != _ENDED:
                raise UsageError(
                    "the loader of another rank of this sequence raised", rank=rank, found=theirs
                )
        return [one for one in everyone if not isinstance(one, str)]


class _MicroBatches(IterableDataset[dict[str, Any]]):
    def __init__(self, adapter: UlyssesSPDataLoaderAdapter) -> None:
        self._adapter = adapter

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._adapter)
