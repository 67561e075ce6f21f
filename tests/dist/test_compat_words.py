"""Names of DeepSpeed that need ranks or an engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import zeropipe
from tests.helpers.models import MLP, build
from tests.helpers.train import config
from zeropipe.compat import optimizers, ranks, tools
from zeropipe.errors import UsageError
from zeropipe.utils import groups

KINDS = {
    name for name in optimizers.__all__ if name[0].isupper() and "Optim" in name and name != "DummyOptim"
}
EXPECTED = {
    (0, "fp32"): set(),
    (0, "bf16"): {"BF16_Optimizer"},
    (0, "fp16"): {"FP16_Optimizer"},
    (1, "bf16"): {"BF16_Optimizer", "DeepSpeedZeroOptimizer", "ZeROOptimizer"},
    (2, "fp16"): {"DeepSpeedZeroOptimizer", "ZeROOptimizer"},
    (3, "bf16"): {"DeepSpeedZeroOptimizer_Stage3", "ZeROOptimizer"},
}


def kinds(rank: int, world: int) -> None:
    for (stage, dtype), expected in EXPECTED.items():
        precision = {} if dtype == "fp32" else {dtype: {"enabled": True}}
        engine = zeropipe.initialize(model=build(MLP), config=config(stage, world, **precision))[0]
        found = {name for name in KINDS if isinstance(engine.optimizer, getattr(optimizers, name))}
        assert found == expected, (stage, dtype)
        away = [optimizers.is_zero_param(p) for p in engine.module.parameters()]
        assert all(away) if stage == 3 else not any(away)
        offload = getattr(engine.optimizer, "parameter_offload", None)
        assert isinstance(offload, optimizers.DeepSpeedZeRoOffload) == (stage == 3)
        engine.destroy()


def test_the_optimizer_is_told_by_stage_and_dtype(pool):
    pool(2).run(kinds)


def test_nobody_builds_one_by_hand():
    with pytest.raises(
        AttributeError, match=r"DeepSpeedZeroOptimizer is not built by hand.*deepspeed.initialize"
    ):
        optimizers.DeepSpeedZeroOptimizer(None)
    assert optimizers.DummyOptim([torch.nn.Parameter(torch.ones(1))]).param_groups[0]["params"]


def over_ranks(rank: int, world: int) -> None:
    group = dist.group.WORLD
    for shape in ((5, 3), (2,), (1,), (0, 4)):
        whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
        part = tools.PartitionedTensor(whole, group)
        assert torch.equal(part.full(), whole)
        again = tools.PartitionedTensor.from_meta(part.to_meta(), part.data(), group)
        assert torch.equal(again.full(), whole)
        assert again.full_size() == list(shape)
    # A parameter that is cut among the ranks, and one that all hold: the norm counts the latter once.
    mpu = SimpleNamespace(get_model_parallel_group=lambda: group, get_model_parallel_rank=lambda: rank)
    cut, shared = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    cut.model_parallel = True
    cut.grad, shared.grad = torch.tensor([3.0]), torch.tensor([4.0])
    want = (world * 9 + 16) ** 0.5
    norm = tools.clip_grad_norm_([cut, shared], 1.0, mpu=mpu)
    assert norm.item() == pytest.approx(want)
    assert cut.grad.item() == pytest.approx(3 / want, rel=1e-4)
    flat = torch.zeros(2 * world)
    parts = list(flat.chunk(world))
    parts[rank].fill_(rank + 1.0)
    tools.all_gather_dp_groups([flat], [parts], [group])
    assert flat.tolist() == [r + 1.0 for r in range(world) for _ in range(2)]
    out = torch.empty(world)
    ranks.allgather_fn(out, torch.tensor([float(rank)]))
    assert out.tolist() == [float(r) for r in range(world)]
    assert ranks.get_world_group() is group is groups._get_sequence_data_parallel_group()
    assert (groups.get_data_parallel_rank(), groups.get_data_parallel_world_size()) == (rank, world)
    assert ranks._get_broadcast_src_rank() == 0


@pytest.mark.parametrize("world", [2, 3])
def test_tools_over_ranks(pool, world):
    pool(world).run(over_ranks)


def masters(rank: int, world: int, folder: str) -> None:
    settings = {"load_from_fp32_weights": False}
    for precision in ({}, {"bf16": {"enabled": True}}):
        engine = zeropipe.initialize(
            model=build(MLP), config=config(1, world, zero_optimization=settings, **precision)
        )[0]
        engine.save_checkpoint(folder)
        if not precision:
            assert engine.load_checkpoint(folder)[0] is not None  # in fp32 the weights are the masters
        else:
            with pytest.raises(UsageError, match=r"load_from_fp32_weights.*Fix: remove the key"):
                engine.load_checkpoint(folder)
            assert engine.load_checkpoint(folder, load_module_only=True)[0] is not None
        engine.destroy()


def test_masters_made_of_16_bit_weights_are_refused_where_a_load_would_make_them(pool, tmp_path):
    """Accepted before: a run that loads nothing is not concerned."""
    pool(2).run(masters, str(tmp_path))
