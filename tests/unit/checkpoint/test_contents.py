"""Which rank writes what: at every stage and shape each file and each shard has one writer, and the whole is there."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch
from hypothesis import given
from hypothesis import strategies as st

from zeropipe.checkpoint.save.contents import collect
from zeropipe.checkpoint.save.files import FileRecord
from zeropipe.checkpoint.save.records import FP32, FlatState, Grid, LocalState, Manifest, ModelState, united
from zeropipe.layout.flat import FlatShards, TensorSpec

VALUES = torch.arange(6.0)


def rank_of(grid: Grid, stage: int, shards: int, dtype: str) -> LocalState:
    """What this rank holds of one parameter, one buffer, and, with pipelines, of a layer's file."""
    name = f"{grid.pp_rank}.w"
    layout = FlatShards((TensorSpec(name, (6,), "float32"),), shards)
    shard = grid.dp_rank % shards
    tensors = {FP32: torch.zeros(layout.shard_numel), "exp_avg": torch.zeros(layout.shard_numel)}
    flat = FlatState(
        "group0", layout, shard, tensors, {"step": 3}, 0, grid.dp_rank // shards, grid.dp_degree // shards
    )
    held = {} if stage == 3 else {name: VALUES}
    layers = ((grid.pp_rank, "w", name),) if grid.pp_degree > 1 and stage < 3 else ()
    model = ModelState(held | {"steps": VALUES[:1]}, {"steps": "buffer"}, layers=layers)
    return LocalState(grid, stage, dtype, model, (flat,), ({"lr": 1.0},), "Adam")


@given(
    st.integers(0, 3),
    st.sampled_from([(1, 1), (2, 2), (3, 3), (4, 2), (4, 1)]),  # data-parallel ranks, shards among them
    st.integers(1, 2),
    st.integers(1, 2),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_every_file_and_shard_has_one_writer(
    stage: int, spread: tuple[int, int], tp: int, pp: int, dtype: str
) -> None:
    dp, shards = spread if stage else (spread[0], 1)
    parts: list[Manifest] = []
    written: dict[str, int] = {}
    for rank, (pp_rank, dp_rank, tp_rank) in enumerate(product(range(pp), range(dp), range(tp))):
        grid = Grid(rank, dp * tp * pp, dp_rank, dp, tp_rank, tp, pp_rank, pp)
        outgoing = collect(rank_of(grid, stage, shards, dtype), "a", copy=False)
        assert not outgoing.trees.keys() & written.keys()
        written |= dict.fromkeys(outgoing.trees, rank)
        assert outgoing.part.rank_files[0] in outgoing.trees  # each rank's own state has a place
        files = tuple(FileRecord(name, 1, "crc32:00000000") for name in outgoing.trees)
        parts.append(replace(outgoing.part, files=files))
    whole = united(parts)  # raises where a shard has no file
    assert [record.name for record in whole.files] == list(written)
    assert {file for flat in whole.flats for file in flat.files} <= written.keys()
    assert {entry.file for entry in whole.module} <= written.keys()
    by_layer = {f"layer_{p:02d}-model_{t:02d}-model_states.pt" for p in range(pp) for t in range(tp)}
    assert {f for f in written if f.startswith("layer_")} == (by_layer if pp > 1 and stage < 3 else set())
    names = {(entry.mp_rank, entry.name) for entry in whole.module}
    lead = {p * tp + t for p in range(pp) for t in range(tp)}
    assert {mp for mp, name in names if name == "steps"} == lead
    assert len(whole.flats) == tp * pp
