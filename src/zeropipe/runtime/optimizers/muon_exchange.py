"""One round of Muon's exchange: pieces of cut matrices to their owners, the orthogonalised pieces back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from zeropipe.comm import collectives
from zeropipe.comm.collectives import Work
from zeropipe.comm.group import Group
from zeropipe.layout.flat import Piece
from zeropipe.runtime.optimizers.muon_kernel import NS_DTYPE, MatrixSlot
from zeropipe.runtime.optimizers.muon_plan import CutMatrix

_TO_OWNER, _BACK = 1, 2  # message tags, so that the two phases never match each other


def exchange_round(
    slots: Sequence[MatrixSlot], cuts: Sequence[CutMatrix], group: Group
) -> Callable[[], None]:
    """Start sending the pieces of ``cuts``; the function that is returned finishes the round.

    Every member of the group calls both, with the same ``cuts``. A member that holds no piece of them does
    nothing. Messages are posted in the plan's order; see muon_plan for why that cannot deadlock.
    """
    me = group.rank
    mine = [(cut, piece) for cut in cuts if (piece := cut.piece_of(me)) is not None]
    buffers: list[torch.Tensor] = []  # per cut of mine: the whole direction if owned, else this rank's piece
    works: list[list[Work]] = []
    for cut, piece in mine:
        own = slots[cut.slot].direction(_run(piece))
        if cut.owner != me:
            buffers.append(own)
            works.append([_send(own, cut.owner, group, _TO_OWNER)])
            continue
        matrix = torch.empty(cut.numel, dtype=NS_DTYPE, device=own.device)
        _part(matrix, piece).copy_(own)
        buffers.append(matrix)
        others = [other for other in cut.pieces if other.shard != me]
        works.append([_recv(_part(matrix, other), other.shard, group, _TO_OWNER) for other in others])

    def finish() -> None:
        returns: list[Work | None] = []
        sent: list[Work] = []
        kept: list[torch.Tensor] = []  # results must outlive their sends
        for (cut, piece), buffer, pending in zip(mine, buffers, works, strict=True):
            for work in pending:
                work.wait()
            if cut.owner != me:
                returns.append(_recv(buffer, cut.owner, group, _BACK))
                continue
            slot = slots[cut.slot]
            result = slot.orthogonal(cut.tensor, buffer)
            kept.append(result)
            sent += [
                _send(_part(result, other), other.shard, group, _BACK)
                for other in cut.pieces
                if other.shard != me
            ]
            slot.apply(cut.tensor, _run(piece), _part(result, piece))
            returns.append(None)
        for (cut, piece), buffer, back in zip(mine, buffers, returns, strict=True):
            if back is not None:
                back.wait()
                slots[cut.slot].apply(cut.tensor, _run(piece), buffer)
        for work in sent:
            work.wait()

    return finish


def _run(piece: Piece) -> slice:
    return slice(piece.offset, piece.offset + piece.numel)


def _part(whole: torch.Tensor, piece: Piece) -> torch.Tensor:
    return whole[piece.start : piece.start + piece.numel]


def _send(tensor: torch.Tensor, member: int, group: Group, tag: int) -> Work:
    return collectives.send(tensor, member, group, tag=tag, label="muon", async_op=True)


def _recv(tensor: torch.Tensor, member: int, group: Group, tag: int) -> Work:
    return collectives.recv(tensor, member, group, tag=tag, label="muon", async_op=True)
