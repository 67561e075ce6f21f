"""What one step asks of a device: collectives, bytes, kernels, copies, and how often the host waits for the device.

    python -m benchmarks.counts.run                                  # two minutes
    python -m benchmarks.counts.run --peer-python PATH_OF_A_PYTHON_WITH_DEEPSPEED

Plain PyTorch, DDP, FSDP2 (each block a unit), zeropipe's and DeepSpeed's stages on a GPT of six blocks, two ranks
on CPUs. Every operator that torch dispatches is counted, so the numbers are exact and the same on every machine, but
for what a backend does inside of one operator. Writes results.md and results.json (or to --out).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.common import report
from benchmarks.counts.worker import CASES, CONTENDERS, MARK, PARTS

ROOT = Path(__file__).resolve().parents[2]
Found = dict[str, Any]
LIMIT = 120  # seconds for one contender


def job(python: str, contender: str, ranks: int) -> list[Found]:
    """One torchrun; what its first rank counted, by case."""
    command = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "benchmarks.counts.worker", contender]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "DS_ACCELERATOR": "cpu"}
    # Files, not pipes: what a contender that hangs has said is still there.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        running = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | settings, stdout=out, stderr=errors, start_new_session=True
        )
        try:
            running.wait(LIMIT)
        except subprocess.TimeoutExpired:
            _end(running)
            errors.write(f"\nnot done after {LIMIT} s")
        out.seek(0)
        errors.seek(0)
        lines = [line for line in out.read().splitlines() if line.startswith(MARK)]
        why = (errors.read().strip().splitlines() or ["nothing was said"])[-1][:120]
    found = [json.loads(line.removeprefix(MARK)) for line in lines]
    missing = [case for case in CASES if case not in {one["case"] for one in found}]
    return found + [{"contender": contender, "case": case, "why_not": why} for case in missing]


def _end(running: subprocess.Popen[str]) -> None:
    """End a torchrun that hangs, and its ranks, which have sessions of their own: by their ids."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout
    children: dict[int, list[int]] = {}
    for pid, parent in (map(int, line.split()) for line in listed.splitlines()):
        children.setdefault(parent, []).append(pid)
    family = [running.pid]
    for one in family:  # which grows
        family += children.get(one, [])
    for one in family:
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    running.wait()


def table(found: list[Found]) -> str:
    lines: list[str] = []
    for case in CASES:
        lines += [
            f"\n## {case}\n",
            "| | collectives | bytes | kernels: forward | backward | step | copies | meetings |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for one in (one for one in found if one["case"] == case):
            if "why_not" in one:
                lines.append(f"| {one['contender']} | not run: {one['why_not']} | | | | | | |")
                continue
            whole = {name: sum(one[part][name] for part in PARTS) for name in one["step"] if name != "where"}
            kernels = " | ".join(str(one[part]["launches"]) for part in PARTS)
            lines.append(
                f"| {one['contender']} | {whole['collectives']} | {whole['bytes']:,} | {kernels} | "
                f"{whole['copies']} | {whole['meetings']} |"
            )
    return "\n".join(lines).strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has deepspeed")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    found: list[Found] = []
    for contender in args.only:
        python = args.peer_python if contender.startswith("deepspeed") else sys.executable
        found += job(python, contender, args.ranks)
    report.write(args.out, "What one step asks of a device, on two ranks", table(found), {"found": found})


if __name__ == "__main__":
    main()
