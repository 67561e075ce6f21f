"""The two files that a benchmark leaves beside itself: a table for people, and JSON with where it was measured."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.common.rounds import Row, median_or_none

MB = 1e6


def environment() -> dict[str, Any]:
    """What must be known of the machine and the versions to judge a number."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),  # above zero at the start: somebody else was busy on this machine
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "zeropipe")},
    }


def table(rows: Sequence[Row], reference: str, gpu: bool = False) -> str:
    """Markdown, one line per contender and dtype: time, time against `reference` (same round), memory."""
    memory = "GPU peak, MB" if gpu else "peak growth, MB"
    lines = [
        f"| contender | dtype | step, ms | relative to {reference} (median, range) | {memory} | building, MB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        seconds = median_or_none(row.seconds)
        relative = median_or_none(row.relative)
        peak = median_or_none(row.gpu_peak if gpu else row.growth)
        building = median_or_none(row.building)
        if seconds is None or peak is None or building is None:
            lines.append(f"| {row.contender} | {row.dtype} | not run: {row.why_not} | | | |")
            continue
        span = f"{relative:.2f} ({min(row.relative):.2f}-{max(row.relative):.2f})" if relative else "-"
        lines.append(
            f"| {row.contender} | {row.dtype} | {seconds * 1e3:.1f} | {span} | {peak / MB:.0f} | {building / MB:.0f} |"
        )
    return "\n".join(lines)


def write(folder: Path, title: str, body: str, numbers: dict[str, Any], name: str = "results") -> None:
    """Write `name`.md and `name`.json in `folder`, and print the former."""
    where = environment()
    header = f"# {title}\n\n" + "\n".join(f"- {key}: {value}" for key, value in where.items())
    text = f"{header}\n\n{body}\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text)
    (folder / f"{name}.json").write_text(json.dumps({"environment": where, **numbers}, indent=2) + "\n")
    print(text)


def as_numbers(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def _command() -> str:
    """As it was typed, without this machine's folders."""
    module = f"benchmarks.{Path(sys.argv[0]).parent.name}.run"
    arguments = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", "-m", module, *arguments])


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
