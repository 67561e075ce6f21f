"""Features that scripts import under DeepSpeed's paths: each is the object that does it here."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import pytest
import torch

from zeropipe.compat.absent import AbsentError

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
