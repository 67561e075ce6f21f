"""``zeropipe pipe plan``, as a user types it."""

import json

import pytest
from typer.testing import CliRunner

from zeropipe.cli.main import app


def _plan(*words):
    return CliRunner().invoke(app, ["pipe", "plan", *words])


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


BAD_PROFILES = [
    '{"forward": ["x"]}',
    '{"forward": [1, 2, 3]}',
    '{"forward": []}',
    '{"forward": NaN}',
    "[]",
    "{",
    "\udcff",
]


@pytest.mark.parametrize(
    "words",
    [
        *(["--stages", n] for n in ("0", "-3", "100000000")),
        *(["--micro-batches", n] for n in ("0", "-1", "100000000")),
        *(["--schedule", "interleaved", "--chunks", n] for n in ("0", "-1", "1000000")),
        *(["--costs", text] for text in ("", "0,0,0", "nan,1,1", "inf,1,1", "-1,1,1", "1,1,1,1,1", "a,b,c")),
        *(["--schedule", text] for text in ("", ",", "folder.csv", "binary.csv", "empty.csv", "0F0,0F0")),
        *(["--memory", n] for n in ("-1", "nan")),
        ["--activation-bytes", "nan"],
        ["--best", "--stages", "0"],
        ["--best", "--costs", "profile0.json"],
        *(["--costs", f"profile{i}.json"] for i in range(len(BAD_PROFILES))),
        *([flag, path] for flag in ("--png", "--svg", "--trace") for path in ("none/x.png", "folder.csv")),
        ["--svg", "x.png"],
        ["--best", "--trace", "none/x.json"],
    ],
    ids=" ".join,
)
def test_no_argument_ends_in_a_traceback(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.csv").touch()
    for i, text in enumerate(BAD_PROFILES):
        (tmp_path / f"profile{i}.json").write_bytes(text.encode(errors="surrogateescape"))
    result = _plan(*words)
    assert result.exit_code == 1
    assert result.output.startswith("error: ") or "\nerror: " in result.output
    assert isinstance(result.exception, SystemExit)


def test_best_draws_the_best(tmp_path):
    """It printed the table, and no picture."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "best.png"
    result = _plan("--best", "--memory", "4", "--png", str(path))
    assert result.exit_code == 0
    assert path.stat().st_size > 10_000
    assert f"wrote {path}" in result.output


def test_the_grid_wraps_at_the_width_of_the_terminal(monkeypatch):
    whole = _plan("--schedule", "zbv", "--micro-batches", "32").output
    for columns in ("20", "80"):
        monkeypatch.setenv("COLUMNS", columns)
        grid = _plan("--schedule", "zbv", "--micro-batches", "32").output.split("\ntime ")[0]
        assert max(map(len, grid.splitlines())) <= int(columns)
        rows: dict[str, list[str]] = {}
        for line in filter(None, grid.splitlines()):
            rank, _, cells = line.partition(" | ")
            rows.setdefault(rank, []).extend(cells.split())
        assert len(rows) == 4
        assert rows["0"].count("F31") == 1
        assert [c for c in rows["3"] if c != "."] == [
            c for line in whole.splitlines() if line.startswith("3 | ") for c in line[4:].split() if c != "."
        ]


def test_one_long_step_does_not_fill_the_screen():
    result = _plan("--costs", "1e-9,1,1", "--stages", "2", "--micro-batches", "2")
    assert result.exit_code == 0
    assert len(result.output) < 30_000
