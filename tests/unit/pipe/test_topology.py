"""Ranks on the grid: facts that launch scripts and checkpoints of users depend on."""

import pytest

from zeropipe.errors import UsageError
from zeropipe.runtime.pipe.topology import (
    PipeDataParallelTopology,
    PipeModelDataParallelTopology,
    ProcessTopology,
)


def test_the_first_axis_varies_slowest():
    grid = ProcessTopology(axes=["row", "col"], dims=[2, 2])
    assert [grid.get_rank(row=r, col=c) for r in (0, 1) for c in (0, 1)] == [0, 1, 2, 3]
    assert grid.get_axis_list("row", 0) == [0, 1]
    assert grid.get_axis_list("col", 1) == [1, 3]


def test_pipe_data_model_order():
    grid = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=2)
    assert grid.get_axis_names() == ["pipe", "data", "model"]
    assert grid.get_axis_comm_lists("pipe") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert grid.get_axis_comm_lists("data") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert grid.get_axis_comm_lists("model") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert grid.get_axis_comm_lists("expert") == []
    assert grid.get_rank_repr(rank=5) == "model_01"
    assert grid.get_rank_repr(rank=5, omit_axes=["data"], outer_sep="|") == "pipe_01|model_01"


def test_pipe_data_has_no_name_for_a_rank_of_one_part():
    assert PipeDataParallelTopology(2, 2).get_rank_repr(rank=3) == ""


@pytest.mark.parametrize("dims", [(1, 1, 1), (2, 3, 4), (3, 1, 2)])
def test_rank_and_coordinate_are_inverse(dims):
    grid = ProcessTopology(["a", "b", "c"], list(dims))
    assert grid.world_size() == dims[0] * dims[1] * dims[2]
    for rank in range(grid.world_size()):
        assert grid.get_rank(**grid.get_coord(rank)._asdict()) == rank
    for axis in "abc":
        lists = grid.get_axis_comm_lists(axis)
        assert sorted(rank for ranks in lists for rank in ranks) == list(range(grid.world_size()))
    assert grid.get_dim("a") == dims[0]
    assert grid.get_dim("z") == 0


def test_filter_match():
    grid = ProcessTopology(["pipe", "data", "model"], [2, 2, 2])
    assert grid.filter_match(pipe=0, data=1) == [2, 3]
    assert grid.filter_match() == list(range(8))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda g: g.get_rank(pipe=0), ["every axis", "filter_match"]),
        (lambda g: g.get_rank(pipe=0, data=5), ["no such place", "data=5"]),
        (lambda g: g.get_coord(9), ["0 to 3", "found 9"]),
        (lambda g: g.filter_match(model=0), ["no such axis", "model"]),
        (lambda g: ProcessTopology(["a"], [1, 2]), ["one size"]),
        (lambda g: ProcessTopology(["a", "a"], [1, 2]), ["distinct"]),
        (lambda g: ProcessTopology(["a"], [0]), ["at least 1"]),
    ],
)
def test_mistakes(call, words):
    with pytest.raises(UsageError) as caught:
        call(PipeDataParallelTopology(2, 2))
    for word in words:
        assert word in str(caught.value)
