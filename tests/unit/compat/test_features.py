"""Features that scripts import under DeepSpeed's paths: each is the object that does it here."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from zeropipe.compat.absent import AbsentError
from zeropipe.errors import CheckpointError, UsageError

_RUNTIME = "zeropipe.runtime"
SAME = {
    "profiling.flops_profiler:FlopsProfiler": f"{_RUNTIME}.flops",
    "profiling.flops_profiler:get_model_profile": f"{_RUNTIME}.flops",
    "profiling.flops_profiler.profiler:flops_to_string": f"{_RUNTIME}.flops",
    "runtime.data_pipeline.curriculum_scheduler:CurriculumScheduler": f"{_RUNTIME}.curriculum",
    "runtime.data_pipeline.data_sampling.data_analyzer:DataAnalyzer": f"{_RUNTIME}.data_pipeline.analyzer",
    "runtime.data_pipeline.data_sampling.data_sampler:DeepSpeedDataSampler": f"{_RUNTIME}.data_pipeline.sampler",
    "runtime.data_pipeline.data_sampling.indexed_dataset:MMapIndexedDataset": f"{_RUNTIME}.data_pipeline.indexed",
    "runtime.progressive_layer_drop:ProgressiveLayerDrop": f"{_RUNTIME}.curriculum",
}


@pytest.mark.parametrize("path", SAME)
def test_a_feature_is_the_object_that_does_it(deepspeed: ModuleType, path: str) -> None:
    module, _, name = path.partition(":")
    assert getattr(import_module(f"deepspeed.{module}"), name) is getattr(import_module(SAME[path]), name)


def test_dropping_tokens_is_refused_where_it_would_begin(deepspeed: ModuleType) -> None:
    helper = import_module("deepspeed.runtime.data_pipeline.data_routing.helper")
    model = torch.nn.Linear(2, 2)
    with pytest.raises(AbsentError, match="drop tokens in the model's own forward"):
        helper.convert_to_random_ltd(model, torch.nn.Linear)
    assert list(helper.save_without_random_ltd(model)) == ["weight", "bias"]
    assert list(helper.remove_random_ltd_state_dict({"layer.0.random_ltd_layer.weight": 1})) == [
        "layer.0.weight"
    ]


# ---- experts: there are none ----


def test_scripts_without_expert_layers_get_their_param_groups_back(deepspeed: ModuleType) -> None:
    moe = import_module("deepspeed.moe.utils")
    model = torch.nn.Linear(2, 2)
    params, group = list(model.parameters()), {"params": list(model.parameters()), "weight_decay": 0.1}
    assert not any(map(moe.is_moe_param, params)) and moe.has_moe_layers(model) == (False, 0)
    assert moe.is_moe_param_group({"moe": True}) and not moe.is_moe_param_group(group)
    split = moe.split_params_into_different_moe_groups_for_optimizer
    assert split(group)[0] is group and split([group])[0] is group
    assert moe.configure_moe_param_groups(params) == [{"params": params, "name": "dense-params"}]
    assert moe.configure_moe_param_groups([group])[0] is group
    assert moe.split_params_into_shared_and_expert_params(params) == (params, [])
    model(torch.ones(1, 2)).sum().backward()
    shared, experts = moe.split_params_grads_into_shared_and_expert_params(params)
    assert len(shared) == 2 and experts == []


def test_an_expert_layer_says_what_to_do_where_it_is_built_or_marked(deepspeed: ModuleType) -> None:
    from deepspeed.moe.layer import MoE  # type: ignore[import-not-found]

    with pytest.raises(AbsentError, match="set_z3_leaf_modules"):
        MoE(hidden_size=4, expert=torch.nn.Linear(4, 4))
    marked = torch.nn.Parameter(torch.zeros(2))
    marked.allreduce = False  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"allreduce = False.*remove the mark"):
        import_module("deepspeed.moe.utils").configure_moe_param_groups([marked])


# ---- files of checkpoints ----


def test_a_checkpoint_engine_of_the_users_own(deepspeed: ModuleType, tmp_path: Path) -> None:
    engines = import_module("deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine")
    base = import_module("deepspeed.runtime.checkpoint_engine.checkpoint_engine")
    engine, path = engines.TorchCheckpointEngine(), str(tmp_path / "one.pt")
    info = base.CheckpointCommitInfo(tag="t", save_dir=str(tmp_path), save_latest=True)
    engine.create(info)
    engine.set_commit_info(info)
    shared = torch.arange(4.0)
    engine.save({"a": shared, "view": shared[1:], "step": 3}, path)
    assert engine.commit("t") is True and engine.get_commit_info() == info
    back = engine.load(path, map_location="cpu")
    assert back["step"] == 3 and torch.equal(back["view"], shared[1:])
    assert back["view"].untyped_storage().data_ptr() == back["a"].untyped_storage().data_ptr()
    assert (
        not engine.is_decoupled()
        and engine.is_data_parallel_writer(0)
        and not engine.is_data_parallel_writer(1)
    )
    with pytest.raises(FileNotFoundError):
        engine.load(str(tmp_path / "none.pt"))
    torch.save({"a": Path}, path)
    with pytest.raises(CheckpointError, match="runs code"):
        engine.load(path)

    class Counting(base.CheckpointEngine):
        pass

    with pytest.raises(UsageError, match="Counting"):
        Counting().save({}, path)


def megatron(whole: dict[str, torch.Tensor], ranks: int, rank: int, version: float) -> dict[str, object]:
    """What Megatron's rank would hold of whole weights."""
    part: dict[str, torch.Tensor] = {}
    for name, value in whole.items():
        if "query_key_value" in name and version == 0:
            part[name] = torch.cat([third.chunk(ranks)[rank] for third in value.chunk(3)])
        elif "layernorm" in name:
            part[name] = value
        else:
            part[name] = value.chunk(ranks, 1 if name.endswith(("dense.weight", "4h_to_h.weight")) else 0)[
                rank
            ]
    return {"module": part, "iteration": 7}


@pytest.mark.parametrize("version", [0, 2.0])
def test_megatrons_files_load_at_another_number_of_ranks(
    deepspeed: ModuleType, tmp_path: Path, version: float
) -> None:
    factory = import_module("deepspeed.runtime.state_dict_factory").SDLoaderFactory
    shapes = {
        "h.attention.query_key_value.weight": (24, 4), "h.attention.query_key_value.bias": (24,),
        "h.attention.dense.weight": (4, 8), "h.mlp.dense_h_to_4h.weight": (16, 4), "h.mlp.dense_h_to_4h.bias": (16,),
        "h.mlp.dense_4h_to_h.weight": (4, 16), "word_embeddings.weight": (8, 4), "h.input_layernorm.weight": (4,),
    }  # fmt: skip
    whole = {name: torch.randn(shape) for name, shape in shapes.items()}
    files = [str(tmp_path / f"mp_rank_0{rank}.pt") for rank in range(2)]
    for rank, file in enumerate(files):
        torch.save(megatron(whole, 2, rank, version), file)
    for ranks in (1, 2, 4):
        for rank in range(ranks):
            loader = factory.get_sd_loader(files, sd_type="Megatron", version=version)
            path, found, (scales, merged) = loader.load(ranks, rank)
            wanted = megatron(whole, ranks, rank, version)["module"]
            assert found["iteration"] == 7 and scales is None and path == files[rank * 2 // ranks]
            assert merged == max(1, 2 // ranks) and found["module"].keys() == wanted.keys()
            for name, value in wanted.items():
                assert torch.equal(found["module"][name], value), (ranks, rank, name)
    loader.sanity_check(files[0])
    by_json = factory.get_sd_loader_json({"type": "Megatron", "checkpoints": files, "version": version})
    assert by_json.load(2, 1)[0] == files[1]
    for bad, text in (((3, 0), "divisor"), ((16, 0), "cannot be cut")):
        with pytest.raises(CheckpointError, match=text):
            factory.get_sd_loader(files, version=version).load(*bad)
    with pytest.raises(CheckpointError, match=r"missing.*none\.pt"):
        factory.get_sd_loader([files[0], str(tmp_path / "none.pt")])
    with pytest.raises(CheckpointError, match="pass version"):
        factory.get_sd_loader(files).load(1, 0) if version == 0 else factory.get_sd_loader(files).load(4, 0)


def test_a_checkpoint_becomes_universal_by_the_command_that_scripts_call(
    deepspeed: ModuleType, tmp_path: Path
) -> None:
    import zeropipe

    torch.manual_seed(0)
    settings = {"train_batch_size": 1, "optimizer": {"type": "Adam", "params": {"lr": 0.1}}}
    model = torch.nn.Linear(3, 2)
    engine, *_ = zeropipe.initialize(model=model, config=settings)
    engine.backward(engine(torch.ones(1, 3)).sum())
    engine.step()
    engine.save_checkpoint(str(tmp_path), "there")
    engine.destroy()
    converter = import_module("deepspeed.checkpoint.ds_to_universal")
    output = tmp_path / "there_universal"
    converter.main(
        converter.parse_arguments(["--input_folder", str(tmp_path / "there"), "--output_folder", str(output)])
    )
    saved = torch.load(output / "zero" / "weight" / "fp32.pt", weights_only=True)
    assert torch.equal(saved["param"].view(2, 3), model.weight.detach())
    assert (tmp_path / "latest_universal").read_text() == "there_universal"
    with pytest.raises(CheckpointError):
        converter.main(
            converter.parse_arguments(
                ["--input_folder", str(tmp_path / "no"), "--output_folder", str(output)]
            )
        )


# ---- scalars and collectives ----


def test_a_scripts_own_scalars(deepspeed: ModuleType, tmp_path: Path) -> None:
    from deepspeed.monitor.monitor import MonitorMaster  # type: ignore[import-not-found]

    section = {"csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}}
    for given in (section, deepspeed.DeepSpeedConfig({"train_batch_size": 1, **section}).monitor_config):
        monitor = MonitorMaster(given)
        assert monitor.enabled
        monitor.write_events([("Train/loss", 0.5, 1)])
        monitor.close()
    assert (tmp_path / "job" / "Train_loss.csv").read_text().splitlines() == ["step,loss", "1,0.5", "1,0.5"]


def test_collectives_are_counted_from_configure_on(deepspeed: ModuleType) -> None:
    comm = import_module("deepspeed.comm")
    log = import_module("zeropipe.comm.record").SEAM.log
    comm.configure(enabled=True, prof_ops=["all_reduce"])
    try:
        assert log.on
        comm.log_summary()
    finally:
        comm.configure(enabled=False)
    assert not log.on
    comm.configure(deepspeed.DeepSpeedConfig({"train_batch_size": 1, "comms_logger": {"enabled": True}}))
    assert log.on
    comm.configure(enabled=False)


def test_the_logger_of_collectives_shows_and_steers_the_one_log(
    deepspeed: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    from deepspeed.comm import comms_logger  # type: ignore[import-not-found]
    from deepspeed.utils.comms_logging import CommsLogger  # type: ignore[import-not-found]

    log = import_module("zeropipe.comm.record").SEAM.log
    calls = [object() for _ in range(4)]
    try:
        comms_logger.start_profiling_op(["all_reduce"])
        assert comms_logger.enabled and not comms_logger.prof_all and comms_logger.prof_ops == ["all_reduce"]
        for call, op in zip(calls, ["all_reduce", "all_gather", "all_reduce", "broadcast"], strict=True):
            log.began(call, op, 4000, 2)
            log.ended(call)
        (found,) = CommsLogger().comms_dict.items()
        count, ms, wire, bus = found[1][4000]
        assert found[0] == "all_reduce" and count == 2 == len(ms) == len(wire) == len(bus)
        assert sum(ms) == pytest.approx(log.tallies()[0].seconds * 1e3)
        assert wire[0] == pytest.approx(4000 * 8 / (ms[0] * 1e6)) == pytest.approx(bus[0])  # 2 ranks
        comms_logger.log_summary()
        assert "all_reduce" in capsys.readouterr().out
        assert comms_logger.log_all(print_log=False, return_dict=True) == comms_logger.get_raw_data()
        assert capsys.readouterr().out == ""
        comms_logger.start_profiling_op(["broadcast"])
        comms_logger.stop_profiling_op(["all_reduce"])
        assert comms_logger.prof_ops == ["broadcast"]
        comms_logger.start_profiling_comms()
        assert comms_logger.prof_all
        comms_logger.stop_profiling_comms()
        assert not comms_logger.enabled and comms_logger.has_data()
        comms_logger.reset_data()
        assert not comms_logger.has_data() and comms_logger.comms_dict == {}
        section = {"enabled": True, "prof_all": False, "prof_ops": ["all_gather"]}
        comms_logger.configure(deepspeed.DeepSpeedConfig({"train_batch_size": 1, "comms_logger": section}))
        assert comms_logger.prof_ops == ["all_gather"]
    finally:
        log.stop()
        log.reset()
