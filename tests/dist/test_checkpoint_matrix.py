"""Any checkpoint loads at any other stage and number of ranks, bit for bit, and training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkpointing import Pieces, assert_same_state, make_engine, pieces, train, whole
from zeropipe.runtime.engine.state import optimizer_flats

STAGES = (0, 1, 2, 3)
WORLDS = (1, 2, 3, 4)
# Every shape in fp32; 16-bit weights beside fp32 masters at the odd sizes.
SHAPES = {
    "fp32": [(world, stage) for world in WORLDS for stage in STAGES],
    "bf16": [(world, stage) for world in (1, 3) for stage in STAGES],
}
FIRST = (2, 1)  # the shape that the state of all tests was trained in


def begin(rank: int, world: int, folder: str, precision: str) -> list[float]:
    engine = make_engine(FIRST[1], precision)
    train(engine, 3, rank)
    engine.save_checkpoint(folder, client_state={"note": "kept", "at": 3})
    return train(engine, 10, rank)


def hop(rank: int, world: int, source: str, folder: str, stage: int, precision: str) -> Pieces:
    """Load into a differently initialised engine of this shape and save again."""
    engine = make_engine(stage, precision, seed=1)
    path, client = engine.load_checkpoint(source)
    assert path is not None
    assert client == {"note": "kept", "at": 3}
    assert engine.global_steps == 3
    engine.save_checkpoint(folder, client_state=client)
    return pieces(engine)


def scribble(engine: Any) -> None:
    for held in optimizer_flats(engine.optimizer):
        for tensor in held.flat.tensors.values():
            tensor.add_(1.0)


def arrive(rank: int, world: int, sources: list[str], stage: int, precision: str) -> list[Pieces]:
    """Load every source in turn into one engine."""
    engine = make_engine(stage, precision, seed=1)
    found = []
    for source in sources:
        engine.load_checkpoint(source)
        found.append(pieces(engine))
        scribble(engine)  # so that the next load has something to undo
    return found


def resume(
    rank: int, world: int, sources: list[str], stages: list[int], steps: int
) -> list[tuple[list[float], Any]]:
    found = []
    for source, stage in zip(sources, stages, strict=True):
        engine = make_engine(stage, seed=1)
        engine.load_checkpoint(source)
        found.append((train(engine, steps, rank), engine.get_lr()))
        engine.destroy()
    return found


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def folders(request: pytest.FixtureRequest, pool: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One state saved in every shape: (precision, the state, {shape: folder}, losses that followed in FIRST)."""
    root: Path = tmp_path_factory.mktemp(f"matrix-{request.param}")
    precision = request.param
    begun = pool(FIRST[0]).run(begin, str(root / "first"), precision)
    saved, state = {}, None
    for world, stage in SHAPES[precision]:
        folder = str(root / f"dp{world}-stage{stage}")
        here = whole(pool(world).run(hop, str(root / "first"), folder, stage, precision))
        if state is None:
            state = here
        assert_same_state(state, here)
        saved[(world, stage)] = folder
    return precision, state, saved, begun


@pytest.mark.parametrize("world", WORLDS)
def test_every_pair_of_shapes_gives_the_same_masters_moments_and_steps(
    pool: Any, folders: Any, world: int
) -> None:
    precision, state, saved, _ = folders
    if (world, 0) not in saved:
        pytest.skip("not a size of this precision")
    for stage in STAGES:
        ranks = pool(world).run(arrive, list(saved.values()), stage, precision)
        for index, shape in enumerate(saved):
            try:
                assert_same_state(state, whole([rank[index] for rank in ranks]))
            except AssertionError as error:
                raise AssertionError(f"{shape} -> {(world, stage)}: {error}") from error


def test_the_state_is_not_trivially_equal(folders: Any) -> None:
    """The comparisons above would pass on empty states; this one would not."""
    _, state, _, _ = folders
    assert {"embed.weight", "wide.weight", "scale", "few"} <= state.keys()
    assert state["wide.weight"]["exp_avg"].abs().max() > 0
    assert state["wide.weight"]["step"] == 3


@pytest.mark.parametrize("world", WORLDS)
def test_the_next_losses_do_not_depend_on_the_shape_that_saved(pool: Any, folders: Any, world: int) -> None:
    precision, _, saved, begun = folders
    if precision != "fp32":
        pytest.skip("one precision is enough for the trajectories")
    sources = [saved[shape] for shape in ((1, 0), (2, 2), (3, 3), (4, 1), (world, 3))]
    ranks = pool(world).run(resume, sources, [0, 1, 2, 3, 0], 10)
    for rank, results in enumerate(ranks):
        for losses, lrs in results:
            assert losses == results[0][0]
            assert lrs == results[0][1]
        if world == FIRST[0]:
            assert results[0][0] == begun[rank]  # the run that was never stopped
