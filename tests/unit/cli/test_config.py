"""``zeropipe config`` from a user's side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from zeropipe.cli.main import SUBCOMMANDS, app
from zeropipe.config import reference

GOOD = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 2},
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}},
    "my_own": 1,
    "flops_profiler": {"enabled": True},
}


@pytest.fixture
def good(tmp_path: Path) -> str:
    path = tmp_path / "my.json"
    path.write_text(json.dumps(GOOD))
    return str(path)


def run(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(args))
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def test_check_says_what_the_config_means(good: str) -> None:
    code, out, _ = run("config", "check", good, "--world", "8")
    assert code == 0
    for fact in (
        "32 = 2 per rank x 2 accumulation x 8 rank(s)",
        "bf16",
        "my_own",
        "flops_profiler",
        "[0.9, 0.95]",
    ):
        assert fact in out
    assert "gradient_clipping" not in out  # only what differs from the default


def test_check_fails_with_the_message_and_exit_code_1(good: str) -> None:
    code, out, err = run("config", "check", good, "--world", "3")
    assert code == 1
    assert out == ""
    assert "error: the batch sizes have no solution" in err
    assert "Fix: set train_batch_size to 30 or 36" in err
    assert run("config", "check", "absent.json")[0] == 1


def test_check_leaves_auto_batch_sizes_open(tmp_path: Path) -> None:
    path = tmp_path / "auto.json"
    path.write_text('{"train_batch_size": "auto", "gradient_accumulation_steps": 2}')
    code, out, _ = run("config", "check", str(path))
    assert code == 0
    assert "left to the software in between: train_batch_size" in out


def test_square_brackets_in_names_are_shown_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "my.json"
    path.write_text('{"[bold]mine[/]": 1}')
    assert "[bold]mine[/]" in run("config", "check", str(path))[1]


def test_schema_and_reference(tmp_path: Path) -> None:
    code, out, _ = run("config", "schema")
    assert code == 0
    assert json.loads(out) == reference.json_schema()
    target = tmp_path / "docs" / "configuration.md"
    assert run("config", "reference", "-o", str(target))[0] == 0
    assert target.read_text() == reference.markdown()
    code, _, err = run("config", "reference", "-o", str(tmp_path))
    assert code == 1
    assert "--output" in err


def test_help_lists_every_subcommand_by_name() -> None:
    code, out, _ = run("--help")
    assert code == 0
    for name in SUBCOMMANDS:
        assert f" {name} " in out


def test_an_unknown_subcommand_is_an_error() -> None:
    assert run("confg")[0] == 2
