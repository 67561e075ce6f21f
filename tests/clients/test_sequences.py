"""Trainer and Accelerate with ranks that share sequences train as one process does on the whole of them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.clients.compare import assert_close, assert_same_bits
from tests.clients.ranks import Ranks

STAGES = (0, 1, 2, 3)
STEPS = 3
# Orders of additions, of sums over 18 tokens, 64 words and two layers: some ulps of fp32.
EXACT, WEIGHTS = 2e-6, 2e-6
# bf16 has 8 bits, and rounds in other places where the tokens of a product are divided.
ROUGH = 1e-2


@pytest.fixture(scope="module")
def plain(ranks: Ranks) -> Any:
    @cache
    def run(**given: Any) -> dict[str, Any]:
        return ranks.run("sequence_tasks.plain", 1, steps=STEPS, **given)[0]

    return run


def compare(found: list[dict[str, Any]], expected: dict[str, Any], world: int, sp: int, bound: float) -> None:
    # Each rank tells the loss of its own sequence; a step's is the mean over them.
    per_step = [sum(one["losses"][step] for one in found) / world for step in range(STEPS)]
    assert per_step == pytest.approx(expected["losses"], rel=bound)
    assert found[0]["norms"] == pytest.approx(expected["norms"], rel=bound * 5)
    assert found[0]["batch"] == world // sp
    if bound == EXACT:
        for one in found:
            assert_close(one["weights"], expected["weights"], WEIGHTS)


@pytest.mark.parametrize(
    ("world", "sp", "kind"), [(2, 2, "causal"), (2, 2, "packed"), (4, 4, "packed"), (4, 2, "padded")]
)
@pytest.mark.parametrize("stage", STAGES)
def test_the_trainer(ranks: Ranks, plain, tmp_path, stage: int, world: int, sp: int, kind: str):
    """With 4 ranks to a sequence the two key heads are fewer than the ranks, and 18 tokens are filled up to 20."""
    given = {"stage": stage, "sp": sp, "steps": STEPS, "kind": kind, "folder": str(tmp_path)}
    found = ranks.run("sequence_tasks.trainer", world, **given)
    compare(found, plain(shape=(world, sp), kind=kind), world, sp, EXACT)


@pytest.mark.parametrize(("world", "sp", "kind"), [(2, 2, "padded"), (4, 2, "causal")])
@pytest.mark.parametrize("stage", STAGES)
def test_accelerate(ranks: Ranks, plain, tmp_path, stage: int, world: int, sp: int, kind: str):
    given = {"stage": stage, "sp": sp, "steps": STEPS, "kind": kind, "folder": str(tmp_path)}
    found = ranks.run("sequence_tasks.accelerate", world, **given)
    compare(found, plain(shape=(world, sp), kind=kind), world, sp, EXACT)


@pytest.mark.parametrize("task", ["trainer", "accelerate"])
@pytest.mark.parametrize("stage", STAGES)
def test_bf16(ranks: Ranks, plain, tmp_path, stage: int, task: str):
    given = {"stage": stage, "sp": 2, "steps": STEPS, "precision": "bf16", "folder": str(tmp_path)}
    found = ranks.run(f"sequence_tasks.{task}", 2, **given)
    compare(found, plain(shape=(2, 2), precision="bf16"), 2, 2, ROUGH)


@pytest.mark.parametrize("task", ["trainer", "accelerate"])
def test_accumulation(ranks: Ranks, plain, tmp_path, task: str):
    """The last step ends where the loaders do: it is taken with the last micro-batch of all, and not before."""
    given = {"stage": 2, "sp": 2, "steps": STEPS, "gas": 4, "folder": str(tmp_path)}
    found = ranks.run(f"sequence_tasks.{task}", 2, **given)
    expected = plain(shape=(2, 2), gas=4)
    assert found[0]["norms"][-1] == pytest.approx(expected["norms"][-1], rel=EXACT * 5)
    assert_close(found[0]["weights"], expected["weights"], WEIGHTS)


@pytest.mark.parametrize("stage", [1, 3])
def test_activation_checkpoints_and_evaluation(ranks: Ranks, plain, tmp_path, stage: int):
    """Recomputation exchanges again. Evaluation in the middle is on whole sequences, of which each rank has its own."""
    given = {"stage": stage, "sp": 2, "steps": STEPS, "kind": "packed", "folder": str(tmp_path)}
    found = ranks.run("sequence_tasks.trainer", 2, checkpointing=True, evaluate=True, **given)
    expected = plain(shape=(2, 2), kind="packed", evaluate=True)
    compare(found, expected, 2, 2, EXACT)
    assert found[0]["eval"] == pytest.approx(expected["eval"], rel=EXACT)


def test_a_window_that_slides_and_heads_that_ranks_do_not_divide(ranks: Ranks, plain, tmp_path):
    """The mask of a model that looks back 4 tokens, over three ranks of 6; 4 heads, of which each computes 2."""
    given = {"stage": 2, "sp": 3, "steps": STEPS, "window": 4, "folder": str(tmp_path)}
    found = ranks.run("sequence_tasks.accelerate", 3, **given)
    compare(found, plain(shape=(3, 3), window=4), 3, 3, EXACT)


def test_resume_in_the_middle_of_a_turn(ranks: Ranks, tmp_path):
    """Three micro-batches are over: one and a half batches of each rank's loader."""
    given = {"stage": 2, "sp": 2, "steps": 5, "save": 3, "folder": str(tmp_path)}
    whole = ranks.run("sequence_tasks.trainer", 2, **given)[0]
    (tmp_path / "checkpoint-5").rename(tmp_path / "over")
    again = ranks.run("sequence_tasks.trainer", 2, checkpoint=str(tmp_path / "checkpoint-3"), **given)[0]
    assert again["losses"] == whole["losses"][3:]
    assert_same_bits(again["weights"], whole["weights"])


@pytest.mark.parametrize("stage", [2, 3])
def test_a_model_by_its_name_tiles_and_compiled_parts(ranks: Ranks, plain, tmp_path, stage: int):
    """Registered before it is made; its MLPs and its loss in tiles; then compiled around its attention."""
    ranks.run(
        "trainer_tasks.save_plain", 1, folder=str(tmp_path), attn_implementation="sdpa", use_cache=False
    )
    expected = plain(shape=(2, 2), kind="packed")
    for compiled in (False, True):
        found = ranks.run(
            "sequence_tasks.own_loop", 2, stage=stage, folder=str(tmp_path), steps=STEPS, compiled=compiled
        )
        compare(found, expected, 2, 2, EXACT)


def test_what_cannot_be_is_named(ranks: Ranks):
    ranks.run("sequence_tasks.refused", 2)


@pytest.mark.parametrize("stage", [0, 3])
def test_trl_packs(ranks: Ranks, tmp_path, stage: int):
    ranks.run("trainer_tasks.save_plain", 1, folder=str(tmp_path), use_cache=False)
    expected = ranks.run("sequence_tasks.sft", 1, folder=str(tmp_path), stage=None)[0]
    found = ranks.run("sequence_tasks.sft", 2, folder=str(tmp_path), stage=stage)[0]
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-4)  # as they are logged
    assert found["norms"] == pytest.approx(expected["norms"], rel=EXACT * 5)
    assert_close(found["weights"], expected["weights"], WEIGHTS)


@pytest.mark.parametrize("stage", [2, 3])
def test_adapters(ranks: Ranks, stage: int):
    expected = ranks.run("sequence_tasks.lora", 1, stage=None, steps=STEPS)[0]
    found = ranks.run("sequence_tasks.lora", 2, stage=stage, steps=STEPS)
    assert [sum(parts) for parts in zip(*(one["losses"] for one in found), strict=True)] == pytest.approx(
        expected["losses"], rel=EXACT
    )
    assert_close(found[1]["weights"], expected["weights"], WEIGHTS)


@pytest.mark.parametrize("world", [2, 4])
def test_an_attention_that_goes_by_positions(ranks: Ranks, world: int):
    """Positions and padding of all ranks reach it; flash attention itself needs a GPU."""
    ranks.run("sequence_tasks.flash", world)
