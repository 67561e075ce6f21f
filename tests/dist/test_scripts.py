"""Scripts as public repositories write them for DeepSpeed, small: under the name deepspeed they equal plain PyTorch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.dist.test_engine_face import named_deepspeed
from tests.helpers.data import global_batches, mlp_batch
from tests.helpers.models import MLP, build
from tests.helpers.referee import train_plain, weights_of
from tests.helpers.train import ADAMW, config

STEPS = 4


def guarded_import(settings: dict[str, Any]) -> Any:
    """The family that asks for DeepSpeedConfig inside try, and else ends with exit code 0, having trained nothing."""
    try:
        from deepspeed import DeepSpeedConfig
    except ImportError:
        raise SystemExit("please install deepspeed") from None
    return DeepSpeedConfig(settings)


def finetune(rank: int, world: int, stage: int) -> tuple[dict[str, torch.Tensor], str]:
    """Epochs that end with ``tput_timer``, on the device of ``get_accelerator``, with its memory in the log."""
    with named_deepspeed() as out:
        import deepspeed
        from deepspeed.accelerator import get_accelerator
        from deepspeed.utils import safe_get_full_fp32_param

        parsed = guarded_import(config(stage, world, steps_per_print=2))
        get_accelerator().manual_seed(7)
        device = torch.device(get_accelerator().current_device_name())
        engine, optimizer, _, _ = deepspeed.initialize(model=build(MLP).to(device), config=parsed)
        assert engine.train_micro_batch_size_per_gpu() == parsed.train_micro_batch_size_per_gpu == 1
        for step in range(STEPS):
            loss = engine(*(tensor.to(engine.device) for tensor in mlp_batch(step, rank)))
            engine.backward(loss)
            engine.step()
            if step % 2:
                engine.tput_timer.update_epoch_count()
                get_accelerator().empty_cache()
        assert get_accelerator().memory_allocated() >= 0 and get_accelerator().total_memory() > 0
        assert engine.tput_timer.epoch_count == 2 and math.isfinite(engine.tput_timer.avg_samples_per_sec())
        assert optimizer.overflow is False and engine.local_rank == 0
        found = {name: safe_get_full_fp32_param(p) for name, p in engine.module.named_parameters()}
        engine.destroy()
    return found, out.getvalue()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_finetuning_script_equals_plain_pytorch(pool, stage):
    runs = pool(2).run(finetune, stage)

    def plain(dtype: torch.dtype | None) -> Any:
        return train_plain(
            lambda: build(MLP),
            lambda step: global_batches(mlp_batch, step, 2),
            lambda params: torch.optim.AdamW(params, **ADAMW["params"]),
            STEPS,
            dtype=dtype,
        )

    for found, _ in runs:
        for name, value in plain(None).weights.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert [f"[Rank 0] step={n}, skipped=0" in runs[0][1] for n in (2, 4)] == [True, True]
    assert runs[1][1] == ""


class Mpu:
    """A unit of Megatron's functions, as large trainers hand it over: pairs of ranks hold the same slice."""

    def __init__(self, rank: int, world: int, slices: int) -> None:
        import torch.distributed as dist

        data = [dist.new_group(list(range(s, world, slices))) for s in range(slices)]
        model = [dist.new_group(list(range(at, at + slices))) for at in range(0, world, slices)]
        self._slices, self._rank, self._world = slices, rank, world
        self._data, self._model = data[rank % slices], model[rank // slices]

    def get_model_parallel_rank(self) -> int:
        return self._rank % self._slices

    def get_model_parallel_world_size(self) -> int:
        return self._slices

    def get_model_parallel_group(self) -> Any:
        return self._model

    def get_data_parallel_rank(self) -> int:
        return self._rank // self._slices

    def get_data_parallel_world_size(self) -> int:
        return self._world // self._slices

    def get_data_parallel_group(self) -> Any:
        return self._data


def sliced(rank: int, world: int, stage: int) -> tuple[int, dict[str, torch.Tensor]]:
    """Each slice trains its own model over the ranks that share it."""
    with named_deepspeed():
        import deepspeed

        mpu = Mpu(rank, world, 2)
        slice_ = mpu.get_model_parallel_rank()
        engine, *_ = deepspeed.initialize(
            model=build(MLP, seed=slice_), config=config(stage, world // 2), mpu=mpu
        )
        assert (engine.dp_world_size, engine.mp_world_size, engine.mpu) == (world // 2, 2, mpu)
        for step in range(STEPS):
            engine.backward(engine(*mlp_batch(step, mpu.get_data_parallel_rank())))
            engine.step()
        engine.destroy()
    return slice_, weights_of(engine.module)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_unit_of_megatrons_functions_divides_the_ranks(pool, stage):
    for slice_, found in pool(4).run(sliced, stage):
        expected = train_plain(
            lambda s=slice_: build(MLP, seed=s),
            lambda step: global_batches(mlp_batch, step, 2),
            lambda params: torch.optim.AdamW(params, **ADAMW["params"]),
            STEPS,
            dtype=None,
        )
        for name, value in expected.weights.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
