"""What the smaller names do that clients take from deepspeed; the engine's are in tests/dist."""

from __future__ import annotations

import collections
import contextlib
import io
import logging
import pickle
from types import ModuleType
from typing import Any

import pytest
import torch

import zeropipe
from tests.helpers.launch import python
from zeropipe.errors import UsageError
from zeropipe.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from zeropipe.runtime.zero.config import ZeroStageEnum

STARTING = """
from datetime import timedelta
import torch.distributed as dist
from zeropipe.compat import install_as_deepspeed
deepspeed = install_as_deepspeed()
assert not deepspeed.comm.is_initialized()
deepspeed.comm.init_distributed(dist_backend=None, auto_mpi_discovery=False, timeout=timedelta(minutes=1))
world = dist.group.WORLD
assert deepspeed.comm.is_initialized() and deepspeed.comm.get_rank() == 0
deepspeed.init_distributed("gloo", distributed_port=1234, timeout=None)
assert dist.group.WORLD is world
import importlib
groups = importlib.import_module("deepspeed.utils.groups")
assert groups.get_world_group() is world is groups.get_data_parallel_group()
dist.destroy_process_group()
print("started once")
"""


@pytest.mark.process
def test_starting_twice_and_with_none_is_fine() -> None:
    done = python("-c", STARTING)
    assert done.stdout == "started once\n", done.stderr


def test_groups_without_model_parallelism() -> None:
    from zeropipe.utils import groups

    assert (groups.get_data_parallel_rank(), groups.get_data_parallel_world_size()) == (0, 1)
    assert (groups.get_model_parallel_rank(), groups.get_model_parallel_world_size()) == (0, 1)
    assert (groups._get_sequence_parallel_rank(), groups._get_sequence_parallel_world_size()) == (0, 1)
    with pytest.raises(
        UsageError, match=r"sequences are not divided.*Fix: call initialize_sequence_parallel"
    ):
        groups._get_sequence_parallel_group()
    assert zeropipe.utils.groups is groups


def test_there_is_one_logger(deepspeed: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    from zeropipe.utils.logging import logger

    assert deepspeed.utils.logger is deepspeed.utils.logging.logger is deepspeed.logger is logger
    before = logger.level
    try:
        deepspeed.utils.logger.setLevel(logging.ERROR)
        deepspeed.log_dist("quiet", ranks=[0])
        deepspeed.utils.logger.setLevel(logging.INFO)
        deepspeed.log_dist("on rank 0", ranks=[0])
        deepspeed.log_dist("on another rank", ranks=[1])
        deepspeed.log_dist("on all", ranks=[-1])
        deepspeed.log_dist("on all too")
    finally:
        logger.setLevel(before)
    assert [record.message for record in caplog.records] == [
        "[Rank 0] on rank 0",
        "[Rank 0] on all",
        "[Rank 0] on all too",
    ]


def test_the_accelerator_names_a_device_that_torch_takes(
    deepspeed: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = deepspeed.accelerator.get_accelerator()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert torch.empty(0, device=here.current_device_name()).device == torch.device("cpu") == here.device()
    assert (here.device_name(), here.device_name(3), here.current_device()) == ("cpu", "cpu", "cpu")
    assert here.communication_backend_name() == "gloo" and here.is_synchronized_device()
    assert here.is_available() and here.is_bf16_supported() and here.is_fp16_supported()
    tensor = torch.ones(2)
    assert here.pin_memory(tensor) is tensor and here.on_accelerator(tensor)
    here.synchronize()  # torch.cpu's
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert (here.device_name(), here.device_name("0"), here.current_device_name()) == (
        "cuda",
        "cuda:0",
        "cuda:1",
    )
    assert here.current_device() == 1 and here.communication_backend_name() == "nccl"
    assert here.supported_dtypes() == [torch.float32, torch.float16]
    assert not here.on_accelerator(tensor) and not here.is_synchronized_device()
    assert here.nvtx is torch.cuda.nvtx
    with pytest.raises(AttributeError):
        _ = here.nothing_like_it


def test_on_device_builds_elsewhere_and_puts_everything_back(deepspeed: ModuleType) -> None:
    with deepspeed.OnDevice(dtype=torch.bfloat16, device="meta"):
        model = torch.nn.Linear(3, 2)
        explicit = torch.zeros(1, dtype=torch.float64)
    assert model.weight.is_meta and model.weight.dtype == torch.bfloat16 and explicit.dtype == torch.float64
    half = None
    with contextlib.suppress(ZeroDivisionError), deepspeed.utils.OnDevice(torch.float16, "cpu"):
        half = torch.zeros(1)
        1 / 0  # noqa: B018
    assert half is not None and half.dtype == torch.float16
    with deepspeed.OnDevice(torch.float16, "meta", enabled=False):
        plain = torch.zeros(1)
    assert (
        plain.dtype == torch.float32 == torch.zeros(1).dtype
        and not plain.is_meta
        and not torch.ones(1).is_meta
    )


Pair = collections.namedtuple("Pair", "left right")


def test_move_to_device_goes_through_containers() -> None:
    move = zeropipe.runtime.utils.move_to_device
    given = {"a": [torch.ones(2), 3, "x"], "b": Pair(torch.ones(1), (torch.ones(1), None))}
    moved = move(given, "meta")
    assert moved["a"][0].is_meta and moved["a"][1:] == [3, "x"]
    assert isinstance(moved["b"], Pair) and moved["b"].left.is_meta and moved["b"].right[1] is None
    assert not given["a"][0].is_meta
    only = move([torch.ones(1), torch.ones(2)], "meta", lambda item: torch.is_tensor(item) and len(item) == 2)
    assert [tensor.is_meta for tensor in only] == [False, True]


def test_memory_in_use_is_logged_when_it_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    import resource

    see = zeropipe.runtime.utils.see_memory_usage
    with caplog.at_level(logging.INFO, "zeropipe"):
        see("quiet")
        see("after the first step", force=True)
    (record,) = caplog.records
    message, _, fact = record.message.partition(": ")
    assert message == "after the first step"
    shown = float(fact.split("process at most ")[1].removesuffix(" GiB"))
    assert shown == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, abs=0.02)


def test_a_clone_for_saving_owns_its_elements_and_keeps_its_containers(deepspeed: ModuleType) -> None:
    clone = deepspeed.checkpoint.utils.clone_tensors_for_torch_save
    buffer = torch.arange(1000.0)
    given = collections.OrderedDict(w=buffer[10:20], rest=[Pair(buffer[:3], "s"), (None, 5)])
    copy = clone(given)
    assert type(copy) is collections.OrderedDict and type(copy["rest"][0]) is Pair
    assert torch.equal(copy["w"], buffer[10:20]) and copy["w"].untyped_storage().nbytes() == 40
    assert copy["rest"][1] == (None, 5)
    buffer.zero_()
    assert copy["w"][0] == 10


def test_activation_checkpointing_takes_lightnings_call(deepspeed: ModuleType) -> None:
    deepspeed.checkpointing.reset()
    try:
        deepspeed.checkpointing.configure(
            mpu_=None,
            partition_activations=False,
            contiguous_checkpointing=False,
            checkpoint_in_cpu=False,
            profile=False,
        )
        assert deepspeed.checkpointing.is_configured()
    finally:
        deepspeed.checkpointing.reset()


def pickled(module: str, name: str, state: dict[str, Any]) -> bytes:
    """What a process that has the real package writes for an object of its class ``module.name``."""
    out = io.BytesIO()
    writer = pickle._Pickler(out, 2)  # type: ignore[attr-defined]
    writer.write(b"\x80\x02c" + f"{module}\n{name}\n".encode() + b")\x81")
    writer.save(state)
    writer.write(b"b.")
    return out.getvalue()


def test_the_random_states_of_model_parallel_scripts(deepspeed: ModuleType) -> None:
    """Such scripts seed DeepSpeed's own tracker by its own name, and put states back that they kept."""
    from deepspeed.runtime.activation_checkpointing.checkpointing import (  # type: ignore[import-not-found]
        _CUDA_RNG_STATE_TRACKER,
        _MODEL_PARALLEL_RNG_TRACKER_NAME,
        _set_cuda_rng_state,
        checkpoint,
        get_cuda_rng_tracker,
        model_parallel_cuda_manual_seed,
        model_parallel_reconfigure_tp_seed,
    )

    tracker = deepspeed.checkpointing._CUDA_RNG_STATE_TRACKER
    assert tracker is _CUDA_RNG_STATE_TRACKER is get_cuda_rng_tracker()
    try:
        tracker.reset()
        device = deepspeed.get_accelerator()
        device.manual_seed(3)
        tracker.add(_MODEL_PARALLEL_RNG_TRACKER_NAME, 5)
        kept = device.get_rng_state()
        states = tracker.get_states()
        drawn = []

        def dropped(x: torch.Tensor) -> torch.Tensor:
            with tracker.fork():
                mask = torch.rand(4, device=x.device)
            drawn.append(mask)
            return (x * mask).exp()

        x = torch.ones(4, device=device.current_device_name(), requires_grad=True)
        checkpoint(dropped, x).sum().backward()
        assert len(drawn) == 2 and torch.equal(*drawn)
        assert x.grad is not None and torch.equal(x.grad, drawn[0] * drawn[0].exp())
        assert torch.equal(device.get_rng_state(), kept)  # the default state stood still
        tracker.set_states(states)
        dropped(x.detach())
        assert torch.equal(drawn[2], drawn[0])
        first = torch.rand(3, device=x.device)
        _set_cuda_rng_state(kept)
        assert torch.equal(torch.rand(3, device=x.device), first)
        model_parallel_cuda_manual_seed(7)
        seeded = tracker.get_states()
        model_parallel_reconfigure_tp_seed(8)
        assert not torch.equal(
            tracker.get_states()[_MODEL_PARALLEL_RNG_TRACKER_NAME], seeded[_MODEL_PARALLEL_RNG_TRACKER_NAME]
        )
    finally:
        deepspeed.checkpointing.reset()


def test_what_deepspeeds_files_name_can_be_loaded(deepspeed: ModuleType) -> None:
    scaler = pickle.loads(pickled("deepspeed.runtime.fp16.loss_scaler", "LossScaler", {"cur_scale": 64.0}))
    assert type(scaler) is LossScaler and scaler.loss_scale == 64.0
    state = {"cur_scale": 2.0, "cur_iter": 7}
    dynamic = pickle.loads(pickled("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler", state))
    assert type(dynamic) is DynamicLossScaler and dynamic.loss_scale == 2.0
    stage = pickle.loads(b"cdeepspeed.runtime.zero.config\nZeroStageEnum\n(I2\ntR.")
    assert stage is ZeroStageEnum.gradients and stage == 2
    piece = pickle.loads(
        pickled("deepspeed.utils.tensor_fragment", "fragment_address", {"numel": 5, "start": 7})
    )
    assert (piece.numel, piece.start) == (5, 7)


def test_a_configuration_is_read_under_the_name_that_scripts_import():
    """Scripts that import the name told their users to install deepspeed, and ended with exit code 0."""
    config = zeropipe.DeepSpeedConfig({"train_batch_size": 4, "bf16": {"enabled": True}}, mpu=None)
    assert (config.train_batch_size, config.bf16.enabled) == (4, True)
    assert (config.zero_optimization_stage, config.zero_enabled, config.bfloat16_enabled) == (0, False, True)
    assert (config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps) == (4, 1)
    assert config == config._param_dict == {"train_batch_size": 4, "bf16": {"enabled": True}}
    with pytest.raises(zeropipe.compat.configuration.DeepSpeedConfigError, match="train_batch_size"):
        zeropipe.DeepSpeedConfig({"train_batch_size": 0})
