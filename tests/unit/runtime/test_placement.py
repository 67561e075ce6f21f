"""A rank's place, asked of whatever a user calls ``mpu``: the names of its methods differ, the place does not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zeropipe.comm.group import SELF
from zeropipe.runtime.engine.dtypes import dtype_of
from zeropipe.runtime.engine.placement import grid_of, model_parts


def mpu(**answers: int) -> Any:
    return SimpleNamespace(**{name: lambda answer=answer: answer for name, answer in answers.items()})


@given(pp=st.integers(1, 4), tp=st.integers(1, 4), data=st.data())
def test_every_dialect_gives_the_same_place(pp: int, tp: int, data: st.DataObject) -> None:
    stage, piece = data.draw(st.integers(0, pp - 1)), data.draw(st.integers(0, tp - 1))
    ours = mpu(
        get_pipe_parallel_world_size=pp,
        get_pipe_parallel_rank=stage,
        get_slice_parallel_world_size=tp,
        get_slice_parallel_rank=piece,
    )
    megatron = mpu(
        get_pipeline_model_parallel_world_size=pp,
        get_pipeline_model_parallel_rank=stage,
        get_tensor_model_parallel_world_size=tp,
        get_tensor_model_parallel_rank=piece,
    )
    # Stages and slices counted together, the slices of a stage next to each other.
    together = mpu(
        get_pipe_parallel_world_size=pp,
        get_pipe_parallel_rank=stage,
        get_model_parallel_world_size=pp * tp,
        get_model_parallel_rank=stage * tp + piece,
    )
    places = [grid_of(SELF, one) for one in (ours, megatron, together)]
    assert places[0] == places[1] == places[2]
    assert (places[0].pp_degree, places[0].pp_rank) == (pp, stage)
    assert (places[0].tp_degree, places[0].tp_rank) == (tp, piece)


def test_without_model_parallelism_a_rank_is_its_place_in_the_data() -> None:
    grid = grid_of(SELF, None)
    assert (grid.rank, grid.world, grid.dp_rank, grid.dp_degree) == (0, 1, 0, 1)
    assert (grid.tp_degree, grid.pp_degree) == (1, 1)


def test_one_that_divides_only_data_has_no_other_parts() -> None:
    assert model_parts(torch.nn.Linear(1, 1), mpu()) == (SELF, None)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16), (None, None)],
)
def test_a_dtype_by_its_name(name: str | None, dtype: torch.dtype | None) -> None:
    assert dtype_of(name) is dtype
