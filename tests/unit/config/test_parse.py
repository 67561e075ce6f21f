"""What parsing keeps, forgives, remembers and reports."""

from __future__ import annotations

import base64
import json
import logging
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from zeropipe.config.parse import only_one, parse_config
from zeropipe.config.schema import Config, NoticeKind
from zeropipe.errors import ConfigError

MINIMAL = {"train_batch_size": 8, "zero_optimization": {"stage": 2}}


def kinds(config: Config) -> dict[NoticeKind, tuple[str, ...]]:
    return {notice.kind: notice.keys for notice in config.notices}


def test_every_form_of_source_gives_the_same_config(tmp_path) -> None:
    text = json.dumps(MINIMAL)
    path = tmp_path / "my.json"
    path.write_text(text, encoding="utf-8-sig")  # some editors write the mark
    encoded = base64.urlsafe_b64encode(text.encode()).decode()
    frozen = types.MappingProxyType({**MINIMAL, "zero_optimization": types.MappingProxyType({"stage": 2})})
    for source in (MINIMAL, path, str(path), text, encoded, frozen):
        config = parse_config(source)
        assert config.settings(changed=True) == {"train_batch_size": 8, "zero_optimization.stage": 2}
        assert config.raw == MINIMAL
    assert parse_config(config) is config


def test_none_and_the_empty_dict_are_all_defaults() -> None:
    assert parse_config(None) == parse_config({}) == Config()
    assert parse_config(None).settings(changed=True) == {}


def test_raw_is_the_very_dict_and_stays_untouched() -> None:
    given_dict = {
        "bfloat16": {"enabled": True},
        "train_batch_size": "auto",
        "zero_optimization": {"cpu_offload": True},
    }
    before = json.dumps(given_dict)
    config = parse_config(given_dict)
    assert config.raw is given_dict
    assert json.dumps(given_dict) == before


def test_auto_is_unset_everywhere_and_remembered() -> None:
    config = parse_config(
        {
            "train_batch_size": "auto",
            "gradient_clipping": "auto",
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "eps": 1e-8}},
            "zero_optimization": {"stage": 3, "offload_param": "auto", "reduce_bucket_size": "auto"},
            "bf16": {"enabled": "auto"},
            "pipeline": {"stages": "auto"},
            "scheduler": {"type": "auto", "params": {"warmup_num_steps": 10}},
        }
    )
    assert config.train_batch_size is None
    assert config.gradient_clipping == 1.0
    assert config.optimizer.params == {"eps": 1e-8}
    assert config.zero_optimization.reduce_bucket_size == 500_000_000
    assert not config.bf16.enabled
    assert config.auto == {
        "train_batch_size", "gradient_clipping", "optimizer.params.lr", "zero_optimization.offload_param",
        "zero_optimization.reduce_bucket_size", "bf16.enabled", "pipeline.stages", "scheduler.type",
    }  # fmt: skip
    assert config.is_auto("optimizer.params.lr")
    assert not config.is_auto("optimizer.params.eps")


def test_numbers_as_clients_write_them() -> None:
    config = parse_config(
        {
            "steps_per_print": float("inf"),
            "train_batch_size": 8.0,
            "zero_optimization": {"reduce_bucket_size": 5e8, "stage3_prefetch_bucket_size": 0.9 * 50 * 50},
            "fp16": {"min_loss_scale": 0.00001, "loss_scale": 0},
        }
    )
    assert config.steps_per_print == float("inf")
    assert config.train_batch_size == 8
    assert config.zero_optimization.reduce_bucket_size == 500_000_000
    assert isinstance(config.zero_optimization.reduce_bucket_size, int)
    assert config.zero_optimization.stage3_prefetch_bucket_size == 2250
    assert config.fp16.min_loss_scale == 1e-5


def test_infinity_in_a_file(tmp_path) -> None:
    path = tmp_path / "my.json"
    path.write_text('{"steps_per_print": Infinity}')
    assert parse_config(path).steps_per_print == float("inf")


@pytest.mark.parametrize(
    ("written", "read"),
    [("float32", "fp32"), ("torch.bfloat16", "bf16"), ("half", "fp16"), ("BF16", "bf16"), (None, None)],
)
def test_dtypes_by_any_of_their_names(written: str | None, read: str | None) -> None:
    assert parse_config({"communication_data_type": written}).communication_data_type == read


def test_old_forms_are_read_as_present_ones() -> None:
    config = parse_config(
        {
            "bfloat16": {"enabled": True},
            "fp32_allreduce": True,
            "allgather_size": 7,
            "zero_optimization": {
                "stage": 3,
                "cpu_offload": True,
                "cpu_offload_param": True,
                "cpu_offload_use_pin_memory": False,
                "stage3_gather_fp16_weights_on_model_save": True,
                "offload_optimizer": {"device": "none", "buffer_count": 2},
            },
        }
    )
    zero = config.zero_optimization
    assert config.precision == "bf16"
    assert config.communication_data_type == "fp32"
    assert zero.allgather_bucket_size == 7
    assert (zero.offload_optimizer.device, zero.offload_optimizer.buffer_count) == ("cpu", 2)
    assert (zero.offload_param.device, zero.offload_param.pin_memory) == ("cpu", False)
    assert zero.stage3_gather_16bit_weights_on_model_save
    assert "bfloat16" in kinds(config)[NoticeKind.RENAMED]
    assert parse_config({"zero_optimization": True}).zero_optimization.stage == 1
    assert parse_config({"zero_optimization": False}).zero_optimization.stage == 0
    off = parse_config(
        {"zero_optimization": {"stage": 2, "cpu_offload": False, "cpu_offload_use_pin_memory": True}}
    )
    assert off.zero_optimization.offload_optimizer.device == "none"


def test_null_sections_are_absent() -> None:
    config = parse_config(
        {"optimizer": None, "scheduler": None, "zero_optimization": {"offload_param": None}, "amp": None}
    )
    assert config.settings() == Config().settings()


def test_foreign_keys_are_passed_over_with_one_warning() -> None:
    config = parse_config(
        {
            "$schema": "./zeropipe.schema.json",
            "inference": {"tensor_parallel": {"tp_size": 2}},
            "my_team": {"enabled": True},
            "zero_optimization.reduce_bucket_size": 12.5,
        }
    )
    (notice,) = config.notices
    assert notice.kind is NoticeKind.FOREIGN
    assert notice.level == logging.WARNING
    assert notice.keys == ("inference", "my_team", "zero_optimization.reduce_bucket_size")
    assert all(name in notice.text for name in notice.keys)
    assert "\n" not in notice.text
    assert config.zero_optimization.reduce_bucket_size == 500_000_000


def test_keys_without_effect_are_said_once_and_only_when_they_ask_for_something() -> None:
    asked = parse_config(
        {
            "autotuning": {"enabled": True, "fast": False},
            "aio": {"block_size": 4096},
            "zero_optimization": {"stage": 2, "elastic_checkpoint": True},
            "compile": {"deepcompile": True},
        }
    )
    (notice,) = asked.notices
    assert notice.kind is NoticeKind.NO_EFFECT
    assert notice.level == logging.INFO
    assert set(notice.keys) == {
        "autotuning", "aio.block_size", "zero_optimization.elastic_checkpoint", "compile",
    }  # fmt: skip
    silent = parse_config(
        {
            "autotuning": {"enabled": False, "fast": False},
            "aio": {"block_size": 1_048_576, "thread_count": 1},
            "zero_optimization": {"stage": 2, "elastic_checkpoint": False},
            "amp": {"enabled": False},
            "curriculum_learning": {"enabled": "auto"},
            "activation_checkpointing": {"number_checkpoints": False},
        }
    )
    assert silent.notices == ()


def test_a_reference_model_at_stage_0_keeps_the_trained_models_settings() -> None:
    # Clients set the stage to 0 for a frozen model and leave the rest: none of it may become an error.
    config = parse_config(
        {
            "zero_optimization": {
                "stage": 0,
                "offload_optimizer": {"device": "nvme"},
                "offload_param": {"device": "nvme"},
                "mics_shard_size": 2,
                "zero_hpz_partition_size": 4,
                "stage3_max_live_parameters": 1e9,
            },
            "scheduler": {"type": "WarmupLR", "params": {}},
        }
    )
    assert set(kinds(config)[NoticeKind.NO_EFFECT]) == {
        f"zero_optimization.{name}"
        for name in ("offload_optimizer", "offload_param", "mics_shard_size", "zero_hpz_partition_size")
    }


def test_a_config_cannot_be_edited() -> None:
    config = parse_config(MINIMAL)
    with pytest.raises(ValidationError, match="frozen"):
        config.zero_optimization.stage = 3


def test_two_configs_share_nothing() -> None:
    first = parse_config({})
    first.optimizer.params["lr"] = 1.0
    assert parse_config({}).optimizer.params == {}


NAMES = sorted(Config.model_fields)


SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=4)
KEYS = st.text(max_size=12) | st.sampled_from([*NAMES, "stage", "bfloat16", "allgather_size"])


@given(st.dictionaries(KEYS, SCALARS | st.dictionaries(st.text(max_size=5), SCALARS)))
def test_any_dict_is_parsed_or_refused_with_a_fix(config: dict) -> None:
    try:
        parsed = parse_config(config)
    except ConfigError as error:
        fix = str(error)
    else:
        assert parsed.raw is config
        return
    assert "Fix: " in fix


def test_a_configuration_may_be_given_in_one_place_only() -> None:
    given = {"train_batch_size": 8}
    assert only_one({"config": given, "config_params": None, "args.deepspeed_config": None}) is given
    assert only_one({"config": None, "config_params": None, "args.deepspeed_config": "ds.json"}) == "ds.json"
    # A launcher's argument that is the very object is no second one.
    assert only_one({"config": given, "config_params": given, "args.deepspeed_config": None}) is given
    with pytest.raises(ConfigError, match="twice, as config and config_params"):
        only_one({"config": given, "config_params": dict(given), "args.deepspeed_config": None})
    with pytest.raises(ConfigError, match="no configuration"):
        only_one({"config": None, "config_params": None, "args.deepspeed_config": None})
