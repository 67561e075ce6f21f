"""What was saved at (stage, dp, tp, pp) loads at any other: slices are joined and cut anew, bit for bit.

The model has every kind of slice: a padded vocabulary, columns, rows, fused halves, and whole tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

from tests.helpers.checkpointing import Pieces, assert_same_state, pieces, whole
from zeropipe.checkpoint.convert import compare
from zeropipe.checkpoint.loader import open_source
from zeropipe.checkpoint.universal_checkpoint import join, joining_of
from zeropipe.cli.ckpt import app
from zeropipe.errors import CheckpointError

VOCAB, WIDTH, HIDDEN, BLOCKS = 11, 8, 12, 2
INFO = {
    "vocabulary_parameter_patterns": [r"0\.weight"],
    "original_vocab_size": VOCAB,
    "parameter_with_row_parallelism_patterns": [r"\d+\.row"],
    "parameter_with_2_sub_params_cat_dim_0": [r"\d+\.fused"],
    "tp_replicated_parameter_patterns": [r"\d+\.(norm|bias|head)"],
}


class Identity(torch.autograd.Function):
    """Into a sliced region: the same value, the sum of the gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class Sum(torch.autograd.Function):
    """Out of a sliced region: the sum of the values, the same gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return grad, None


class Sliced(nn.Module):
    """A layer of one tensor-parallel rank. ``place`` is (rank, degree, group)."""

    def __init__(self, place: tuple[int, int, Any]) -> None:
        super().__init__()
        self.rank, self.degree, self.group = place

    def rows(self, full: torch.Tensor, dim: int = 0) -> nn.Parameter:
        return nn.Parameter(full.chunk(self.degree, dim)[self.rank].clone())


class Embedding(Sliced):
    def __init__(self, place: Any) -> None:
        super().__init__(place)
        padding = torch.zeros(-VOCAB % self.degree, WIDTH)
        self.weight = self.rows(torch.cat([torch.randn(VOCAB, WIDTH), padding]))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        first = self.rank * self.weight.shape[0]
        mine = (tokens >= first) & (tokens < first + self.weight.shape[0])
        found = F.embedding((tokens - first).clamp(0, self.weight.shape[0] - 1), self.weight)
        return Sum.apply(found * mine.unsqueeze(-1), self.group)


class Block(Sliced):
    def __init__(self, place: Any) -> None:
        super().__init__(place)
        self.norm = nn.Parameter(torch.ones(WIDTH))
        halves = torch.randn(2 * HIDDEN, WIDTH).chunk(2)
        self.fused = nn.Parameter(torch.cat([self.rows(half).detach() for half in halves]) * 0.3)
        self.column = self.rows(torch.randn(HIDDEN))
        self.row = self.rows(torch.randn(WIDTH, HIDDEN) * 0.3, 1)
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = Identity.apply(F.layer_norm(x, (WIDTH,), self.norm), self.group)
        gate, up = F.linear(h, self.fused).chunk(2, -1)
        return x + Sum.apply(F.linear(torch.tanh(gate) * up + self.column, self.row), self.group) + self.bias


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Parameter(torch.randn(VOCAB, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.head)


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def engine_of(world: int, tp: int, pp: int, stage: int, info: dict[str, Any] | None = INFO) -> Any:
    import zeropipe
    from zeropipe.pipe import LayerSpec, PipelineModule
    from zeropipe.runtime.pipe.topology import PipeModelDataParallelTopology

    dp = world // (tp * pp)
    topology = PipeModelDataParallelTopology(pp, tp, dp)
    here = topology.get_coord(dist.get_rank()) if dist.is_initialized() else None
    group = None
    for ranks in topology.get_axis_comm_lists("model") or [[r] for r in range(world)]:
        made = dist.new_group(ranks)
        group = made if dist.get_rank() in ranks else group
    place = (getattr(here, "model", 0), tp, group)
    layers = [LayerSpec(Embedding, place), *[LayerSpec(Block, place)] * BLOCKS, LayerSpec(Head)]
    module = PipelineModule(layers, topology=topology, loss_fn=loss_of, seed_layers=True)
    if info is not None:
        module.universal_checkpoint_info = info
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4 // dp if dp in (1, 2, 4) else 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
    }
    return zeropipe.initialize(model=module, config=config)[0]


def train(engine: Any, first: int, count: int) -> list[float]:
    dp, replica = engine.grid.data_parallel_size, engine.grid.data_parallel_id
    losses = []
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        data = [tuple(torch.randint(0, VOCAB, (2, 2, 5), generator=generator).unbind(0)) for _ in range(4)]
        losses.append(engine.train_batch(iter(data[replica::dp])).item())
    return losses


State = tuple[tuple[int, int], Pieces, list[float]]


def save(rank: int, world: int, folder: str, tp: int, pp: int, stage: int) -> State:
    engine = engine_of(world, tp, pp, stage)
    train(engine, 0, 2)
    engine.save_checkpoint(folder)
    found = pieces(engine)
    return (engine.grid.stage_id, engine.grid.slice_parallel_id), found, train(engine, 2, 3)


def load(rank: int, world: int, folder: str, tp: int, pp: int, stage: int) -> State:
    engine = engine_of(world, tp, pp, stage)
    path, _ = engine.load_checkpoint(folder)
    assert path is not None
    assert engine.global_steps == 2
    found = pieces(engine)
    losses = train(engine, 2, 3) if engine.grid.data_parallel_size in (1, 2, 4) else []
    return (engine.grid.stage_id, engine.grid.slice_parallel_id), found, losses


def joined(ranks: list[State], tp: int) -> dict[str, dict[str, Any]]:
    """The whole state of the run, each tensor of all tensor-parallel ranks made one."""
    parts: list[dict[str, dict[str, Any]]] = []
    for t in range(tp):
        stages = sorted({place[0] for place, _, _ in ranks})
        mine: dict[str, dict[str, Any]] = {}
        for stage in stages:
            mine |= whole([found for place, found, _ in ranks if place == (stage, t)])
        parts.append(mine)
    return {name: join_one(name, [part[name] for part in parts]) for name in parts[0]}


def join_one(name: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    how = joining_of(name, INFO)
    shapes = {"weight": (-1, WIDTH), "fused": (-1, WIDTH), "row": (WIDTH, -1), "head": (VOCAB, WIDTH)}
    shape = shapes.get(name.split(".")[1], (-1,))
    return {
        key: join([part[key].view(shape) for part in parts], how).flatten()
        if torch.is_tensor(value)
        else value
        for key, value in parts[0].items()
    }


# Each is world, tp, pp and stage.
SOURCES = [(2, 2, 1, 1), (4, 2, 2, 1), (4, 2, 1, 3), (1, 1, 1, 0), (3, 3, 1, 2)]
TARGETS = [(1, 1, 1, 1), (2, 2, 1, 2), (4, 2, 2, 1), (4, 4, 1, 0), (2, 1, 2, 1), (3, 1, 1, 3)]


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_any_degrees_load_at_any_other(pool: Any, tmp_path: Path, source: tuple[int, ...]) -> None:
    world, tp, pp, stage = source
    begun = pool(world).run(save, str(tmp_path), tp, pp, stage, timeout=90)
    expected = joined(begun, tp)
    assert expected["0.weight"]["exp_avg"].abs().max() > 0
    for world, tp, pp, stage in TARGETS:
        found = pool(world).run(load, str(tmp_path), tp, pp, stage, timeout=90)
        assert_same_state(expected, joined(found, tp))
        for _, _, losses in found:
            # Sums over slices are made in another order.
            assert not losses or losses == pytest.approx(begun[0][2], rel=1e-4)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    if result.exception is not None:
        raise result.exception
    return result.output


def test_convert_export_and_compare_work_on_slices(pool: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    begun = pool(4).run(save, str(tmp_path / "a"), 2, 2, 1, timeout=90)
    expected = joined(begun, 2)
    shapes = [(1, 2, 2, 1), (2, 1, 1, 3), (1, 4, 1, 2), (3, 2, 1, 1), (2, 2, 2, 0)]
    for number, (dp, tp, pp, stage) in enumerate(shapes):
        out = tmp_path / f"to{number}"
        run("convert", tmp_path / "a", out, "--dp", dp, "--tp", tp, "--pp", pp, "--stage", stage)
        source = open_source(out)
        assert (source.degrees, source.stage) == ({"dp": dp, "tp": tp, "pp": pp}, stage)
        assert list(compare(open_source(tmp_path / "a"), source)) == []
        world, at = (4, (2, 2, 1)) if number % 2 else (1, (1, 1, 0))
        found = pool(world).run(load, str(out), *at, timeout=90)
        assert_same_state(expected, joined(found, at[0]))
    names = {p.name for p in (tmp_path / "to0/global_step2").iterdir()}
    assert "layer_03-model_01-model_states.pt" in names
    assert "mp_rank_03_model_states.pt" in names
    run("export", tmp_path / "a", tmp_path / "weights")
    weights = load_file(tmp_path / "weights/model.safetensors")
    assert weights["0.weight"].shape == (VOCAB, WIDTH)
    for name, tensor in weights.items():
        assert torch.equal(tensor.flatten(), expected[name]["fp32"])
    for to in ("universal", "dcp"):
        run("convert", tmp_path / "a", tmp_path / to, "--to", to)
        assert list(compare(open_source(tmp_path / "a"), open_source(tmp_path / to))) == []
        found = pool(2).run(load, str(tmp_path / to), 2, 1, 1, timeout=90)
        assert_same_state(expected, joined(found, 2))
    with pytest.raises(CheckpointError, match="pipeline stages"):
        run("convert", tmp_path / "a", tmp_path / "no", "--pp", 3)


def without_rules(rank: int, world: int, folder: str, tp: int) -> Any:
    engine = engine_of(world, tp, 1, 1, info=None)
    if tp == 2:
        engine.save_checkpoint(folder)
        before = pieces(engine)
        train(engine, 0, 1)
        engine.load_checkpoint(folder)
        after = pieces(engine)
        assert all(torch.equal(a[2]["fp32"], b[2]["fp32"]) for a, b in zip(before, after, strict=True))
        return ""
    try:
        engine.load_checkpoint(folder)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_without_rules_the_same_degree_loads_and_another_is_refused(pool: Any, tmp_path: Path) -> None:
    """Each rank must get its own slice back, not the first rank's."""
    pool(2).run(without_rules, str(tmp_path), 2)
    for text in pool(2).run(without_rules, str(tmp_path), 1):
        assert "universal_checkpoint_info" in text
        assert "tensor-parallel degree 2" in text
