"""Attention over the whole sequence, on the ranks that share it, around any attention that knows nothing of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zeropipe.comm.group import Group, from_process_group
from zeropipe.errors import UsageError
from zeropipe.given import Anything, ProcessGroup
from zeropipe.runtime.sequence_parallel.exchange import Heads, exchange


class DistributedAttention(torch.nn.Module):
    """``local_attention`` on all tokens and a part of the heads, between two exchanges.

    Args:
        local_attention: called as ``(query, key, value, *args, **kwargs)`` with the whole sequence and this rank's
            heads; returns tokens and heads in the dims in which the query has them (dims may follow, or be joined with
            that of the heads).
        sequence_process_group: the ranks that share a sequence.
        scatter_idx: the dim of the heads.
        gather_idx: the dim of the tokens, where ``forward`` is not told ``batch_dim_idx``.
        sp_stream: taken and not used: exchanges of one attention follow one another.

    Fewer key heads than ranks, and heads that the ranks do not divide, are handled (see ``Heads``).
    """

    def __init__(
        self,
        local_attention: Callable[..., Any],
        sequence_process_group: ProcessGroup,
        scatter_idx: int = 2,
        gather_idx: int = 0,
        sp_stream: Anything = None,
    ) -> None:
        super().__init__()
        self.local_attn = local_attention
        self.spg = sequence_process_group
        self.scatter_idx, self.gather_idx = scatter_idx, gather_idx

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        batch_dim_idx: int | None = None,
        *args: Any,
        rotary_pos_emb: Anything = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """``query``, ``key``, ``value``: this rank's tokens with all heads, e.g. [tokens / n, batch, heads, dim].

        ``batch_dim_idx``: 0 for [batch, tokens / n, heads, dim], 1 for [tokens / n, batch, heads, dim]. Returns this
        rank's tokens with all heads. Collective. Raises UsageError for ``rotary_pos_emb``, and for key heads that do
        not divide the query heads.
        """
        if rotary_pos_emb is not None:
            raise UsageError(
                "DistributedAttention: rotary_pos_emb is not applied here",
                fix="turn queries and keys before the call, by the tokens' places in the whole sequence",
            )
        group = self.spg if isinstance(self.spg, Group) else from_process_group(self.spg)
        heads = self.scatter_idx
        tokens = self.gather_idx if batch_dim_idx is None else 1 - batch_dim_idx
        plan = Heads.of(query, key, heads, group.size)
        whole = [
            exchange(plan.spread(x, heads), group, split=heads, join=tokens) for x in (query, key, value)
        ]
        found = exchange(self.local_attn(*whole, *args, **kwargs), group, split=tokens, join=heads)
        # Where heads and their dim are joined a head is a run of the dim.
        filled = plan.local * group.size
        return found.narrow(heads, 0, found.shape[heads] // filled * plan.queries)
