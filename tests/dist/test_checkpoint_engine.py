"""What ``save_checkpoint`` and ``load_checkpoint`` promise beside the masters: everything else that training needs."""

from __future__ import annotations

import json
import logging
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.checkpointing import make_engine, pieces, train, weights, whole
from tests.helpers.models import NastyModel, build
from zeropipe.checkpoint.save.files import load_torch
from zeropipe.errors import CheckpointError, DesyncError
from zeropipe.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint


def save(rank: int, world: int, folder: str, stage: int, **arguments: Any) -> list[float]:
    engine = make_engine(stage)
    train(engine, 3, rank)
    engine.save_checkpoint(folder, **arguments)
    engine.wait_for_checkpoint()
    return train(engine, 3, rank)


def resume(rank: int, world: int, folder: str, stage: int, **arguments: Any) -> Any:
    engine = make_engine(stage, seed=1)
    path, client = engine.load_checkpoint(folder, **arguments)
    return path, client, engine.global_steps, train(engine, 3, rank)


def files(folder: Path, tag: str) -> list[str]:
    return sorted(p.name for p in (folder / tag).iterdir())


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        (0, ["mp_rank_00_model_states.pt"]),
        (2, ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt",
             "zero_pp_rank_1_mp_rank_00_optim_states.pt"]),
        (3, ["zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt",
             "zero_pp_rank_1_mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"]),
    ],
)  # fmt: skip
def test_files_have_the_names_that_tools_look_for(
    pool: Any, tmp_path: Path, stage: int, names: list[str]
) -> None:
    pool(2).run(save, str(tmp_path), stage)
    found = files(tmp_path, "global_step3")
    assert [n for n in found if not n.startswith("zeropipe")] == names
    assert (tmp_path / "latest").read_text() == "global_step3"
    assert "zero_to_fp32" in (tmp_path / "zero_to_fp32.py").read_text()
    assert not [n for n in os.listdir(tmp_path) if n.startswith(".")]


def test_stage_0_and_2_files_have_the_keys_that_tools_look_for(pool: Any, tmp_path: Path) -> None:
    for stage in (0, 2):
        pool(2).run(save, str(tmp_path / str(stage)), stage, client_state={"mine": 1})
    zero = torch.load(tmp_path / "0/global_step3/mp_rank_00_model_states.pt", weights_only=True)
    keys = "module optimizer lr_scheduler global_steps skipped_steps dp_world_size mp_world_size param_shapes"
    assert {*keys.split(), "ds_config", "ds_version", "buffer_names", "mine"} <= zero.keys()
    state = zero["optimizer"]["state"]
    shapes = {tuple(entry["exp_avg"].shape) for entry in state.values()}
    assert (11, 6) in shapes and () in shapes
    steps = {entry["step"].data_ptr() for entry in state.values()}
    assert len(steps) == len(state)  # a step tensor each: optimizers count in place
    assert zero["module"]["head.weight"].data_ptr() == zero["module"]["embed.weight"].data_ptr()
    name = "2/global_step3/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    inner = load_torch(tmp_path / name)["optimizer_state_dict"]
    assert inner["zero_stage"] == 2 and inner["partition_count"] == [2, 2]
    assert len(inner["single_partition_of_fp32_groups"]) == 2
    assert set(inner["base_optimizer_state"]["state"]) == {0, 1}


def test_the_size_on_disk_is_that_of_the_state(pool: Any, tmp_path: Path) -> None:
    """Flat buffers, padding and both sets of keys must not write anything twice."""
    ranks = pool(2).run(sizes, str(tmp_path))
    manifest = json.loads((tmp_path / "global_step1/zeropipe_manifest.json").read_text())
    optim = sum(f["bytes"] for n, f in manifest["files"].items() if "optim" in n)
    numel = sum(ranks)
    assert 12 * numel < optim < 12 * numel + 2 * 20_000  # RNG states and pickles are the rest
    model = manifest["files"]["mp_rank_00_model_states.pt"]["bytes"]
    assert 4 * numel < model < 4 * numel + 10_000


def sizes(rank: int, world: int, folder: str) -> int:
    model = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 100))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "Adam"},
        "zero_optimization": {"stage": 1},
    }
    engine, *_ = zeropipe.initialize(model=model, config=config)
    engine.backward(engine(torch.ones(1, 300)).sum())
    engine.step()
    engine.save_checkpoint(folder)
    return sum(p.numel() for p in model.parameters()) // world


def everything(rank: int, world: int, folder: str, stage: int) -> Any:
    """Save at one point, go on, load back: all that a step depends on must be as it was."""
    engine = make_engine(stage, fp16={"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2})
    train(engine, 3, rank)
    torch.manual_seed(10 + rank)
    random.seed(20 + rank)
    before = weights(engine), pieces(engine), engine.loss_scale, engine.get_lr()
    engine.save_checkpoint(folder, client_state={"epoch": 2})
    drawn = torch.rand(3), random.random()
    train(engine, 4, rank)
    engine.optimizer.param_groups[0]["weight_decay"] = 0.5
    assert engine.loss_scale != before[2]
    path, client = engine.load_checkpoint(folder)
    after = weights(engine), pieces(engine), engine.loss_scale, engine.get_lr()
    assert torch.equal(torch.rand(3), drawn[0]) and random.random() == drawn[1]
    assert engine.optimizer.param_groups[0]["weight_decay"] != 0.5
    assert client == {"epoch": 2} and Path(path).name == "global_step3"
    assert engine.global_steps == 3 and engine.global_samples == 3 * 4 * world
    assert before[2:] == after[2:]
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
    return before[1], after[1]


@pytest.mark.parametrize("stage", [0, 2])
def test_scale_schedule_random_state_clock_and_hyperparameters_come_back(
    pool: Any, tmp_path: Path, stage: int
) -> None:
    from tests.helpers.checkpointing import assert_same_state

    ranks = pool(2).run(everything, str(tmp_path), stage)
    assert_same_state(whole([r[0] for r in ranks]), whole([r[1] for r in ranks]))


def nothing(rank: int, world: int, folder: str) -> Any:
    engine = make_engine(0)
    with _Lines() as lines:
        return engine.load_checkpoint(folder), engine.load_checkpoint(folder, tag="gone"), lines.text


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.text.append(record.getMessage())

    def __enter__(self) -> _Lines:
        logging.getLogger("zeropipe").addHandler(self)
        return self

    def __exit__(self, *exc: object) -> None:
        logging.getLogger("zeropipe").removeHandler(self)


def test_nothing_there_is_none_none_and_one_line_on_rank_0(pool: Any, tmp_path: Path) -> None:
    first, second = pool(2).run(nothing, str(tmp_path / "empty"))
    assert first[:2] == second[:2] == ((None, None), (None, None))
    assert len(first[2]) == 2 and "no checkpoint" in first[2][0] and "'gone'" in first[2][1]
    assert second[2] == []


def partial(rank: int, world: int, folder: str) -> Any:
    engine = make_engine(2, seed=1)
    train(engine, 1, rank)
    lr = engine.get_lr()
    engine.load_checkpoint(folder, load_module_only=True)
    only = weights(engine), engine.global_steps, engine.get_lr() == lr
    moments = pieces(engine)[0][2]["exp_avg"].clone()
    engine.load_checkpoint(folder, load_optimizer_states=False, load_lr_scheduler_states=False)
    kept = torch.equal(pieces(engine)[0][2]["exp_avg"], moments)
    seen: list[str] = []
    engine.load_checkpoint(folder, custom_load_fn=lambda src, dst: seen.extend(sorted(src)))
    return only, kept, engine.get_lr() == lr, seen


def test_parts_can_be_left_out(pool: Any, tmp_path: Path) -> None:
    pool(2).run(save, str(tmp_path), 1)
    expected = get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    for (found, steps, same_lr), kept, same_again, seen in pool(2).run(partial, str(tmp_path)):
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert steps == 1 and same_lr and kept and not same_again  # a full load at the end restored the lr
        assert seen == sorted(expected)


def mismatched(rank: int, world: int, folder: str) -> list[str]:
    model = nn.Sequential(nn.Linear(3, 3))
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "Adam"}}
    engine, *_ = zeropipe.initialize(model=model, config=config)
    texts = []
    for strict in (True, False):
        try:
            engine.load_checkpoint(folder, load_module_strict=strict)
            texts.append("")
        except CheckpointError as error:
            texts.append(str(error))
    bad = build(NastyModel)
    bad.wide = nn.Linear(6, 7)
    other, *_ = zeropipe.initialize(model=bad, config=config)
    before = weights(other)
    try:
        other.load_checkpoint(folder, "global_step3")
    except CheckpointError as error:
        texts.append(str(error))
    assert all(torch.equal(before[k], v) for k, v in weights(other).items())  # nothing was changed
    return texts


def test_another_model_is_refused_by_name_and_shape(pool: Any, tmp_path: Path) -> None:
    pool(1).run(save, str(tmp_path), 0)
    for strict, loose, shape in pool(2).run(mismatched, str(tmp_path)):
        assert (
            "missing 0." in strict and "not in the model" in strict and "load_module_strict=False" in strict
        )
        assert loose == ""
        assert "wide." in shape and "does not fit the model" in shape


def different_tags(rank: int, world: int, folder: str, validation: str) -> tuple[str, str, list[str]]:
    engine = make_engine(0, checkpoint={"tag_validation": validation})
    with _Lines() as lines:
        try:
            engine.save_checkpoint(folder, tag=f"tag{rank}")
        except DesyncError as error:
            return str(error), str(lines.text), []
    return "", str(lines.text), sorted(os.listdir(folder))


@pytest.mark.parametrize("validation", ["Fail", "Warn", "Ignore"])
def test_the_configuration_decides_what_different_tags_mean(
    pool: Any, tmp_path: Path, validation: str
) -> None:
    """Whatever ``checkpoint.tag_validation`` said, ranks that gave different tags got an error."""
    for rank, (error, lines, there) in enumerate(pool(2).run(different_tags, str(tmp_path), validation)):
        names = "rank 0: 'tag0'; rank 1: 'tag1'"
        assert (names in error) == (validation == "Fail")
        assert (names in lines) == (validation == "Warn" and rank == 0)
        assert ("tag0" in there and "tag1" not in there) == (validation != "Fail")
    assert (tmp_path / "latest").exists() == (validation != "Fail")


def without_a_folder(rank: int, world: int, folder: str | None, call: str) -> str:
    engine = make_engine(0)
    try:
        # Rank 1 alone makes the mistake: nobody may wait for it.
        getattr(engine, call)(folder if rank or world == 1 else "somewhere")
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("call", ["save_checkpoint", "load_checkpoint"])
@pytest.mark.parametrize("folder", ["", None])
def test_no_folder_is_refused_by_name(pool: Any, folder: str | None, call: str) -> None:
    """An empty path saved into the working directory; None was an error about a path's insides."""
    for world in (1, 2):
        for text in pool(world).run(without_a_folder, folder, call):
            assert "the checkpoint's folder" in text and repr(folder) in text


@pytest.mark.parametrize("tag", ["a/b", "..", ".x", "", "latest"])
def test_tags_that_are_no_folder_name_are_refused(pool: Any, tmp_path: Path, tag: str) -> None:
    with pytest.raises(Exception, match="tag cannot be used"):
        pool(1).run(save, str(tmp_path), 0, tag=tag)


class Odd:
    """A client's class: it can only be restored by running code."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Odd)

    __hash__ = None  # type: ignore[assignment]


def odd_state(rank: int, world: int, folder: str) -> Any:
    engine = make_engine(1)
    engine.save_checkpoint(folder, client_state={"plain": 1, "odd": Odd(), "module": "a colliding key"})
    with _Lines() as lines:
        plain = engine.load_checkpoint(folder)[1]
    trusted = engine.load_checkpoint(folder, trust=True)[1]
    return plain, trusted, lines.text


def test_objects_in_the_client_state_need_the_opt_in(pool: Any, tmp_path: Path) -> None:
    plain, trusted, lines = pool(2).run(odd_state, str(tmp_path))[0]
    assert plain == {"plain": 1, "module": "a colliding key"}
    assert trusted == {"plain": 1, "odd": Odd(), "module": "a colliding key"}
    assert "client_state.odd" in lines[0] and "trust=True" in lines[0]


def asynchronous(rank: int, world: int, folder: str) -> Any:
    engine = make_engine(2)
    train(engine, 3, rank)
    engine.save_checkpoint(folder, async_save=True)
    rest = train(engine, 3, rank)  # while the files are written
    engine.save_checkpoint(folder, async_save=True)  # waits for the first
    engine.destroy()  # waits for the second
    return rest


def test_an_asynchronous_save_is_of_the_moment_it_was_called(pool: Any, tmp_path: Path) -> None:
    rest = pool(2).run(asynchronous, str(tmp_path))
    assert (tmp_path / "latest").read_text() == "global_step6"
    for rank, (_, _, steps, losses) in enumerate(pool(2).run(resume, str(tmp_path), 1, tag="global_step3")):
        assert steps == 3 and losses == rest[rank]


def unfrozen(rank: int, world: int, folder: str) -> Any:
    engine = make_engine(1)
    train(engine, 2, rank)
    engine.module.frozen.weight.requires_grad_(True)
    train(engine, 2, rank)
    engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    return train(engine, 2, rank)


def continue_unfrozen(rank: int, world: int, folder: str) -> Any:
    engine = make_engine(2, seed=1)
    engine.module.frozen.weight.requires_grad_(True)
    train(engine, 1, rank)
    engine.load_checkpoint(folder)
    return train(engine, 2, rank)


def test_a_parameter_unfrozen_mid_run_keeps_its_own_step_count(pool: Any, tmp_path: Path) -> None:
    assert pool(2).run(unfrozen, str(tmp_path)) == pool(2).run(continue_unfrozen, str(tmp_path))


def without_frozen(rank: int, world: int, folder: str) -> Any:
    engine = make_engine(2)
    engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    other = make_engine(2, seed=1)
    own = other.module.frozen.weight.detach().clone()
    other.load_checkpoint(folder, load_module_strict=False)
    return torch.equal(own, other.module.frozen.weight), torch.equal(
        other.module.wide.weight, engine.module.wide.weight
    )


def test_frozen_parameters_can_be_left_out(pool: Any, tmp_path: Path) -> None:
    assert pool(2).run(without_frozen, str(tmp_path)) == [(True, True)] * 2
    assert "frozen.weight" not in get_fp32_state_dict_from_zero_checkpoint(tmp_path)


def two_engines(rank: int, world: int, folder: str) -> None:
    actor, critic = make_engine(1), make_engine(2, seed=1)
    actor.save_checkpoint(f"{folder}/actor", async_save=True)
    critic.save_checkpoint(f"{folder}/critic", async_save=True)
    actor.destroy()
    critic.destroy()


def test_two_engines_save_at_once(pool: Any, tmp_path: Path) -> None:
    pool(2).run(two_engines, str(tmp_path))
    a = get_fp32_state_dict_from_zero_checkpoint(tmp_path / "actor")
    b = get_fp32_state_dict_from_zero_checkpoint(tmp_path / "critic")
    assert a.keys() == b.keys() and not torch.equal(a["wide.weight"], b["wide.weight"])
