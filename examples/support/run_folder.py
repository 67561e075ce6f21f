"""The folder of one run: refuses to mix two runs in it, says when the run is finished, keeps it small."""

import fcntl
import json
import shutil
import sys
from pathlib import Path
from typing import Any, TextIO

SETTINGS = "settings.json"
REPORT = "report.txt"
LOCK = "lock"
JUST_BEGUN = {LOCK, "settings.tmp"}  # what a run leaves that was killed before its settings were written


def open_run(run: Path, settings: dict[str, Any], fresh: bool) -> TextIO:
    """Make or check `run` and return its lock, to be held open while training; exits with a plain sentence
    when the run is finished, when it was made with other settings, or when it is being trained right now.
    """
    names = {path.name for path in run.iterdir()} if run.exists() else set()
    if names - JUST_BEGUN and SETTINGS not in names:
        sys.exit(f"{run} holds files that are not a run of this example. Give another folder with --folder.")
    run.mkdir(parents=True, exist_ok=True)
    lock = (run / LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(
            f"Another process is training in {run}. Wait for it, stop it, or use another folder with --folder."
        )
    try:
        if fresh:
            _empty(run)
        if (run / SETTINGS).exists():
            _check(run, settings)
        else:
            _write(run / SETTINGS, json.dumps(settings, indent=2))
    except BaseException:
        lock.close()
        raise
    return lock


def _empty(run: Path) -> None:
    for item in run.iterdir():
        if item.is_dir():
            shutil.rmtree(item)
        elif item.name not in (LOCK, SETTINGS):  # the settings go last: they mark the folder as ours
            item.unlink()
    (run / SETTINGS).unlink(missing_ok=True)


def _check(run: Path, settings: dict[str, Any]) -> None:
    before, settings = _flat(json.loads((run / SETTINGS).read_text())), _flat(settings)
    changed = [
        f"  {key}: {before.get(key)!r} then, {settings.get(key)!r} now"
        for key in sorted({*before, *settings})
        if before.get(key) != settings.get(key)
    ]
    if changed:
        sys.exit(
            f"The run in {run} was started with other settings:\n"
            + "\n".join(changed)
            + "\nGo on with its settings, start anew with --fresh, or use another folder with --folder."
        )
    if (run / REPORT).exists():
        print((run / REPORT).read_text())
        print(f"This run is finished; all of it is in {run}. To start anew: make train ARGS=--fresh")
        sys.exit(0)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def finish(run: Path, report: str) -> None:
    """Mark the run as finished, for good: the next start prints `report` instead of training."""
    _write(run / REPORT, report)


def keep_newest(run: Path, count: int = 2) -> None:
    """Remove all checkpoints but the newest `count`; called by one rank after a save."""
    found = {path.name.removeprefix("global_step"): path for path in run.glob("global_step*")}
    complete = sorted(int(step) for step in found if step.isdigit())
    for step in complete[:-count]:
        shutil.rmtree(found[str(step)])


def _write(path: Path, text: str) -> None:
    """All or nothing, also when killed in between."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)
