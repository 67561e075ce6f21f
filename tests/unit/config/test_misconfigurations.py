"""The table of mistakes: each message must name the key, show the value, and give a way out that works."""

# ruff: noqa: E501 - a mistake is one row of a table
from __future__ import annotations

import base64
import json
from typing import Any, NamedTuple

import pytest

from zeropipe.config.batch import check_world, solve_batch
from zeropipe.config.parse import parse_config
from zeropipe.errors import ConfigError


class Mistake(NamedTuple):
    name: str
    config: dict[str, Any]
    says: tuple[str, ...]  # key, value: all must stand in the message
    fix: str  # must stand after "Fix:"
    mended: dict[str, Any]  # what the fix leads to; must parse


def zero(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": keys}


MISTAKES = [
    Mistake("misspelt top level", {"train_bach_size": 8}, ("'train_bach_size'", "8"), "'train_batch_size'", {"train_batch_size": 8}),
    Mistake("other case", {"FP16": {"enabled": True}}, ("'FP16'", "True"), "'fp16'", {"fp16": {"enabled": True}}),
    Mistake("hyphens", {"gradient-clipping": 0.5}, ("'gradient-clipping'", "0.5"), "'gradient_clipping'", {"gradient_clipping": 0.5}),
    Mistake("zero for zero_optimization", {"zero": {"stage": 2}}, ("'zero'", "2"), "'zero_optimization'", zero(stage=2)),
    Mistake("torch's word for clipping", {"max_grad_norm": 1.0}, ("'max_grad_norm'", "1.0"), "'gradient_clipping'", {"gradient_clipping": 1.0}),
    Mistake("lr_scheduler", {"lr_scheduler": {"type": "WarmupLR"}}, ("'lr_scheduler'", "WarmupLR"), "'scheduler'", {"scheduler": {"type": "WarmupLR"}}),
    Mistake("section key at the top", {"stage": 2}, ("'stage'", "2"), '"zero_optimization": {"stage": ...}', zero(stage=2)),
    Mistake("fp16 key at the top", {"loss_scale": 128}, ("'loss_scale'", "128"), '"fp16": {"loss_scale": ...}', {"fp16": {"loss_scale": 128}}),
    Mistake("misspelt in a section", zero(stage=2, reduce_bucket=10), ("'zero_optimization.reduce_bucket'", "10"), "'reduce_bucket_size'", zero(reduce_bucket_size=10)),
    Mistake("misspelt in a nested section", zero(offload_optimizer={"devise": "cpu"}), ("'zero_optimization.offload_optimizer.devise'", "'cpu'"), "'device'", zero(offload_optimizer={"device": "cpu"})),
    Mistake("key of another section", {"bf16": {"enabled": True, "loss_scale": 1}}, ("'bf16.loss_scale'", "1"), "belongs in 'fp16'", {"fp16": {"loss_scale": 1}}),
    Mistake("top-level key in a section", zero(gradient_clipping=1.0), ("'zero_optimization.gradient_clipping'", "1.0"), "top level", {"gradient_clipping": 1.0}),
    Mistake("lr outside params", {"optimizer": {"type": "Adam", "lr": 0.1}}, ("'optimizer.lr'", "0.1"), '{"params": {"lr": ...}}', {"optimizer": {"type": "Adam", "params": {"lr": 0.1}}}),
    Mistake("stage 4", zero(stage=4), ("'zero_optimization.stage'", "4"), "0, 1, 2 or 3", zero(stage=3)),
    Mistake("stage as a section", {"zero_optimization": 2}, ("'zero_optimization'", "2"), '{"stage": 2}', zero(stage=2)),
    Mistake("fp16 as a switch", {"fp16": True}, ("'fp16'", "True"), '{"enabled": true}', {"fp16": {"enabled": True}}),
    Mistake("offload as a word", zero(stage=2, offload_optimizer="cpu"), ("'zero_optimization.offload_optimizer'", "'cpu'"), '{"device": "cpu"}', zero(stage=2, offload_optimizer={"device": "cpu"})),
    Mistake("number in quotes", zero(reduce_bucket_size="5e8"), ("'zero_optimization.reduce_bucket_size'", "'5e8'"), "without quotes", zero(reduce_bucket_size=5e8)),
    Mistake("fraction of a sample", {"train_batch_size": 2.5}, ("'train_batch_size'", "2.5", "whole number"), "8", {"train_batch_size": 8}),
    Mistake("zero samples", {"train_micro_batch_size_per_gpu": 0}, ("'train_micro_batch_size_per_gpu'", "0", "greater than 0"), "8", {"train_micro_batch_size_per_gpu": 8}),
    Mistake("true for a number", {"gradient_accumulation_steps": True}, ("'gradient_accumulation_steps'", "True"), "whole number", {"gradient_accumulation_steps": 1}),
    Mistake("null clipping", {"gradient_clipping": None}, ("'gradient_clipping'", "None"), "0.0", {"gradient_clipping": 0.0}),
    Mistake("negative clipping", {"gradient_clipping": -1}, ("'gradient_clipping'", "-1"), "0.0", {"gradient_clipping": 0.0}),
    Mistake("unknown device", zero(offload_param={"device": "gpu"}), ("'zero_optimization.offload_param.device'", "'gpu'", "'nvme'"), "none", zero(offload_param={"device": "none"})),
    Mistake("nvme without a folder", zero(stage=3, offload_param={"device": "nvme"}), ("'zero_optimization.offload_param.device'", "nvme"), '"nvme_path"', zero(stage=3, offload_param={"device": "nvme", "nvme_path": "/d"})),
    Mistake("nvme below stage 3", zero(stage=2, offload_optimizer={"device": "nvme", "nvme_path": "/d"}), ("'zero_optimization.offload_optimizer.device'", "nvme", "stage 2"), "'cpu'", zero(stage=2, offload_optimizer={"device": "cpu"})),
    Mistake("unknown dtype", {"communication_data_type": "fp64"}, ("'communication_data_type'", "'fp64'", "'bf16'"), "correct the value", {"communication_data_type": "fp32"}),
    Mistake("two precisions", {"fp16": {"enabled": True}, "bf16": {"enabled": True}}, ("'fp16.enabled'", "'bf16.enabled'", "true"), "false", {"bf16": {"enabled": True}}),
    Mistake("minimum above the first scale", {"fp16": {"enabled": True, "initial_scale_power": 2, "min_loss_scale": 8}}, ("'fp16.min_loss_scale'", "8"), "'fp16.initial_scale_power'", {"fp16": {"enabled": True, "initial_scale_power": 4, "min_loss_scale": 8}}),
    Mistake("two casts of inputs", {"fp16": {"enabled": True, "auto_cast": True}, "torch_autocast": {"enabled": True}}, ("'fp16.auto_cast'", "'torch_autocast.enabled'", "true"), "false", {"torch_autocast": {"enabled": True}}),
    Mistake("amp", {"amp": {"enabled": True, "opt_level": "O1"}}, ("'amp'", "O1"), "bf16", {"bf16": {"enabled": True}}),
    Mistake("quantized gradients", zero(stage=3, zero_quantized_gradients=True), ("'zero_optimization.zero_quantized_gradients'", "True"), "false", zero(stage=3, zero_quantized_gradients=False)),
    Mistake("curriculum", {"curriculum_learning": {"enabled": True, "schedule_type": "linear"}}, ("'curriculum_learning.schedule_type'", "'linear'"), "fixed_linear", {"curriculum_learning": {"enabled": True, "schedule_type": "fixed_linear"}}),
    Mistake("elasticity", {"elasticity": {"enabled": True}}, ("'elasticity'", "True"), "batch sizes", {"elasticity": {"enabled": False}}),
    Mistake("compression, deep inside", {"compression_training": {"weight_quantization": {"shared_parameters": {"enabled": True}}}}, ("'compression_training'", "True"), "remove", {}),
    Mistake("tensor parallelism", {"tensor_parallel": {"autotp_size": 2}}, ("'tensor_parallel.autotp_size'", "2"), "remove", {"tensor_parallel": {"autotp_size": 1}}),
    Mistake("summed gradients", {"gradient_allreduce_op": "sum"}, ("'gradient_allreduce_op'", "'sum'"), "multiply the loss", {"gradient_allreduce_op": "mean"}),
    Mistake("clipping inside the optimizer", {"optimizer": {"type": "Adam", "params": {"max_grad_norm": 0.5}}}, ("'optimizer.params.max_grad_norm'", "0.5"), "'gradient_clipping'", {"gradient_clipping": 0.5}),
    Mistake("lr in quotes", {"optimizer": {"type": "Adam", "params": {"lr": "1e-3"}}}, ("'optimizer.params.lr'", "'1e-3'"), "without quotes", {"optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}),
    Mistake("optimizer without a type", {"optimizer": {"params": {"lr": 0.1}}}, ("'optimizer.type'", "0.1"), '"type"', {"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}),
    Mistake("MiCS of no ranks", zero(stage=3, mics_shard_size=0), ("'zero_optimization.mics_shard_size'", "0"), "-1", zero(stage=3, mics_shard_size=-1)),
    Mistake("MiCS and hpZ", zero(stage=3, mics_shard_size=2, zero_hpz_partition_size=2), ("'zero_optimization.mics_shard_size'", "'zero_optimization.zero_hpz_partition_size'", "2"), "keep one", zero(stage=3, mics_shard_size=2)),
    Mistake("old and new name", zero(stage=2, cpu_offload=True, offload_optimizer={"device": "nvme", "nvme_path": "/d"}), ("'zero_optimization.cpu_offload'", "'nvme'"), "remove 'zero_optimization.cpu_offload'", zero(stage=2, offload_optimizer={"device": "cpu"})),
    Mistake("both bf16 sections", {"bfloat16": {"enabled": True}, "bf16": {"enabled": False}}, ("'bfloat16'", "True"), "remove 'bfloat16'", {"bf16": {"enabled": True}}),
    Mistake("unknown answer to overflow", {"fp16": {"on_min_scale": "ignore"}}, ("'fp16.on_min_scale'", "'ignore'", "'skip'"), '"raise"', {"fp16": {"on_min_scale": "raise"}}),
    Mistake("key that is no string", {8: "train_batch_size"}, ("8", "int"), "quote it", {"train_batch_size": 8}),  # type: ignore[dict-item]
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_explained_and_its_fix_works(mistake: Mistake) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(mistake.config)
    message, _, fix = str(caught.value).partition("Fix: ")
    for fact in mistake.says:
        assert fact in message
    assert mistake.fix in fix
    parse_config(mistake.mended)


def test_the_table_is_long_enough() -> None:
    assert len(MISTAKES) >= 25


def test_every_wrong_value_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"gradient_clipping": "much", "fp16": {"hysteresis": 0}})
    first, second = str(caught.value).splitlines()  # in the order of the schema
    assert "'fp16.hysteresis'; expected a number of at least 1, found 0" in first
    assert "'gradient_clipping'; expected a number, found 'much'" in second


def test_a_shard_group_must_divide_the_world() -> None:
    config = parse_config(zero(stage=3, mics_shard_size=4))
    check_world(config, 8)
    with pytest.raises(
        ConfigError, match=r"'zero_optimization.mics_shard_size'.*found 4.*Fix: use one of 1, 2, 3, 6"
    ):
        check_world(config, 6)


JSON_MISTAKES = [
    ('{"train_batch_size": 8,}', "line 1 column 24: a comma before '}'", "remove the last comma"),
    ('{\n  "betas": [0.9, 0.95,]\n}', "line 2 column", "remove the last comma"),
    ('{\n  // a comment\n  "fp16": {}\n}', "line 2 column 3: JSON has no comments", "remove the comment"),
    ('{"fp16": {} # why\n}', "JSON has no comments", "remove the comment"),
    ("{'fp16': {}}", "single quotes", "double quotes"),
    ('{"fp16": {"enabled": True}}', "True is Python", "write true"),
    ('{"optimizer": None}', "None is Python", "write null"),
    ('{"train_batch_size" 8}', "line 1 column 21", "correct the JSON"),
    ("", "empty", "{}"),
    ("[1, 2]", "no JSON object", "{ and }"),
    ('{"fp16": {"enabled": true, "enabled": false}}', "'enabled' is given twice in one object, as True and False", "keep one"),
    ("[" * 100_000, "nested too deeply", "no configuration"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "what", "fix"), JSON_MISTAKES)
def test_malformed_json_names_its_place(tmp_path, text: str, what: str, fix: str) -> None:
    path = tmp_path / "my.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse_config(path)
    message, _, found_fix = str(caught.value).partition("Fix: ")
    assert str(path) in message
    assert what in message
    assert fix in found_fix


@pytest.mark.parametrize("source", ["absent.json", "", "a\0b", "x" * 5000, "bm8ganNvbg=="])
def test_a_missing_file_is_an_error_that_shows_the_path(source: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        parse_config(source)
    assert repr(source)[:20] in str(caught.value) or "\\x00" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_other_unreadable_sources(tmp_path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        parse_config(tmp_path)
    binary = tmp_path / "weights.json"
    binary.write_bytes(b"\x80\x02")
    with pytest.raises(ConfigError, match=r"weights.json.*not text: byte 0"):
        parse_config(binary)
    with pytest.raises(ConfigError, match=r"found int.*Fix: pass config"):
        parse_config(3)  # type: ignore[arg-type]


def test_base64_that_holds_bad_json_is_explained_too() -> None:
    text = base64.urlsafe_b64encode(json.dumps({"fp16": {}}).encode()[:-1] + b",}").decode()
    with pytest.raises(ConfigError, match="base64 text given as config"):
        parse_config(text)


BATCH_MISTAKES = [
    # train, micro, accumulation, world, fixes that must be offered
    ((32, 4, 2, 8), ("set train_batch_size to 64", "set gradient_accumulation_steps to 1", "set train_micro_batch_size_per_gpu to 2")),
    ((10, 4, 1, 2), ("set train_batch_size to 8",)),
    ((10, None, None, 4), ("set train_batch_size to 8 or 12",)),
    ((2, None, None, 4), ("set train_batch_size to 4",)),
    ((30, 4, None, 2), ("set train_batch_size to 24 or 32", "set train_micro_batch_size_per_gpu to 3")),
    ((30, None, 4, 2), ("set train_batch_size to 24 or 32", "set gradient_accumulation_steps to 3")),
    ((None, None, 4, 2), ("add train_micro_batch_size_per_gpu, for example 1, which makes train_batch_size 8",)),
]  # fmt: skip


@pytest.mark.parametrize(("given", "fixes"), BATCH_MISTAKES)
def test_the_classic_mistake_names_four_numbers_and_fixes_that_work(given, fixes) -> None:
    with pytest.raises(ConfigError) as caught:
        solve_batch(*given)
    message, _, offered = str(caught.value).partition("Fix: ")
    names = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "world size",
    )
    for name, value in zip(names, given, strict=True):
        assert f"{name} {'not given' if value is None else value}" in message
    for fix in fixes:
        assert fix in offered


@pytest.mark.parametrize("bad", [0, -1, 2.0, True, "8"])
@pytest.mark.parametrize("place", range(4))
def test_each_number_must_be_whole_and_positive(bad: Any, place: int) -> None:
    given: list[Any] = [8, 4, 2, 1]
    given[place] = bad
    with pytest.raises(ConfigError, match=r"at least 1.*Fix: "):
        solve_batch(*given)
