"""``zeropipe pipe plan``, as a user types it."""

import json

import pytest
from typer.testing import CliRunner

from zeropipe.cli.pipe import app


def _plan(*words):
    return CliRunner().invoke(app, ["plan", *words])


def test_a_plan_prints_grid_bubble_and_peaks():
    result = _plan(
        "--schedule", "zbv", "--stages", "4", "--micro-batches", "8", "--activation-bytes", "1048576"
    )
    assert result.exit_code == 0
    assert "bubble 0.0625" in result.output
    assert "rank 0: stages 0,7; peak activations 4 micro-batches, 4.0 MiB" in result.output


def test_best_ranks_what_fits():
    result = _plan("--best", "--memory", "4", "--costs", "1,1,1,0.1")
    assert result.exit_code == 0
    assert "gpipe" not in result.output
    assert "zb-h1" in result.output


def test_files_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    paths = [tmp_path / name for name in ("a.png", "a.svg", "a.json")]
    flags = [
        word
        for flag, path in zip(("--png", "--svg", "--trace"), paths, strict=True)
        for word in (flag, str(path))
    ]
    assert _plan("--stages", "2", "--micro-batches", "2", *flags).exit_code == 0
    assert all(path.stat().st_size for path in paths)
    json.loads(paths[2].read_text())


def test_a_schedule_file_and_a_profile_are_read(tmp_path):
    schedule, profile = tmp_path / "mine.csv", tmp_path / "costs.json"
    schedule.write_text("# mine\n0F0,0B0\n1F0,1B0\n")
    profile.write_text(json.dumps({"forward": [1, 2], "backward_input": 1, "activation": [5, 6]}))
    result = _plan("--schedule", str(schedule), "--costs", str(profile))
    assert result.exit_code == 0
    assert "peak activations 6" in result.output


def test_text_can_be_fed_back(tmp_path):
    path = tmp_path / "s.csv"
    path.write_text(_plan("--schedule", "zb-h1", "--text").output)
    assert "bubble 0.1250" in _plan("--schedule", str(path)).output


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--schedule", "zvb"], "'zbv'"),
        (["--costs", "1"], "F,B,W"),
        (["--costs", "none.json"], "none.json"),
        (["--best", "--memory", "0.1"], "memory"),
    ],
)
def test_mistakes_are_one_line(words, found):
    result = _plan(*words)
    assert result.exit_code == 1
    assert found in result.output
    assert "Traceback" not in result.output
