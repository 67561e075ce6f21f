"""The 2-D and 3-D reshape tools: who takes whose state; merging; ZeRO files seen at other degrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zeropipe.checkpoint as ckpt
from zeropipe.checkpoint.reshape_utils import get_files, partition_data
from zeropipe.checkpoint.universal_checkpoint import (
    Joining,
    Rule,
    SubparamShape,
    as_info,
    join,
    joining_of,
    split,
)
from zeropipe.errors import CheckpointError

# What DeepSpeed 0.19.8 answers, by running it.
KNOWN_2D = [
    ((2, 2, 1, 2), [[0, 2], [1, 3]]),
    ((2, 2, 2, 1), [[0, 1], [2, 3]]),
    ((4, 2, 2, 2), [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ((2, 4, 1, 4), [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ((2, 4, 1, 2), [[0, 1, 4, 5], [2, 3, 6, 7]]),
]
KNOWN_3D = [
    ((2, 2, 2), (1, 2, 1), [[0, 4, 2, 6], [1, 5, 3, 7]]),
    ((2, 2, 2), (2, 1, 1), [[0, 4, 1, 5], [2, 6, 3, 7]]),
    ((1, 1, 4), (1, 1, 2), [[0, 1], [2, 3]]),
    ((2, 2, 4), (1, 1, 2), [[0, 4, 8, 12, 1, 5, 9, 13], [2, 6, 10, 14, 3, 7, 11, 15]]),
]
degrees = st.sampled_from([1, 2, 3, 4, 6])


@pytest.mark.parametrize(("shape", "expected"), KNOWN_2D)
def test_2d_maps_are_those_that_users_know(shape: Any, expected: Any) -> None:
    found = ckpt.reshape_meg_2d_parallel(*shape)
    cells = [(pp, tp) for pp in range(shape[2]) for tp in range(shape[3])]
    assert [found.get_data(pp, tp) for pp, tp in cells] == expected


@pytest.mark.parametrize(("source", "target", "expected"), KNOWN_3D)
def test_3d_maps_are_those_that_users_know(source: Any, target: Any, expected: Any) -> None:
    maps = ckpt.model_3d_desc(*source).reshape(ckpt.model_3d_desc(*target))
    found = [m.get_data(pp, tp) for m in maps for pp in range(target[0]) for tp in range(target[1])]
    assert found == expected


@given(degrees, degrees, degrees, degrees)
def test_down_every_old_rank_is_taken_once_up_every_one_is_taken(a: int, b: int, c: int, d: int) -> None:
    if (a % c and c % a) or (b % d and d % b):
        with pytest.raises(CheckpointError, match="cannot be reshaped"):
            ckpt.reshape_meg_2d_parallel(a, b, c, d)
        return
    taken = ckpt.reshape_meg_2d_parallel(a, b, c, d).get_data()
    assert set(taken) == set(range(a * b))
    if c <= a and d <= b:
        assert len(taken) == a * b


@given(st.integers(1, 6), st.integers(1, 8))
def test_any_data_degree_is_reached(old: int, new: int) -> None:
    maps = ckpt.model_3d_desc(1, 1, old).reshape(ckpt.model_3d_desc(1, 1, new))
    assert len(maps) == new
    assert {rank for m in maps for rank in m.get_data(0, 0)} == set(range(old))


def test_indices_are_checked() -> None:
    desc = ckpt.model_3d_desc(2, 2, 2)
    assert desc.is_valid(1, 1, 1) == (True, [])
    assert desc.is_valid(0, 0, 5) == (False, ["DP indexing error: index 5 >= degree 2"])
    assert desc.world_size() == 8 and desc.get_desc() == "PP,TP,DP = (2, 2, 2)"
    assert desc.can_reshape(ckpt.model_3d_desc(3, 2, 2))[0] is False
    with pytest.raises(CheckpointError, match="index into a 2-D map"):
        ckpt.reshape_meg_2d_parallel(1, 1, 1, 1).get_data(1, 0)


def test_merge_state_joins_through_containers() -> None:
    a = {"a": torch.ones(2), "b": [torch.ones(1, 3), {"c": torch.ones(2)}], "s": 3, "step": torch.tensor(5.0)}
    b = {
        "a": torch.zeros(3),
        "b": [torch.ones(2, 3), {"c": torch.ones(1)}],
        "s": 4,
        "step": torch.tensor(5.0),
    }
    merged = ckpt.merge_state(a, b)
    assert merged["a"].tolist() == [1, 1, 0, 0, 0]
    assert merged["b"][0].shape == (3, 3) and merged["b"][1]["c"].shape == (3,)
    assert merged["s"] == 3 and merged["step"] == 5


@pytest.mark.parametrize(
    ("a", "b"),
    [({"x": {"y": [1]}}, {"x": {"y": [1, 2]}}), ({"x": {"y": 1}}, {"x": {"y": torch.ones(1)}})],
)
def test_merge_errors_carry_the_path(a: Any, b: Any) -> None:
    with pytest.raises(CheckpointError, match="x -> y"):
        ckpt.merge_state(a, b)


def test_names_of_files() -> None:
    assert ckpt.get_model_ckpt_name_for_rank("f", "01") == "f/mp_rank_01_model_states.pt"
    assert ckpt.get_zero_ckpt_name_for_rank("f", 1, 2) == "f/zero_pp_rank_1_mp_rank_02_optim_states.pt"
    assert ckpt.get_layer_ckpt_name_for_rank("f", "layer_03", 1) == "f/layer_03-model_01_model_states.pt"
    assert ckpt.ZERO_FILE_PREFIX == "zero_pp_rank_"


def test_files_come_in_natural_order_and_data_in_even_runs(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        (tmp_path / f"f{number}").touch()
    assert [Path(f).name for f in get_files(str(tmp_path))] == ["f1", "f2", "f10"]
    assert partition_data([1, 2, 3, 4], 2) == [[1, 2], [3, 4]]
    with pytest.raises(CheckpointError):
        partition_data([1, 2, 3], 2)


def zero_files(folder: Path, dp: int, total: int) -> torch.Tensor:
    """Stage 1 files of ``dp`` ranks as DeepSpeed writes them: lean masters, padded moments."""
    values = torch.arange(float(total))
    size = -(-total // (2 * dp)) * 2
    for rank in range(dp):
        part = values[rank * size : (rank + 1) * size]
        moment = torch.zeros(size)
        moment[: part.numel()] = part + 1000
        torch.save(
            {
                "optimizer_state_dict": {
                    "base_optimizer_state": {
                        "state": {0: {"step": torch.tensor(3.0), "exp_avg": moment}},
                        "param_groups": [{"lr": 1.0, "params": [0]}],
                    },
                    "single_partition_of_fp32_groups": [part.clone()],
                    "zero_stage": 1,
                    "group_paddings": [size - part.numel()],
                    "partition_count": [dp],
                }
            },
            folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
    torch.save(
        {"checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1}},
        folder / "mp_rank_00_model_states.pt",
    )
    return values


@settings(max_examples=25)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 40))
def test_zero_files_are_cut_anew_for_any_data_degree(
    tmp_path_factory: Any, dp: int, new: int, total: int
) -> None:
    folder = tmp_path_factory.mktemp("zero")
    values = zero_files(folder, dp, total)
    checkpoint = ckpt.ZeROCheckpoint(str(folder))
    assert checkpoint.get_src_dp_degree() == dp and checkpoint.get_src_world_size() == dp
    checkpoint.reshape(ckpt.model_3d_desc(1, 1, new))
    states = [checkpoint.get_state_for_rank(0, 0, d)["optimizer_state_dict"] for d in range(new)]
    masters = torch.cat([s["single_partition_of_fp32_groups"][0] for s in states])
    moments = torch.cat([s["base_optimizer_state"]["state"][0]["exp_avg"] for s in states])
    assert torch.equal(masters, values) and torch.equal(moments, values + 1000)
    assert all(s["partition_count"] == [new] for s in states)


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no ZeRO files"):
        ckpt.ZeROCheckpoint(str(tmp_path))
    zero_files(tmp_path, 2, 10)
    with pytest.raises(CheckpointError, match="one optimizer file per rank"):
        ckpt.ZeROCheckpoint(str(tmp_path), ckpt.model_3d_desc(1, 1, 3))


# Universal patterns.

rules = st.sampled_from(
    [
        Joining(),
        Joining(dim=1),
        Joining(Rule.REPLICATED),
        Joining(fused=(4, 8)),
        Joining(dim=1, fused=(8, 4)),
        Joining(fused=2),
        Joining(fused=3),
        Joining(vocabulary=12),
    ]
)


@given(rules, st.sampled_from([1, 2, 4]))
def test_join_undoes_split(how: Joining, count: int) -> None:
    whole = torch.arange(144.0).view(12, 12)
    slices = [split(whole, how, rank, count) for rank in range(count)]
    assert torch.equal(join(slices, how), whole)
    shapes = [torch.empty(part.shape, device="meta") for part in slices]
    assert join(shapes, how).shape == whole.shape


@given(rules)
def test_all_that_says_how_a_parameter_is_joined_says_the_same(how: Joining) -> None:
    """Patterns of a model, and the words in a universal parameter's file, which cannot say sizes or three halves."""
    if how.fused != 3:
        assert joining_of("a.b", as_info([("a.c", Joining(dim=1)), ("a.b", how)])) == how
    if isinstance(how.fused, int):
        assert Joining.said({"param": torch.zeros(12, 12)} | how.words()) == how


def test_an_object_of_sizes_in_a_universal_file_is_a_rule_like_any_other() -> None:
    """A folder read as a whole took such a parameter for one that every rank has whole."""
    held = {"param": torch.zeros(6, 2), "sub_param_shape": SubparamShape(["qkv"], ((4, 2), 2), 0)}
    assert (
        Joining.said(held)
        == joining_of("qkv", as_info([("qkv", Joining.said(held))]))
        == Joining(fused=(4, 2))
    )


@pytest.mark.parametrize("shape", [(), (4,)])
def test_what_lacks_the_dim_is_whole_on_every_rank(shape: tuple[int, ...]) -> None:
    info = {"parameter_with_row_parallelism_patterns": [".*"]}
    assert joining_of("bias", info, shape).rule is Rule.REPLICATED
    assert joining_of("weight", info, (4, 4)) == Joining(dim=1)


def test_uneven_shard_widths_are_those_that_are_given() -> None:
    entry = {"patterns": [".*qkv"], "shape": ((6, 3, 3), 2), "partition_dim": 0}
    entry["sub_param_shard_widths"] = [[4, 2], [1, 2], [1, 2]]
    how = joining_of("layer.qkv", {"parameter_with_sub_params": [entry]})
    whole = torch.arange(24.0).view(12, 2)
    parts = [split(whole, how, rank, 2) for rank in range(2)]
    assert [len(part) for part in parts] == [6, 6]
    assert torch.equal(parts[0], whole[[0, 1, 2, 3, 6, 9]])
    assert torch.equal(join(parts, how), whole)
    thirds = [split(whole, how, rank, 3) for rank in range(3)]  # another number of ranks: evenly
    assert [len(part) for part in thirds] == [4, 4, 4] and torch.equal(join(thirds, how), whole)


def test_vocabulary_padding_goes_and_comes_back() -> None:
    whole = torch.arange(10.0).view(5, 2)
    how = Joining(vocabulary=5)
    parts = [split(whole, how, rank, 4) for rank in range(4)]
    assert [tuple(p.shape) for p in parts] == [(2, 2)] * 4 and parts[3].sum() == 0
    assert torch.equal(join(parts, how), whole)


def test_patterns_choose_the_rule() -> None:
    info = {
        "tp_replicated_parameter_patterns": [r".*norm.*"],
        "parameter_to_average_patterns": [r".*router.*"],
        "parameter_with_row_parallelism_patterns": [r".*down\.weight"],
        "vocabulary_parameter_patterns": [r"embed.*"],
        "original_vocab_size": 5,
        "parameter_with_2_sub_params_cat_dim_0": [r".*glu.*"],
        "parameter_with_sub_params": [
            {"patterns": [r".*qkv.*"], "shape": ((8, 4, 4), 6), "partition_dim": 0}
        ],
    }
    assert joining_of("a.norm.w", info).rule is Rule.REPLICATED
    assert joining_of("router.w", info).rule is Rule.AVERAGE
    assert joining_of("x.down.weight", info).dim == 1
    assert joining_of("embed.w", info).vocabulary == 5
    assert joining_of("x.glu", info).fused == 2
    assert joining_of("x.qkv", info) == Joining(fused=(8, 4, 4))
    assert joining_of("other", info) == Joining()
    assert SubparamShape(["a"], ((1, 2), 3), 0) == SubparamShape(["a"], ((1, 2), 3), 0)


def test_replicas_that_differ_are_refused_and_averages_are_averaged() -> None:
    parts = [torch.zeros(2), torch.ones(2)]
    with pytest.raises(CheckpointError, match="differs on tensor-parallel rank 1"):
        join(parts, Joining(Rule.REPLICATED))
    assert join(parts, Joining(Rule.AVERAGE)).tolist() == [0.5, 0.5]
