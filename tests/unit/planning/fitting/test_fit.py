"""What --fit chooses is the fastest of all that fit, and what it writes is the user's configuration with that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import zeropipe
from tests.unit.cli.test_planning import _run, _script
from zeropipe.errors import ConfigError, UsageError
from zeropipe.planning.fitting.choices import Choice, Space

pytestmark = pytest.mark.process
WIDTH = 256
CONFIG = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
}


@pytest.fixture(autouse=True)
def _no_world() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Model(nn.Module):
    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return x


def _device(folder: Path) -> str:
    """A GPU whose process takes nothing, so that limits are those of the model."""
    path = folder / "small.json"
    path.write_text(
        json.dumps({"name": "small", "kind": "cuda", "base": 0, "memory": 10**12, "ranks_per_node": 2})
    )
    return str(path)


def _model(recompute: bool = False) -> nn.Module:
    return Model(recompute)


def _batch(micro: int) -> torch.Tensor:
    return torch.randn(micro, 64, WIDTH)


@pytest.mark.parametrize(
    ("world", "batch"), [(2, 4), pytest.param(4, 32, marks=[pytest.mark.soak, pytest.mark.timeout(900)])]
)
def test_of_all_that_fit_the_fastest(tmp_path: Path, world: int, batch: int) -> None:
    """Brute force plays each choice with all its micro-steps; the limits go from what nothing meets to what all do."""
    device, every, config = _device(tmp_path), {}, {**CONFIG, "train_batch_size": batch}
    config["train_micro_batch_size_per_gpu"] = 1
    for one in Space(batch, world, node=2).choices():
        every[one] = zeropipe.plan(
            lambda one=one: Model(one.recompute), lambda one=one: _batch(one.micro), one.written(config, world),
            world=world, device=device, ranks=(0,),
        )  # fmt: skip
    limits = sorted({plan.needed for plan in every.values()})
    for limit in (limits[0] - 1, limits[0], limits[len(limits) // 3], limits[-1]):
        fits = {one: plan.seconds.total for one, plan in every.items() if plan.needed <= limit}
        found = zeropipe.fit(_model, _batch, config, world=world, device=device, device_memory=limit)
        assert found.looks < len(every)
        if not fits:
            assert found.choice is None
            assert found.refused
            continue
        assert found.choice is not None
        assert found.plan is not None
        assert found.plan.fits
        assert fits[found.choice] <= 1.1 * min(fits.values())
        # Accumulation that was not played in full has the time and the bytes of what is.
        assert found.plan.seconds.total == pytest.approx(fits[found.choice], rel=1e-6)
        assert found.plan.needed == every[found.choice].needed
        assert found.config == found.choice.written(config, world)
        assert all(one.seconds <= 1.0001 * fits[found.choice] for one in found.refused)


def test_parts_that_are_kept_and_those_that_a_program_does_not_follow(tmp_path: Path) -> None:
    given = {**CONFIG, "zero_optimization": {"stage": 2}}
    found = zeropipe.fit(
        lambda: Model(False), lambda: _batch(4), given, world=4, device=_device(tmp_path), keep=("stage",)
    )
    assert found.kept.keys() == {"stage", "micro", "recompute", "pipeline"}
    assert found.choice == Choice(2, 4, 2)
    assert found.config == {**given, "gradient_accumulation_steps": 2}
    with pytest.raises(ConfigError, match="some of stage"):
        zeropipe.fit(_model, _batch, given, world=4, keep=("stages",))


@pytest.mark.soak
def test_host_memory_that_offload_may_take(tmp_path: Path) -> None:
    given = {**CONFIG, "bf16": {"enabled": True}}
    asked = {"world": 4, "device": _device(tmp_path), "device_memory": 7 * 10**6}
    away = zeropipe.fit(_model, _batch, given, **asked)
    assert away.choice is not None
    assert away.choice.offload != "none"
    less = zeropipe.fit(_model, _batch, given, **asked, host_memory="1MB")
    assert less.choice is None or less.choice.offload == "none"
    assert any("that a node has for offload" in one.why for one in less.refused)


def test_what_fails_as_it_is_given_is_an_error_of_its_own(tmp_path: Path) -> None:
    def batch() -> torch.Tensor:
        raise FileNotFoundError("/data/tokens.bin")

    with pytest.raises(UsageError, match=r"tokens\.bin"):
        zeropipe.fit(_model, batch, CONFIG, world=2)


def test_what_fails_elsewhere_is_a_reason(tmp_path: Path) -> None:
    """This loss wants a parameter by its shape, which stage 3 has cut."""

    def loss(output: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        if any(one.numel() == 0 for one in models[-1].parameters()):
            raise ValueError("a weight is not there")
        return output.square().mean()

    models: list[nn.Module] = []

    def make() -> nn.Module:
        models.append(Model(False))
        return models[-1]

    found = zeropipe.fit(
        make, _batch, CONFIG, world=2, device=_device(tmp_path), device_memory=10**7, loss=loss
    )
    assert all(one.choice.stage == 3 for one in found.refused if "a weight is not there" in one.why)
    assert any("it cannot be run" in one.why for one in found.refused)


SCRIPT = """
import sys, torch, zeropipe
micro, width = int(sys.argv[1]), 64
model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(4)))
engine, *_ = zeropipe.initialize(model=model, config={"train_batch_size": 1})
while True:
    engine.backward(engine(torch.randn(MICRO, width)).square().mean())
    engine.step()
"""


@pytest.mark.parametrize("micro", ["micro", "engine.train_micro_batch_size_per_gpu()", "4"])
def test_a_script_whose_batch_follows_or_not(tmp_path: Path, micro: str) -> None:
    """By its arguments, by the engine, or not at all: then the micro-batch stays, and is said to."""
    config, chosen, plan = (tmp_path / name for name in ("given.json", "chosen.json", "plan.json"))
    config.write_text(json.dumps({**CONFIG, "fp16": {"enabled": False}}))
    script = _script(tmp_path, SCRIPT.replace("MICRO", micro))
    argument = "{micro}" if micro == "micro" else 4
    options = ["--fit", "--config", config, "-o", chosen, "--json", plan, "--device", _device(tmp_path)]
    code, text = _run("plan", "--world", 2, *options, script, argument)
    assert code == 0, text
    assert "chosen: stage" in text
    assert ("makes batches of one size" in text) == (micro == "4")
    written = json.loads(chosen.read_text())
    assert written["train_batch_size"] == 32
    assert written["fp16"] == {"enabled": False}
    assert written["train_micro_batch_size_per_gpu"] == (4 if micro == "4" else 16)
    assert json.loads(plan.read_text())["fits"]
    assert zeropipe.config.parse.parse_config(written)


def test_two_configurations_side_by_side(tmp_path: Path) -> None:
    script, paths = _script(tmp_path, SCRIPT.replace("MICRO", "micro")), []
    for stage in (1, 3):
        paths.append(tmp_path / f"z{stage}.json")
        paths[-1].write_text(json.dumps({**CONFIG, "zero_optimization": {"stage": stage}}))
    code, text = _run("plan", "--world", 2, "--compare", *paths, script, 4)
    assert code == 0, text
    for line in (
        "zero_optimization.stage",
        "moments",
        "the process itself",
        "together at the peak",
        "sent inside a node",
        "samples/s",
    ):
        assert line in text
    code, text = _run("plan", "--world", 2, "--device-memory", "1MB", "--compare", *paths, script, 4)
    assert code == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--fit"], "found none"),
        (["-o", "x.json", "--config", "CONFIG"], "--output; expected --fit"),
        (["--fit", "--config", "CONFIG", "--keep", "lr"], "some of stage"),
        (["--fit", "--config", "CONFIG", "--compare", "CONFIG", "CONFIG"], "found both"),
        (["--compare", "CONFIG", "none.json"], "cannot be read"),
        (["--fit", "--config", "CONFIG", "--device-memory", "1MB"], "nothing fits"),
    ],
)
def test_what_users_get_wrong(tmp_path: Path, words: list[str], said: str) -> None:
    config = tmp_path / "given.json"
    config.write_text(json.dumps(CONFIG))
    script = _script(tmp_path, SCRIPT.replace("MICRO", "micro"))
    code, text = _run(
        "plan", "--world", 2, *(config if word == "CONFIG" else word for word in words), script, 4
    )
    assert code in (1, 3)
    assert said in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"},
            "a number for train_batch_size",
        ),
        ({"reproducible": {"slots": 16}, "train_batch_size": None}, "reproducible.slots"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload_param alone"),
    ],
)
def test_what_a_search_would_not_keep_is_refused(more: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        zeropipe.fit(lambda: nn.Linear(2, 2), lambda: torch.ones(4, 2), {**CONFIG, **more}, world=8)


def test_groups_by_their_other_name_are_kept(tmp_path: Path) -> None:
    config = {**CONFIG, "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}
    script = _script(tmp_path, SCRIPT.replace("MICRO", "4"))
    (tmp_path / "given.json").write_text(json.dumps(config))
    keep = [word for part in ("stage", "micro", "shard", "offload") for word in ("--keep", part)]
    options = ["--fit", "--config", tmp_path / "given.json", "-o", tmp_path / "chosen.json", *keep]
    code, text = _run("plan", "--world", 4, "--device", _device(tmp_path), *options, script, 4)
    assert code == 0, text
    assert "as given: stage 3 over 2 ranks" in text
    assert json.loads((tmp_path / "chosen.json").read_text())["zero_optimization"]["mics_shard_size"] == 2
