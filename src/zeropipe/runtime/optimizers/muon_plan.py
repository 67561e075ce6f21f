"""Who orthogonalises which matrix, and in which rounds: pure integers, the same on every rank.

    shards      |      0      |      1      |      2      |
    matrices    |--a--|----b----|-----c-----|---d---|
                       b: 0 and 1 hold it    c: 1 and 2 hold it

A matrix inside one shard needs nobody else. A cut one goes to the holder with most of it, or, among equals, to
the one with the least to do so far. In each round every holder first sends its pieces, then gets the result's
pieces back; both phases go through the matrices, and the holders of each, in this plan's order. As that order
is total and shared, the exchange cannot deadlock, even where a backend runs one message at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from zeropipe.layout.flat import FlatShards, Piece

MAX_OWNED = 2**26  # elements that one rank gathers in one round: bounds memory, 128 MiB in bf16


@dataclass(frozen=True, slots=True)
class CutMatrix:
    """A matrix whose pieces lie in several shards."""

    slot: int  # index into the layouts that the plan was made for
    tensor: int  # index into that layout's tensors
    owner: int  # the shard that orthogonalises it
    pieces: tuple[Piece, ...]  # at most one per shard

    @property
    def numel(self) -> int:
        return sum(piece.numel for piece in self.pieces)

    def piece_of(self, shard: int) -> Piece | None:
        return next((piece for piece in self.pieces if piece.shard == shard), None)


def plan_rounds(
    layouts: Sequence[FlatShards], matrices: Sequence[Iterable[int]], max_owned: int = MAX_OWNED
) -> tuple[tuple[CutMatrix, ...], ...]:
    """The cut matrices of ``layouts`` (``matrices``: the tensors of each that are matrices), in rounds.

    A round ends before any owner would gather more than ``max_owned`` elements in it; a single larger matrix
    has a round to itself there.
    """
    work: dict[int, int] = {}  # shard -> elements to orthogonalise, of all rounds
    load: dict[int, int] = {}  # shard -> elements, of this round
    rounds: list[list[CutMatrix]] = [[]]
    for slot, (layout, tensors) in enumerate(zip(layouts, matrices, strict=True)):
        for tensor in tensors:
            pieces = layout.tensor_pieces(tensor)
            if len(pieces) < 2:
                continue
            most = max(piece.numel for piece in pieces)
            owner = min(
                (p.shard for p in pieces if p.numel == most), key=lambda shard: (work.get(shard, 0), shard)
            )
            cut = CutMatrix(slot, tensor, owner, pieces)
            if load.get(owner, 0) and load[owner] + cut.numel > max_owned:
                rounds.append([])
                load = {}
            rounds[-1].append(cut)
            load[owner] = load.get(owner, 0) + cut.numel
            work[owner] = work.get(owner, 0) + cut.numel
    return tuple(tuple(cuts) for cuts in rounds if cuts)


def is_matrix(shape: Sequence[int], use_muon: bool | None) -> bool:
    """Whether Muon orthogonalises a tensor of this shape; ``use_muon`` None decides by the number of dims."""
    return use_muon is not False and len(shape) >= 2


def merged_runs(pieces: Iterable[Piece], matrices: frozenset[int]) -> tuple[list[slice], list[slice]]:
    """The runs of a shard that hold matrices, and those that hold the rest, neighbours merged."""
    runs: tuple[list[slice], list[slice]] = ([], [])
    for other, kin in groupby(pieces, key=lambda piece: piece.tensor not in matrices):
        together = list(kin)
        last = together[-1]
        runs[other].append(slice(together[0].offset, last.offset + last.numel))
    return runs
