"""The example that new users run first: it trains, can be killed at any moment, and ends with the same weights."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from tests.helpers.launch import ROOT, Started, start

SCRIPT = ROOT / "examples" / "train_gpt.py"
LONGEST = 150  # lines of the script
MOST_OF_OURS = 15  # lines that are zeropipe's
TIME_LIMIT = 150.0  # seconds for one run of a few steps on a busy machine


@pytest.fixture
def run_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from support import run_folder

    yield run_folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "support"]:
        del sys.modules[name]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A run of six small steps on a text of its own; the folder is left to the caller."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the {n}th line says {n * n}\n" for n in range(2000)))
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 2,
                "gradient_clipping": 1.0,
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
                "scheduler": {
                    "type": "WarmupCosineLR",
                    "params": {"total_num_steps": 12, "warmup_num_steps": 2},
                },
                "zero_optimization": {"stage": 2},
            }
        )
    )
    options = ["--steps=12", "--save-every=2", "--measure-every=3", "--sample=4"]
    return [sys.executable, str(SCRIPT), f"--text={text}", f"--config={config}", *options]


def weights(output: str) -> str:
    found = re.search(r"Weights \(SHA-256\): (\w+)", output)
    assert found, output
    return found[1]


def finish(process: Started) -> str:
    assert process.wait(TIME_LIMIT), f"still running:\n{process.stdout()}\n{process.stderr()}"
    assert process.process.returncode == 0, process.stdout() + process.stderr()
    return process.stdout()


def wait_until_gone(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that are still there after some seconds."""
    return psutil.wait_procs(processes, timeout=20)[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_twice_and_started_again_ends_with_the_same_weights(
    command: list[str], tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with start([*command, f"--folder={whole}"]) as run:
        expected = finish(run)

    # Once with SIGKILL to the script alone: the ranks must not outlive it, or they would go on writing.
    with start([*command, f"--folder={broken}"]) as run:
        assert run.wait_for("step 3/12", TIME_LIMIT), run.stdout() + run.stderr()
        everyone = run.tree()
        run.signal(signal.SIGKILL)
        assert wait_until_gone(everyone) == []
    # Once with Ctrl-C, which says how to go on.
    with start([*command, f"--folder={broken}"]) as run:
        assert run.wait_for("step 4/12", TIME_LIMIT), run.stdout() + run.stderr()
        everyone = run.tree()
        run.signal(signal.SIGINT)
        assert run.wait(20)
        assert wait_until_gone(everyone) == []
        assert "goes on from the last checkpoint" in run.stdout()
        assert "Traceback" not in run.stdout() + run.stderr()
    with start([*command, f"--folder={broken}"]) as run:
        output = finish(run)

    assert re.search(r"Going on from the checkpoint of step \d+\.", output)
    assert weights(output) == weights(expected)
    assert_shows_everything(expected, whole)
    assert history(whole) == history(broken)
    assert len(list(broken.glob("global_step*"))) == 2, "old checkpoints are removed"

    with start([*command, f"--folder={broken}"]) as run:
        assert run.wait(TIME_LIMIT)
        assert run.process.returncode == 0
        assert "This run is finished" in run.stdout()
        assert "--fresh" in run.stdout()
        assert weights(run.stdout()) == weights(expected)


def assert_shows_everything(output: str, folder: Path) -> None:
    for part in ("Bytes per rank", "optimizer state", "Communication of one step", "all_gather", "A sample:"):
        assert part in output
    ratios = [
        float(ratio) for ratio in re.findall(r"(?:parameters|gradients|state).*│\s+(\d\.\d{3}) │", output)
    ]
    assert len(ratios) == 3
    assert ratios == pytest.approx([1.0] * 3, abs=0.005), "the budget of the design"
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def history(folder: Path) -> str:
    """The curve's numbers stand in the report; all of it but the folder's own name must agree."""
    return (folder / "report.txt").read_text().replace(str(folder), "")


def test_the_script_is_short_and_little_of_it_is_ours() -> None:
    lines = SCRIPT.read_text().splitlines()
    assert len(lines) < LONGEST
    assert 0 < sum("# <-" in line for line in lines[10:]) < MOST_OF_OURS


def test_mistakes_are_said_in_one_sentence(command: list[str], tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stag": 2}}')
    with start([*command, f"--config={wrong}", f"--folder={tmp_path / 'run'}"]) as run:
        assert run.wait(TIME_LIMIT)
        assert "zero_optimization.stag" in run.stderr()
        assert "Traceback" not in run.stderr()
    assert not (tmp_path / "run").exists()


SETTINGS: dict[str, Any] = {"steps": 6, "config": {"optimizer": {"lr": 0.1}}}


def test_a_run_is_not_continued_with_other_settings(run_folder: ModuleType, tmp_path: Path) -> None:
    run_folder.open_run(tmp_path / "run", SETTINGS, fresh=False).close()
    run_folder.open_run(tmp_path / "run", SETTINGS, fresh=False).close()
    other = {"steps": 6, "config": {"optimizer": {"lr": 0.2}}}
    with pytest.raises(SystemExit, match=r"config\.optimizer\.lr: 0\.1 then, 0\.2 now") as error:
        run_folder.open_run(tmp_path / "run", other, fresh=False)
    assert "--fresh" in str(error.value)
    assert "steps" not in str(error.value)


def test_a_folder_with_other_files_is_never_touched(run_folder: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit, match="not a run of this example"):
        run_folder.open_run(tmp_path, SETTINGS, fresh=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_killed_before_anything_was_written(run_folder: ModuleType, tmp_path: Path) -> None:
    for name in ("lock", "settings.tmp"):
        (tmp_path / name).write_text("{")
    run_folder.open_run(tmp_path, SETTINGS, fresh=False).close()
    run_folder.open_run(tmp_path, SETTINGS, fresh=False).close()


def test_two_runs_in_one_folder_are_refused(run_folder: ModuleType, tmp_path: Path) -> None:
    with (
        run_folder.open_run(tmp_path / "run", SETTINGS, fresh=False),
        pytest.raises(SystemExit, match="Another process is training"),
    ):
        run_folder.open_run(tmp_path / "run", SETTINGS, fresh=True)


def test_fresh_forgets_everything(
    run_folder: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run_folder.open_run(run, SETTINGS, fresh=False).close()
    (run / "global_step2").mkdir()
    run_folder.finish(run, "a report")
    with pytest.raises(SystemExit) as end:
        run_folder.open_run(run, SETTINGS, fresh=False)
    assert end.value.code == 0
    assert "This run is finished" in capsys.readouterr().out
    run_folder.open_run(run, SETTINGS, fresh=True).close()
    assert {path.name for path in run.iterdir()} == {"lock", "settings.json"}


def test_only_complete_checkpoints_are_counted_and_removed(run_folder: ModuleType, tmp_path: Path) -> None:
    for name in ("global_step2", "global_step10", "global_step4", "global_step12.tmp"):
        (tmp_path / name).mkdir()
    run_folder.keep_newest(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "global_step4",
        "global_step10",
        "global_step12.tmp",
    }
