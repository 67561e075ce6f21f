"""Every ordered pair of what changes beside stage and size: offload, MiCS, optimizers with their own kinds of state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import zeropipe
from tests.helpers.checkpointing import Pieces, assert_same_state, make_engine, pieces, train, whole
from zeropipe.checkpoint.convert import compare, convert
from zeropipe.checkpoint.loader import open_source

# A name: ranks and the ``zero_optimization`` section; FILES stands for a folder.
PLACES: dict[str, tuple[int, dict[str, Any]]] = {
    "stage 0": (1, {"stage": 0}),
    "stage 2, optimizer on cpu": (2, {"stage": 2, "offload_optimizer": {"device": "cpu"}}),
    "stage 3, both on cpu": (
        3, {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    ),
    "stage 3, both in files": (
        2,
        {
            "stage": 3,
            "offload_optimizer": {"device": "nvme", "nvme_path": "FILES"},
            "offload_param": {"device": "nvme", "nvme_path": "FILES"},
        },
    ),
    "mics": (4, {"stage": 3, "mics_shard_size": 2}),
    "mics, optimizer in files": (
        4, {"stage": 3, "mics_shard_size": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "FILES"}},
    ),
}  # fmt: skip


def in_files(section: dict[str, Any], files: str) -> dict[str, Any]:
    return {
        key: in_files(value, files) if isinstance(value, dict) else files if value == "FILES" else value
        for key, value in section.items()
    }


def engine_of(section: dict[str, Any], files: str, optimizer: str = "AdamW", seed: int = 0) -> Any:
    zero = in_files(section, files)
    return make_engine(zero["stage"], optimizer=optimizer, seed=seed, zero_optimization=zero)


def begin(rank: int, world: int, folder: str, section: dict[str, Any], files: str, optimizer: str) -> Pieces:
    engine = engine_of(section, files, optimizer)
    train(engine, 3, rank)
    engine.save_checkpoint(folder)
    found = pieces(engine)
    engine.destroy()
    return found


def hop(
    rank: int,
    world: int,
    sources: list[str],
    folder: str,
    section: dict[str, Any],
    files: str,
    optimizer: str,
) -> tuple[list[Pieces], torch.Tensor, list[float]]:
    """Load each in turn, and save the last: (states, the frozen weight, next losses)."""
    engine = engine_of(section, files, optimizer, seed=1)
    found = []
    for source in sources:
        engine.load_checkpoint(source)
        found.append(pieces(engine))
    engine.save_checkpoint(folder)
    with zeropipe.zero.GatheredParameters(engine.module.frozen.weight):
        frozen = engine.module.frozen.weight.detach().clone()
    losses = train(engine, 3, rank)
    engine.destroy()
    return found, frozen, losses


def test_offload_and_mics_load_each_other(pool: Any, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    state = whole(pool(2).run(begin, str(tmp_path / "first"), {"stage": 1}, str(files), "AdamW"))
    assert state["wide.weight"]["exp_avg"].abs().max() > 0
    folders = {name: str(tmp_path / f"{number}") for number, name in enumerate(PLACES)}
    for name, (world, section) in PLACES.items():
        first = [str(tmp_path / "first")]
        ranks = pool(world).run(hop, first, folders[name], section, str(files), "AdamW")
        assert_same_state(state, whole([r[0][0] for r in ranks]))
    losses: dict[int, Any] = {}
    for name, (world, section) in PLACES.items():
        ranks = pool(world).run(
            hop, list(folders.values()), str(tmp_path / "again"), section, str(files), "AdamW"
        )
        for number, source in enumerate(folders):
            try:
                assert_same_state(state, whole([r[0][number] for r in ranks]))
            except AssertionError as error:
                raise AssertionError(f"{source} -> {name}: {error}") from error
        if "mics" not in name:  # gradients of MiCS are summed in two steps
            assert losses.setdefault(world, [r[2] for r in ranks]) == [r[2] for r in ranks], name


@pytest.mark.parametrize("optimizer", ["Lamb", "Muon", "Adagrad", "Lion", "SGD"])
def test_every_kind_of_state_crosses_stages(pool: Any, tmp_path: Path, optimizer: str) -> None:
    shapes = [(1, 0), (3, 1), (2, 2), (2, 3), (4, 3)]
    state = whole(pool(2).run(begin, str(tmp_path / "first"), {"stage": 1}, "", optimizer))
    folders = {shape: str(tmp_path / f"{shape}") for shape in shapes}
    for (world, stage), folder in folders.items():
        ranks = pool(world).run(hop, [str(tmp_path / "first")], folder, {"stage": stage}, "", optimizer)
        assert_same_state(state, whole([r[0][0] for r in ranks]))
    losses: dict[int, Any] = {}
    for world, stage in shapes:
        again = str(tmp_path / "again")
        ranks = pool(world).run(hop, list(folders.values()), again, {"stage": stage}, "", optimizer)
        for number, source in enumerate(shapes):
            try:
                assert_same_state(state, whole([r[0][number] for r in ranks]))
            except AssertionError as error:
                raise AssertionError(f"{source} -> {(world, stage)}: {error}") from error
        assert losses.setdefault(world, [r[2] for r in ranks]) == [r[2] for r in ranks]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_frozen_parameters_go_to_stage_3_and_back(pool: Any, tmp_path: Path, stage: int) -> None:
    """Stage 3 keeps them in shards of their own, the others whole in the model file."""
    pool(2).run(begin, str(tmp_path / "a"), {"stage": stage}, "", "AdamW")
    convert(open_source(tmp_path / "a"), tmp_path / "b", stage=3, dp=3)
    convert(open_source(tmp_path / "b"), tmp_path / "c", stage=1, dp=2)
    sharded, back = open_source(tmp_path / "b"), open_source(tmp_path / "c")
    (flat,) = (f for f in sharded.flats if f.layout.tensors[0].name == "frozen.weight")
    assert list(flat.keys) == ["param"] and flat.layout.num_shards == 3
    assert "frozen.weight" not in {e.name for e in sharded.module}
    assert {e.name: e.kind for e in back.module}["frozen.weight"] == "frozen"
    for other in (sharded, back):
        assert list(compare(open_source(tmp_path / "a"), other)) == []
    expected = make_engine(0).module.frozen.weight
    for folder, world, at in (("b", 3, 3), ("b", 2, 1), ("c", 4, 3), ("a", 2, 3), ("a", 1, 0)):
        ranks = pool(world).run(
            hop, [str(tmp_path / folder)], str(tmp_path / "d"), {"stage": at}, "", "AdamW"
        )
        assert all(torch.equal(r[1], expected) for r in ranks)
