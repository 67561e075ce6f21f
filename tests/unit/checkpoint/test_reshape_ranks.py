"""Layer files at larger and smaller degrees: every new rank gets its own part of each tensor, or an error names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from zeropipe.checkpoint import DeepSpeedCheckpoint, ZeROCheckpoint, get_model_3d_descriptor, model_3d_desc
from zeropipe.checkpoint.convert import convert
from zeropipe.checkpoint.loader import open_source
from zeropipe.checkpoint.save.files import load_torch, write_torch
from zeropipe.checkpoint.save.records import FlatState, Grid, LocalState, ModelState
from zeropipe.checkpoint.save.saver import Saver
from zeropipe.comm.group import SELF
from zeropipe.errors import CheckpointError
from zeropipe.layout.flat import flat_shards

# Name -> (shape of the whole, dim that is cut; None: whole on each rank), as Megatron has them.
LAYER = {
    "input_layernorm.weight": ((6,), None),
    "self_attention.query_key_value.weight": ((24, 6), 0),
    "self_attention.query_key_value.bias": ((24,), 0),
    "self_attention.dense.weight": ((6, 24), 1),
    "self_attention.dense.bias": ((6,), None),
    "mlp.dense_h_to_4h.weight": ((24, 6), 0),
    "mlp.dense_4h_to_h.weight": ((6, 24), 1),
    "own.weight": ((24, 5), 0),
}
EMBEDDING = {"word_embeddings.weight": ((24, 6), 0)}
NORM = {"weight": ((6,), None)}


def whole(layer: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    seed = torch.Generator().manual_seed(1000 * layer + len(name))
    return torch.randn(shape, generator=seed)


def part(layer: int, name: str, shape: tuple[int, ...], dim: int | None, tp: int, rank: int) -> torch.Tensor:
    value = whole(layer, name, shape)
    return value if dim is None else value.chunk(tp, dim)[rank].clone()


def write_layers(folder: Path, tp: int, rules: dict[str, Any] | None = None, layers: int = 4) -> None:
    for rank in range(tp):
        tree: dict[str, Any] = {
            "module": None,
            "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": tp},
        }
        if rules is not None:
            tree["universal_checkpoint_info"] = rules
        torch.save(tree, folder / f"mp_rank_{rank:02d}_model_states.pt")
        tables = [EMBEDDING, *[LAYER] * layers, NORM]
        for number, table in enumerate(tables):
            state = {n: part(number, n, shape, dim, tp, rank) for n, (shape, dim) in table.items()}
            torch.save(state, folder / f"layer_{number:02d}-model_{rank:02d}-model_states.pt")


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("saved", [2, 6])
def test_each_rank_gets_its_part_of_every_tensor(tmp_path: Path, saved: int, tp: int) -> None:
    """At a larger tensor-parallel degree every new rank got the whole old slice."""
    write_layers(tmp_path, saved)
    if tp % saved and saved % tp:
        with pytest.raises(CheckpointError, match="Uneven"):
            DeepSpeedCheckpoint(str(tmp_path), tp_degree=tp)
        return
    found = DeepSpeedCheckpoint(str(tmp_path), tp_degree=tp)
    for rank in range(tp):
        states = [found.get_embedding_state(rank), *found.get_transformer_state(rank, 0)]
        for number, (state, table) in enumerate(zip(states, [EMBEDDING, *[LAYER] * 4], strict=True)):
            assert state.keys() == table.keys()
            for name, (shape, dim) in table.items():
                assert torch.equal(state[name], part(number, name, shape, dim, tp, rank)), name
        assert torch.equal(found.get_final_norm_state(rank)["weight"], whole(5, "weight", (6,)))


def test_the_checkpoints_own_rules_come_first(tmp_path: Path) -> None:
    """Two fused halves, each cut: neither Megatron's names nor dim 0 end to end give the right parts."""
    first, second = torch.arange(8.0), torch.arange(8.0) + 100
    rules = {
        "parameter_with_2_sub_params_cat_dim_0": [r".*fused$"],
        "tp_replicated_parameter_patterns": [".*scale$"],
    }
    for rank in range(2):
        tree = {"module": None, "universal_checkpoint_info": rules}
        tree["checkpoint_parallel_dimensions"] = {"pp_degree": 1, "tp_degree": 2}
        torch.save(tree, tmp_path / f"mp_rank_{rank:02d}_model_states.pt")
        own = torch.cat([first.chunk(2)[rank], second.chunk(2)[rank]])
        for layer in range(3):
            torch.save(
                {"fused": own, "scale": torch.ones(3)},
                tmp_path / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt",
            )
    for tp in (1, 2, 4, 8):
        found = DeepSpeedCheckpoint(str(tmp_path), tp_degree=tp)
        for rank in range(tp):
            (state,) = found.get_transformer_state(rank, 0)
            assert torch.equal(state["fused"], torch.cat([first.chunk(tp)[rank], second.chunk(tp)[rank]]))
            assert torch.equal(state["scale"], torch.ones(3))


@pytest.mark.parametrize(
    ("name", "slices"),
    [
        ("mlp.act.weight", [torch.zeros(4)] * 2),  # copies, or slices that are equal still
        ("own.weight", [torch.ones(3, 2), torch.zeros(3, 2)]),  # 3 rows do not make two
        ("self_attention.dense.weight", [torch.ones(2, 3), torch.zeros(2, 3)]),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(tmp_path: Path, name: str, slices: list[torch.Tensor]) -> None:
    for rank in range(2):
        tree = {"module": None, "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 2}}
        torch.save(tree, tmp_path / f"mp_rank_{rank:02d}_model_states.pt")
        for layer in range(3):
            file = tmp_path / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt"
            torch.save({name: slices[rank].clone()}, file)
    with pytest.raises(CheckpointError, match=f"1.{name}"):
        DeepSpeedCheckpoint(str(tmp_path), tp_degree=4).get_transformer_state(1, 0)


@pytest.mark.parametrize("dp", [1, 2])
def test_pipeline_stages_of_ours_become_one(tmp_path: Path, dp: int) -> None:
    """Our files name their tensors, each stage its own; joining them ended in `keys that only one of them has`."""
    for stage in range(2):
        names = [(f"{2 * stage + i}.weight", (3, 2), "float32") for i in range(2)]
        layout = flat_shards(names, 1)
        values = torch.arange(float(layout.shard_numel)) + 1000 * stage
        tensors = {"fp32": values, "exp_avg": values + 100, "exp_avg_sq": values + 200}
        model = ModelState({n: values[:6].view(3, 2) for n, _, _ in names})
        flat = FlatState("group0", layout, 0, tensors, {"step": 5})
        groups = ({"lr": 0.1, "param_names": [n for n, _, _ in names]},)
        state = LocalState(Grid(), 1, "float32", model, (flat,), groups, "Adam")
        Saver(SELF).save(tmp_path / f"stage{stage}", "t", state)
        one = tmp_path / f"c{stage}"
        convert(open_source(tmp_path / f"stage{stage}"), one, stage=1, dp=dp)
        for path in (one / "t").glob("*.pt"):
            tree = load_torch(path)
            if "checkpoint_parallel_dimensions" in tree:
                tree["checkpoint_parallel_dimensions"] = {"pp_degree": 2, "tp_degree": 1}
            (tmp_path / "both").mkdir(exist_ok=True)
            write_torch(tmp_path / "both" / path.name.replace("mp_rank_00", f"mp_rank_{stage:02d}"), tree)
    both = str(tmp_path / "both")
    assert get_model_3d_descriptor(both) == model_3d_desc(2, 1, dp)
    found = DeepSpeedCheckpoint(both, pp_degree=1, dp_degree=1)
    model = found.get_2d_parallel_state(0, 0)
    assert [*model["param_shapes"][0]] == [f"{i}.weight" for i in range(4)]
    assert [*model["module"]] == [f"{i}.weight" for i in range(4)]
    zero = ZeROCheckpoint(both)
    zero.reshape(model_3d_desc(1, 1, dp))
    for rank in range(dp):
        state = zero.get_state_for_rank(0, 0, rank)["optimizer_state_dict"]
        flat = state["single_partition_of_fp32_groups"][0]
        for name, at in state["param_slice_mappings"][0].items():
            stage, index = divmod(int(name[0]), 2)
            run = flat[at.start : at.start + at.numel]
            first = int(run[0]) if at.numel else 0
            assert 1000 * stage + 6 * index <= first < 1000 * stage + 6 * (index + 1)
            moment = state["base_optimizer_state"]["state"][0]["exp_avg"][at.start : at.start + at.numel]
            assert torch.equal(run + 100, moment)
        assert sum(at.numel for at in state["param_slice_mappings"][0].values()) == 24 // dp
    with pytest.raises(CheckpointError, match=r"optimizer state of 0\.weight"):
        DeepSpeedCheckpoint(both, pp_degree=4).get_zero_checkpoint_state(0, 0, 0)
    with pytest.raises(CheckpointError, match=r"optimizer state of 0\.weight"):
        DeepSpeedCheckpoint(both, tp_degree=2).get_zero_checkpoint_state(0, 0, 0)
