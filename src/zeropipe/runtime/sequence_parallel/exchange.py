"""The exchange of Ulysses: from a run of tokens with all heads to all tokens with a run of heads, and back.

Source: DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv:2309.14509. ``n`` ranks, each sends 1/n of what it has to each::

                 before: tokens a | b            after: heads 0 | 1
    rank 0        heads 0, 1 of tokens a          head 0 of tokens a, b
    rank 1        heads 0, 1 of tokens b          head 1 of tokens a, b

Each element of the result is one element of what some rank gave, so the gradient is the exchange the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from zeropipe.comm.collectives import all_gather, all_to_all
from zeropipe.comm.group import Group
from zeropipe.errors import UsageError
from zeropipe.layout.flat import in_lines


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, split: int, join: int) -> torch.Tensor:
        ctx.group, ctx.dims = group, (split, join)
        parts = torch.stack(x.chunk(group.size, split))  # [n, ...]: part j goes to member j
        received = torch.empty_like(parts)
        all_to_all(received, parts, group, label="ulysses").wait()
        return torch.cat(received.unbind(0), join)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        split, join = ctx.dims
        # Through the function itself, so that it can be differentiated again.
        return _Exchange.apply(grads[0], ctx.group, join, split), None, None, None


# torch.compile does not trace collectives of process groups; what is around an exchange is compiled.
@torch.compiler.disable  # type: ignore[misc]
def exchange(x: torch.Tensor, group: Group, *, split: int, join: int) -> torch.Tensor:
    """Cut ``x`` along dim ``split``, one part a member; what the members sent, in their order along dim ``join``.

    Differentiable. Collective over ``group``, whose members give tensors of the same shape and dtype. Raises UsageError
    unless the group's size divides the dim.
    """
    if group.size == 1:
        return x
    if x.shape[split] % group.size:
        raise UsageError(
            f"dim {split} of a tensor of shape {tuple(x.shape)} is divided among {group.size} ranks",
            rank=group.ranks[group.rank],
            expected=f"a multiple of {group.size}",
            found=x.shape[split],
        )
    return _Exchange.apply(x, group, split, join)  # type: ignore[no-any-return]


@torch.compiler.disable  # type: ignore[misc]
def gather(x: torch.Tensor, group: Group, *, join: int = 1) -> torch.Tensor:
    """Every member's ``x`` (one shape, no gradient) in their order along dim ``join``."""
    if group.size == 1:
        return x
    x = x.contiguous()
    parts = x.new_empty((group.size, *x.shape))
    # Booleans travel as bytes: not every backend has them.
    send, receive = (t.view(torch.uint8) if t.dtype == torch.bool else t for t in (x, parts))
    all_gather(receive.view(-1), send.view(-1), group, label="ulysses")
    return torch.cat(parts.unbind(0), join)


@dataclass(frozen=True, slots=True)
class Heads:
    """How the heads of one attention are dealt out to ``ranks``, each as many query heads as any other.

    Head i of the queries uses head i // (queries // keys) of the keys and values (grouped queries). Key heads that
    cannot be cut so are repeated, as few times as it takes; query heads that do not divide are filled up with zeros,
    which attend to nothing and are cut off again: the slowest rank has no more heads than it must have::

        queries, keys, ranks      a rank computes         key heads travel
        8, 2, 4                   2 with 1 key head       twice each
        6, 6, 4                   2 with 2                once; 2 of 8 are filled up
    """

    queries: int
    keys: int
    ranks: int

    @property
    def local(self) -> int:
        """Query heads that each rank computes."""
        return in_lines(self.queries, self.ranks) // self.ranks

    @property
    def groups(self) -> int:
        """Query heads to one key head where they are computed."""
        return self.queries // (self.keys * self.repeats)

    @property
    def repeats(self) -> int:
        """How often a key head travels."""
        most = self.queries // self.keys
        if self.queries % self.ranks:
            return most
        return next(r for r in range(1, most + 1) if most % r == 0 and self.keys * r % self.ranks == 0)

    def spread(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Queries, keys or values with as many heads along ``dim`` as can be dealt out."""
        if x.shape[dim] == self.keys and self.repeats > 1:
            x = x.repeat_interleave(self.repeats, dim)
        missing = in_lines(x.shape[dim], self.ranks) - x.shape[dim]
        return pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing)) if missing else x

    def own(self, per_head: torch.Tensor, rank: int) -> torch.Tensor:
        """Of a tensor [queries, ...] the part of ``rank``, filled up with zeros."""
        return self.spread(per_head, 0)[rank * self.local : (rank + 1) * self.local]

    @classmethod
    def of(cls, query: torch.Tensor, key: torch.Tensor, dim: int, ranks: int) -> Heads:
        """Raises UsageError where the query heads are no multiple of the key heads."""
        queries, keys = query.shape[dim], key.shape[dim]
        if queries % keys:
            raise UsageError(
                f"attention with {queries} heads of queries and {keys} of keys",
                expected="as many heads of queries for each head of keys",
                fix=f"give tensors whose heads are dim {dim}",
            )
        return cls(queries, keys, ranks)
