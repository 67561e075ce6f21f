"""Whether the library's work grows with the number of tensors and modules as it should: linearly.

    python -m benchmarks.growth.run                                    # everything, ranks 1 and 2: half an hour
    python -m benchmarks.growth.run --parts stage3 --sizes 1000 4000   # one part, at other sizes

A model of N modules with one tensor of 16 elements each, N from 1,000 to 16,000. Measured, and divided by N:
initialize, steps, the fp32 value of every parameter, save and load at each stage, loads from one stage to
another, the plan of stage 3, and the tools of ``zeropipe ckpt``. Exits with 1 where the time per tensor rises by
more than 1.5 times from the first size to the last, or where a size did not end within its limit.

What is compared is CPU time, summed over the ranks: other programs on the machine do not change it much. Time on
the clock stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common.report import write
from benchmarks.growth.worker import MARK, PARTS

ROOT = Path(__file__).resolve().parents[2]
SIZES = (1000, 2000, 4000, 8000, 16000)
MOST = 1.5  # times by which the time per tensor may rise
Figures = dict[str, dict[int, dict[str, float]]]  # what -> number of tensors -> cpu and wall, seconds


def job(ranks: int, tensors: int, parts: list[str], limit: float, found: Figures) -> str:
    """One torchrun; its figures go to ``found`` as they come. Returns why it did not end well, or ""."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "benchmarks.growth.worker", str(tensors), "--parts", *parts]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    why, text = "", ""
    started = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        text, errors = started.communicate(timeout=limit)
        why = errors[-2000:] if started.returncode else ""
    except subprocess.TimeoutExpired:
        started.terminate()  # torchrun ends its ranks
        text, _ = started.communicate()
        why = f"not done after {limit:.0f} s"
    finally:
        if started.poll() is None:  # interrupted
            started.terminate()
    for line in text.splitlines():
        if line.startswith(MARK):
            figure: dict[str, Any] = json.loads(line.removeprefix(MARK))
            found.setdefault(figure["name"], {})[tensors] = {k: figure[k] for k in ("cpu", "wall")}
    return why


def per_tensor(figures: dict[int, dict[str, float]], kind: str) -> dict[int, float]:
    return {tensors: seconds[kind] / tensors for tensors, seconds in sorted(figures.items())}


def growth(figures: dict[int, dict[str, float]], sizes: list[int], kind: str = "cpu") -> float | None:
    """Time per tensor at the last size against that at the first; None where one is missing."""
    each = per_tensor(figures, kind)
    return each[sizes[-1]] / each[sizes[0]] if sizes[0] in each and sizes[-1] in each else None


def text(found: dict[int, Figures], sizes: list[int], limits: list[str]) -> str:
    lines: list[str] = []
    for ranks, figures in found.items():
        lines += [f"## {ranks} rank{'s' if ranks > 1 else ''}: CPU time per tensor, microseconds", ""]
        lines += ["| what | " + " | ".join(f"{n:,}" for n in sizes) + " | last / first | on the clock |"]
        lines += ["|---|" + "---:|" * (len(sizes) + 2)]
        for name, by_size in figures.items():
            each = per_tensor(by_size, "cpu")
            cells = [f"{each[n] * 1e6:.1f}" if n in each else "-" for n in sizes]
            ratios = [growth(by_size, sizes, kind) for kind in ("cpu", "wall")]
            shown = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
            mark = "" if ratios[0] is not None and ratios[0] <= MOST else " **rises**"
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {shown[0]}{mark} | {shown[1]} |")
        lines.append("")
    return "\n".join(lines + [f"- {line}" for line in limits])


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.growth.run", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for one size")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    sizes = sorted(arguments.sizes)
    found: dict[int, Figures] = {}
    failed: list[str] = []
    for ranks in arguments.ranks:
        figures = found.setdefault(ranks, {})
        for tensors in sizes:
            print(f"{ranks} ranks, {tensors} tensors", file=sys.stderr, flush=True)
            why = job(ranks, tensors, arguments.parts, arguments.limit, figures)
            if why:
                failed.append(f"{ranks} ranks, {tensors} tensors: {why}")
                break  # larger ones take longer still
    rising = [
        f"{ranks} ranks, {name}"
        for ranks, figures in found.items()
        for name, by_size in figures.items()
        if (ratio := growth(by_size, sizes)) is None or ratio > MOST
    ]
    numbers = {"figures": found, "rising": rising, "failed": failed}
    write(arguments.output, "Growth with the number of tensors", text(found, sizes, failed), numbers)
    if rising or failed:
        print("Not linear: " + "; ".join([*rising, *failed]), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
