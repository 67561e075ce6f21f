"""What the smaller names do that public scripts take from deepspeed; those that need ranks are in tests/dist."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import zeropipe
from zeropipe.compat import configuration, estimators, facts, runner, timers, tools
from zeropipe.errors import ConfigError, UsageError


def test_every_word_of_the_accelerator_works_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """``memory_allocated``, ``empty_cache``, ``manual_seed``, random states and typed tensors raised."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = zeropipe.get_accelerator()
    assert here is zeropipe.get_accelerator()
    grown = torch.ones(8 * 2**20)  # 32 MB, touched
    assert 0 < here.memory_allocated() <= here.max_memory_allocated() < here.total_memory()
    assert here.memory_allocated() >= grown.nbytes
    assert 0 < here.available_memory() <= here.total_memory()
    assert here.memory_stats()["allocated_bytes.all.peak"] >= here.memory_reserved() > 0
    for nothing in (here.empty_cache, here.synchronize, here.reset_peak_memory_stats, here.range_pop):
        assert nothing() is None
    here.set_device(0)
    assert (here.device_count(), here.current_device(), here.name()) == (1, "cpu", "cpu")
    state = here.get_rng_state()
    first = torch.rand(3)
    here.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    here.manual_seed(5)
    first = torch.rand(3)
    here.manual_seed_all(5)
    assert torch.equal(torch.rand(3), first)
    assert here.initial_seed() == 5 == here.default_generator(0).initial_seed()
    assert isinstance(here.FloatTensor([1.0]), torch.Tensor)
    assert isinstance(torch.ones(2, dtype=torch.bfloat16), here.BFloat16Tensor)
    begin, end = here.Event(enable_timing=True), here.Event(enable_timing=True)
    begin.record()
    with here.stream(here.Stream()):
        end.record(here.current_stream())
    assert end.query() and begin.elapsed_time(end) >= 0
    graph = here.create_graph()
    with here.capture_to_graph(graph):
        x = torch.ones(2) + 1
    here.replay_graph(graph)
    assert x.sum() == 4
    environment: dict[str, str] = {}
    here.set_visible_devices_envs(environment, [0, 2])
    assert environment == {"CUDA_VISIBLE_DEVICES": "0,2"}
    assert here.lazy_call(lambda: 3) == 3
    with pytest.raises(UsageError, match="CUDA_VISIBLE_DEVICES"):
        zeropipe.accelerator.set_accelerator(object())


def test_facts_of_the_installation(deepspeed: ModuleType) -> None:
    import deepspeed.git_version_info as info
    from deepspeed.ops import __compatible_ops__
    from deepspeed.version import version

    assert version == info.version == deepspeed.__version__ == facts.version
    assert info.torch_info["version"] == ".".join(torch.__version__.split(".")[:2])
    assert info.installed_ops == {} == __compatible_ops__
    assert deepspeed.constants.TORCH_DISTRIBUTED_DEFAULT_PORT == 29500
    assert callable(deepspeed.env_report.main)


def test_a_configuration_has_the_attributes_that_people_read(tmp_path: Path) -> None:
    given = {
        "train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3}},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
        "fp16": {"enabled": True, "loss_scale": 128},
        "gradient_clipping": 0.5,
    }
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(given))
    config = configuration.DeepSpeedConfig(str(file))
    assert dict(config) == given
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu) == (8, 2)
    assert (config.gradient_accumulation_steps, config.gradient_clipping) == (4, 0.5)
    assert (config.optimizer_name, config.optimizer_params) == ("adamw", {"lr": 0.1})
    assert (config.scheduler_name, config.scheduler_params) == ("WarmupLR", {"warmup_num_steps": 3})
    assert (config.zero_enabled, config.zero_optimization_stage) == (True, 3)
    assert config.zero_config.offload_optimizer.device == configuration.OffloadDeviceEnum.cpu == "cpu"
    assert (config.fp16_enabled, config.bfloat16_enabled, config.loss_scale) == (True, False, 128)
    many = configuration.DeepSpeedConfig(given, mpu=SimpleNamespace(get_data_parallel_world_size=lambda: 2))
    assert many.train_micro_batch_size_per_gpu == 1
    assert zeropipe.config.parse.parse_config(config).zero_optimization.stage == 3  # initialize takes it
    with pytest.raises(AttributeError):
        _ = config.nothing_like_it
    with pytest.raises(ConfigError, match=r"8.*3"):
        configuration.DeepSpeedConfig({"train_batch_size": 8, "gradient_accumulation_steps": 3})


@pytest.mark.parametrize("name", ["bf16", "bfloat16", "torch.bfloat16", torch.bfloat16])
def test_a_dtype_by_any_of_its_names(name: Any) -> None:
    assert configuration.DtypeEnum(name) is configuration.DtypeEnum.bf16
    assert configuration.DtypeEnum(name).value is torch.bfloat16


def test_estimators_print_what_the_pages_say(capsys: pytest.CaptureFixture[str]) -> None:
    """14 bytes a parameter over the ranks at stage 3, 16 in host memory; 2 and 14 over the ranks at stage 2."""
    assert estimators.estimate_zero2_model_states_mem_needs(100, 4, 2, cpu_offload=False)[1] == 200 + 175
    assert estimators.estimate_zero2_model_states_mem_needs(100, 4, 1, True, 1.0) == (1600, 200)
    needs = estimators.estimate_zero3_model_states_mem_needs
    assert needs(1000, 100, 4, 1, False, False, True, 1.0) == (0, 400 + 3500, 400)
    assert needs(1000, 100, 4, 1, True, True, True, 1.0) == (16000, 400, 400)
    assert needs(1000, 100, 4, 1, True, True, False, 1.0)[0] == 16000
    model = torch.nn.Sequential(torch.nn.Linear(1000, 1000), torch.nn.Linear(1000, 10))
    estimators.estimate_zero3_model_states_mem_needs_all_live(model, num_gpus_per_node=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "HW: Setup with 1 node, 2 GPUs per node."
    assert lines[2] == "SW: Model with 1M total params, 1M largest layer params at ZeRO stage 3."
    assert len(lines) == 3 + 1 + 6
    estimators.estimate_zero2_model_states_mem_needs_all_cold(10**9, num_gpus_per_node=8)
    assert "offload_optimizer=none" in capsys.readouterr().out.splitlines()[-1]


def test_partitions() -> None:
    assert tools.partition_uniform(10, 3) == [0, 4, 7, 10]
    assert tools.partition_uniform(2, 4) == [0, 1, 2, 2, 2]
    assert tools.partition_balanced([1, 1, 1, 9], 2) == [0, 3, 4]
    assert tools.partition_balanced([0.5, 0.25, 0.25, 1.0], 2) == [0, 3, 4]
    assert tools.partition_balanced([3], 2) == [0, 1, 1]


def test_seeds_reach_every_generator() -> None:
    drawn = []
    for _ in range(2):
        tools.set_random_seed(7)
        drawn.append((random.random(), float(np.random.rand()), torch.rand(1).item()))
    assert drawn[0] == drawn[1]


def test_norms_and_clipping() -> None:
    tensors = [torch.tensor([3.0]), torch.tensor([[4.0]])]
    assert tools.get_global_norm([3, 4]) == 5.0
    assert tools.get_global_norm_of_tensors(tensors) == 5.0
    assert tools.get_global_norm_of_tensors(tensors, math.inf) == 4.0
    assert tools.clip_tensors_by_global_norm(tensors, 1.0) == 5.0
    assert tools.get_global_norm_of_tensors(tensors).item() == pytest.approx(1.0, rel=1e-5)
    param = torch.nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([3.0, 4.0])
    assert tools.clip_grad_norm_([param], 0.5) == 5.0
    assert param.grad.norm().item() == pytest.approx(0.5, rel=1e-5)


def test_small_tools() -> None:
    padded = tools.align_dense_tensors([torch.ones(3), torch.ones(2)], 4)
    assert [t.numel() for t in padded] == [3, 2, 3] and not padded[2].any()
    param = torch.nn.Parameter(torch.zeros(1))
    assert not tools.is_model_parallel_parameter(param)
    param.tensor_model_parallel = True  # type: ignore[attr-defined]
    assert tools.is_model_parallel_parameter(param)
    assert tools.bwc_tensor_model_parallel_rank() == 0
    assert tools.bwc_tensor_model_parallel_rank(SimpleNamespace(get_model_parallel_rank=lambda: 2)) == 2
    tools.empty_cache()
    assert tools.get_ma_status() >= 0

    @tools.instrument_w_nvtx
    def twice(x: int) -> int:
        """Two."""
        return 2 * x

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        assert twice(4) == 8
    assert twice.__doc__ == "Two."
    assert any("twice" in event.key for event in seen.key_averages())


def test_timers(caplog: pytest.LogCaptureFixture) -> None:
    clocks = timers.SynchronizedWallClockTimer()
    timer = clocks(timers.FORWARD_GLOBAL_TIMER)
    assert clocks("fwd") is timer and clocks.has_timer("fwd") and not clocks.has_timer("bwd")
    timer.start()
    assert timer.started_
    timer.stop(record=True)
    assert timer.mean() > 0 and clocks.get_mean(["fwd", "none"]) == {"fwd": timer.mean()}
    with caplog.at_level("INFO", logger="zeropipe"):
        clocks.log(["fwd", "none"])
    assert "time (ms) | fwd: " in caplog.text
    assert timer.elapsed() == 0.0
    idle = timers.NoopTimer()
    idle("fwd").start()
    idle("fwd").stop()
    idle.log(["fwd"])
    assert idle.get_mean(["fwd"]) == {}
    said: list[str] = []
    rate = timers.ThroughputTimer(batch_size=4, start_step=1, steps_per_output=1, logging_fn=said.append)
    assert rate.avg_samples_per_sec() == -math.inf
    for _ in range(3):
        rate.start()
        rate.stop(global_step=True)
    assert rate.global_step_count == 3 and rate.avg_samples_per_sec() > 0
    assert len(said) == 2 and "RunningAvgSamplesPerSec=" in said[0]


def test_hostfiles(tmp_path: Path, deepspeed: ModuleType) -> None:
    from deepspeed.launcher.runner import (
        DLTS_HOSTFILE,
        EXPORT_ENVS,
        fetch_hostfile,
        parse_inclusion_exclusion,
    )

    assert DLTS_HOSTFILE == "/job/hostfile"
    EXPORT_ENVS.append("MINE")  # as scripts do at their top
    runner.EXPORT_ENVS.remove("MINE")
    assert fetch_hostfile(str(tmp_path / "none")) is None
    (tmp_path / "hosts").write_text("a slots=2\nb slots=4\n")
    pool = fetch_hostfile(str(tmp_path / "hosts"))
    assert pool == {"a": 2, "b": 4}
    assert parse_inclusion_exclusion(pool, "a@b:0,2", "") == {"a": [0, 1], "b": [0, 2]}
    assert parse_inclusion_exclusion(pool, "", "b") == {"a": [0, 1]}
    with pytest.raises(ConfigError, match="include"):
        parse_inclusion_exclusion(pool, "c", "")


def test_words_to_the_log(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tools.print_dist("hello", ranks=[0])
    tools.print_dist("not here", ranks=[1])
    assert capsys.readouterr().out == "[Rank 0] hello\n"
    tools.print_json_dist({"a": 1}, ranks=[0], path=str(tmp_path / "x.json"))
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1, "rank": 0}
    with caplog.at_level("INFO", logger="zeropipe"):
        tools.print_configuration(SimpleNamespace(b=2, a=1), "settings")
    assert [record.getMessage().split()[0] for record in caplog.records] == ["settings:", "a", "b"]
    before = tools.logger.level
    tools.set_log_level_from_string("error")
    assert not tools.should_log_le("warning") and tools.should_log_le("error")
    tools.logger.setLevel(before)
