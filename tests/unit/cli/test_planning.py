"""``zeropipe plan`` and ``zeropipe report`` from a user's side: scripts as they write them, and what they get wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from zeropipe.cli.main import app

pytestmark = pytest.mark.process

DATA = """
import argparse, torch, zeropipe
parser = zeropipe.add_config_arguments(argparse.ArgumentParser())
parser.add_argument("--width", type=int, default=64)
parser.add_argument("--local_rank", type=int, default=0)
args = parser.parse_args()
zeropipe.init_distributed()
model = torch.nn.Sequential(*(torch.nn.Linear(args.width, args.width) for _ in range(4))).cuda()
config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
engine, *_ = zeropipe.initialize(args=args, model=model, config=config)
loader = torch.utils.data.DataLoader(torch.randn(40, args.width), batch_size=2, num_workers=1)
for x in loader:
    loss = engine(x.to(engine.device)).square().mean()
    engine.backward(loss)
    engine.step()
"""
PIPELINE = """
import torch, zeropipe
from zeropipe.pipe import LayerSpec, PipelineModule
layers = [LayerSpec(torch.nn.Linear, 64, 64) for _ in range(8)]
module = PipelineModule(layers, num_stages=4, loss_fn=torch.nn.functional.mse_loss, schedule="{schedule}")
config = {{"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 8, "zero_optimization": {{"stage": 1}},
          "optimizer": {{"type": "AdamW", "params": {{"lr": 1e-3}}}}}}
engine, *_ = zeropipe.initialize(model=module, config=config)
data = iter([(torch.randn(2, 64), torch.randn(2, 64))] * 80)
for _ in range(10):
    engine.train_batch(data)
"""


@pytest.fixture(autouse=True)
def _no_world() -> None:
    """A world is imagined only where there is none, and other tests of this process have left theirs."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _run(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.output


def _script(folder: Path, text: str) -> Path:
    path = folder / "train.py"
    path.write_text(text)
    return path


def test_a_script_with_its_arguments_and_another_configuration(tmp_path: Path) -> None:
    script, config, found = _script(tmp_path, DATA), tmp_path / "my.json", tmp_path / "plan.json"
    zero = {"stage": 2}
    config.write_text(
        json.dumps(
            {
                "train_micro_batch_size_per_gpu": 2,
                "zero_optimization": zero,
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            }
        )
    )
    page = tmp_path / "plan.html"
    options = ["--world", 64, "--device", "h200", "--config", config, "--json", found, "--report", page]
    code, text = _run("plan", *options, script, "--width", 128)
    assert code == 0, text
    assert "fits" in text
    plan = json.loads(found.read_text())
    assert plan["parameters"] == 4 * 128 * 129
    assert plan["settings"]["zero_optimization.stage"] == 2
    assert [one["rank"] for one in plan["ranks"]] == [0, 32, 63]
    assert "What a rank holds at its peak" in page.read_text()


def test_what_layers_send_that_differ_in_their_number_is_one_row(tmp_path: Path) -> None:
    """A model of 32 layers would fill three screens; and a rate is written as people write it."""
    config = tmp_path / "my.json"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    adam = {"type": "AdamW", "params": {"lr": 1e-3}}
    made = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero, "optimizer": adam}
    config.write_text(json.dumps(made))
    words = ["--world", 8, "--device", "h200", "--config", config, _script(tmp_path, DATA)]
    code, text = _run("plan", *words)
    assert code == 0, text
    rows = [line for line in text.splitlines() if "all gather" in line]
    assert len(rows) == 1
    assert "*.weight" in rows[0]
    assert "e+" not in text


def test_what_does_not_fit_has_an_exit_code_of_its_own(tmp_path: Path) -> None:
    code, text = _run("plan", "--device-memory", "1MB", _script(tmp_path, DATA))
    assert code == 3
    assert "does not fit" in text


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb-h1"])
def test_a_pipeline(tmp_path: Path, schedule: str) -> None:
    found = tmp_path / "plan.json"
    code, text = _run(
        "plan", "--world", 8, "--json", found, _script(tmp_path, PIPELINE.format(schedule=schedule))
    )
    assert code == 0, text
    sent = {row["op"] for rank in json.loads(found.read_text())["ranks"] for row in rank["traffic"]}
    assert {"send", "recv"} <= sent


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan"], "found neither"),
        (["plan", "none.py"], "no such script"),
        (["plan", "--device", "tpu", "SCRIPT"], "h200"),
        (["plan", "--device-memory", "lots", "SCRIPT"], "80GB"),
        (["plan", "--steps", "90", "SCRIPT"], "found 20"),
        (["plan", "--json", "/dev/null/x", "SCRIPT"], "give another --json"),
        (["plan", "--report", "/dev/null/x", "SCRIPT"], "give another --report"),
        (
            ["plan", "SCRIPT", "--world", "2"],
            "unrecognized arguments: --world 2. Fix: options of zeropipe plan",
        ),
        (["plan", "SCRIPT", "--world", "2"], "train.py:6: args = parser.parse_args()"),
        (["plan", "--batch", "4", "SCRIPT"], "--batch; expected --hf"),
        (["plan", "--host-memory", "9GB", "SCRIPT"], "--host-memory; expected --fit"),
        (
            ["plan", "--report", "x.html", "--compare", "a.json", "b.json", "SCRIPT"],
            "expected one plan, without --compare",
        ),
        (["report", "none"], "no record of a run"),
    ],
)
def test_what_users_get_wrong_is_named(tmp_path: Path, words: list[str], said: str) -> None:
    script = _script(tmp_path, DATA)
    code, text = _run(*(script if word == "SCRIPT" else word for word in words))
    assert code == 1
    assert said in text
    assert "Traceback" not in text


def test_a_file_that_is_no_plan(tmp_path: Path) -> None:
    (tmp_path / "record-00000.jsonl").write_text(
        '{"kind": "start", "time": 1.0, "settings": {}, "changed": []}\n'
    )
    (tmp_path / "plan.json").write_text('{"stage": 2}')
    code, text = _run("report", tmp_path, "--plan", tmp_path / "plan.json")
    assert code == 1
    assert "holds no plan" in text
    code, text = _run("report", tmp_path)
    assert code == 0
    assert (tmp_path / "report.html").exists()
