"""Under the name ``deepspeed`` what DeepSpeed passes over is a warning; by our own name it is an error.

The keys and shapes are those met in public repositories.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from zeropipe.config.parse import parse_config
from zeropipe.config.schema import NoticeKind
from zeropipe.errors import ConfigError

WILD = Path(__file__).resolve().parents[4] / "shared" / "wild_configs.json"
# What was met -> the key in the warning, and what it says was meant.
PASSED_OVER: list[tuple[dict[str, Any], str, str]] = [
    ({"optimizer": {"type": "Adam", "adam_w_mode": True}}, "optimizer.adam_w_mode", ""),
    ({"offload_optimizer": {"device": "cpu"}}, "offload_optimizer", "zero_optimization.offload_optimizer"),
    ({"loss_scale": 0}, "loss_scale", "fp16.loss_scale"),
    ({"grandient_accumulation_steps": 4}, "grandient_accumulation_steps", "gradient_accumulation_steps"),
    ({"fp16": {"enable": True}}, "fp16.enable", "fp16.enabled"),
    ({"zero_optimization": {"stages": 3}}, "zero_optimization.stages", "zero_optimization.stage"),
]
# What would give other results than DeepSpeed gives stays an error -> its key.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zenflow"),
    ({"tensor_parallel": {"autotp_size": 4}}, "autotp_size"),
    ({"msamp": {"enabled": True}}, "msamp"),
    ({"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1.0}}}, "max_grad_norm"),
]


@pytest.fixture
def under_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(__zeropipe__=True))  # type: ignore[arg-type]


def warned(config: Any) -> str:
    return " ".join(n.text for n in parse_config(config).notices if n.kind is NoticeKind.FOREIGN)


@pytest.mark.parametrize(
    ("config", "key", "meant"), PASSED_OVER, ids=lambda v: v if isinstance(v, str) else ""
)
def test_an_unknown_key_is_one_warning_under_the_name(
    under_the_name: None, config: Any, key: str, meant: str
) -> None:
    text = warned(config)
    assert key in text and "\n" not in text
    assert (f"meant: {meant}?" in text) if meant else "meant" not in text


@pytest.mark.parametrize(
    ("config", "key", "meant"), PASSED_OVER, ids=lambda v: v if isinstance(v, str) else ""
)
def test_by_our_own_name_it_is_an_error(config: Any, key: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=key.rpartition(".")[2]):
        parse_config(config)


def test_a_module_of_that_name_that_is_not_ours_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace())  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        parse_config({"loss_scale": 0})


@pytest.mark.parametrize(("config", "key"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_what_would_change_results_is_an_error_everywhere(
    under_the_name: None, config: Any, key: str
) -> None:
    with pytest.raises(ConfigError, match=key):
        parse_config(config)


@pytest.mark.parametrize("name", ["#flops_profiler", "# was: 3", "#"])
def test_keys_that_people_put_away_with_a_hash_are_silent(name: str) -> None:
    config = parse_config({name: {"enabled": True}, "zero_optimization": {"stage": 1, name: 2}})
    assert config.notices == () and config.zero_optimization.stage == 1


def test_a_pipelines_reentrant_checkpoints_are_a_notice() -> None:
    """Layers are recomputed inside the one backward, with the same gradients; the default is worth no word."""
    assert parse_config({"pipeline": {"use_reentrant": True}}).notices == ()
    (notice,) = parse_config({"pipeline": {"use_reentrant": False}}).notices
    assert notice.kind is NoticeKind.NO_EFFECT and "pipeline.use_reentrant" in notice.text


def test_a_limit_that_is_given_twice_alike_is_one_limit() -> None:
    given = {
        "gradient_clipping": 1.0,
        "optimizer": {"type": "Adam", "params": {"lr": 0.1, "max_grad_norm": 1.0}},
    }
    config = parse_config(given)
    assert config.optimizer is not None and config.optimizer.params == {"lr": 0.1}
    assert given["optimizer"]["params"]["max_grad_norm"] == 1.0  # the user's dict stays
    with pytest.raises(ConfigError, match="max_grad_norm"):
        parse_config(given | {"gradient_clipping": 0.5})


def test_a_comma_too_many(under_the_name: None, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '{"train_batch_size": 4, "wandb": {"enabled": false, "group": "a,}b,]", }, "betas": [1, 2,\n],}'
    config = parse_config(text)
    assert config.train_batch_size == 4 and config.wandb.group == "a,}b,]"
    monkeypatch.delitem(sys.modules, "deepspeed")
    with pytest.raises(ConfigError, match="remove the last comma"):
        parse_config(text)


@pytest.mark.skipif(not WILD.exists(), reason="the configurations of public repositories are not kept here")
def test_public_configurations_that_deepspeed_takes(under_the_name: None) -> None:
    """Each one that is refused here asks for what would change results."""
    for entry in json.loads(WILD.read_text()):
        if entry["deepspeed_0.19.8"] != "accepted":
            continue
        try:
            parse_config(entry["config"])
        except ConfigError as error:
            assert "is not offered" in str(error) or "max_grad_norm" in str(error), error
