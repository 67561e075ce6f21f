"""Loss curves of compressed optimizers beside their dense forms: the example's GPT on real text, same seeds.

    python -m benchmarks.compressed_communication.convergence
    python -m benchmarks.compressed_communication.convergence --ranks 4 --steps 1000

To hold: the held-out loss at the end is within 1 % of the dense form's. Writes convergence-N.json, .md and .png for
N ranks beside this file (or to --out).
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.common.report import environment
from benchmarks.compressed_communication.train_one import DENSE_OF, MARK, NAMES

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 0.01
Curve = list[tuple[int, float]]


def main() -> None:
    args = arguments()
    curves: dict[str, Curve] = {}
    for name in args.only:
        curve = _train(args, name)
        if curve:
            curves[name] = curve
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"convergence-{args.ranks}"
    text = _table(args, curves)
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(
        json.dumps({"environment": environment(), "curves": curves}, indent=1) + "\n"
    )
    _picture(curves, stem.with_suffix(".png"))
    print(text)


def _train(args: argparse.Namespace, name: str) -> Curve:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"),
        *("-m", "benchmarks.compressed_communication.train_one", name),
        *(f"--steps={args.steps}", f"--warm={args.warm}", f"--measure-every={args.measure_every}"),
        f"--seed={args.seed}",
        *([f"--text={args.text}"] if args.text else []),
    ]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    job = subprocess.run(
        command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, text=True, timeout=args.limit
    )
    lines = [line for line in job.stdout.splitlines() if line.startswith(MARK)]
    return [(step, loss) for step, loss in json.loads(lines[-1].removeprefix(MARK))] if lines else []


def _table(args: argparse.Namespace, curves: dict[str, Curve]) -> str:
    lines = [
        f"# Convergence: {args.ranks} ranks, {args.steps} steps, variance frozen after {args.warm:.0%}",
        "",
        "| optimizer | held-out loss, nats | against its dense form | within 1 % |",
        "|---|---:|---:|---|",
    ]
    for name, curve in curves.items():
        last, dense = curve[-1][1], curves.get(DENSE_OF.get(name, ""))
        if dense is None:
            lines.append(f"| {name} | {last:.4f} | - | - |")
            continue
        change = last / dense[-1][1] - 1
        lines.append(f"| {name} | {last:.4f} | {change:+.2%} | {'yes' if change <= LIMIT else 'no'} |")
    return "\n".join(lines) + "\n"


def _picture(curves: dict[str, Curve], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed (pip install 'zeropipe[plot]')", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, curve in curves.items():
        style = "-" if name in ("Adam", "LAMB") else "--"
        axes.plot([step for step, _ in curve], [loss for _, loss in curve], style, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss, nats per byte")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument(
        "--warm", type=float, default=0.2, help="share of the run before the variance is frozen"
    )
    parser.add_argument("--measure-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, default=None)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--limit", type=int, default=3600, help="seconds for one optimizer")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    return parser.parse_args()


if __name__ == "__main__":
    main()
