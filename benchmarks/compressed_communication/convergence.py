"""Loss curves of compressed optimizers beside their dense forms: the example's GPT on real text, same seeds.

    python -m benchmarks.compressed_communication.convergence
    python -m benchmarks.compressed_communication.convergence --ranks 4 --steps 1000

To hold: the held-out loss at the end is within 1 % of the dense form's. Writes convergence-N.json and .md for N ranks
beside this file (or to --out) and the curves to docs/pictures (or --pictures), after each optimizer. A run that was
stopped goes on: curves of the same settings that are there already are kept, unless --anew is given.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common.report import environment
from benchmarks.compressed_communication.train_one import DENSE_OF, MARK, NAMES

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 0.01
SETTINGS = ("ranks", "steps", "warm", "measure_every", "seed")
Curve = list[tuple[int, float]]


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"convergence-{args.ranks}"
    settings = {key: getattr(args, key) for key in SETTINGS}
    settings["text"] = args.text.name if args.text else "the Python standard library"
    curves = {} if args.anew else _kept(stem.with_suffix(".json"), settings)
    for name in args.only:
        if name in curves:
            continue
        curve = _train(args, name)
        if not curve:
            print(f"{name} did not finish", file=sys.stderr)
            continue
        curves[name] = curve
        ordered = {known: curves[known] for known in NAMES if known in curves}
        command = "python -m benchmarks.compressed_communication.convergence"
        command += "".join(f" --{key.replace('_', '-')} {getattr(args, key)}" for key in SETTINGS)
        where = environment() | {"command": command}
        found = {"environment": where, "settings": settings, "curves": ordered}
        stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        stem.with_suffix(".md").write_text(_table(args, found))
        _picture(ordered, args.pictures / f"onebit_convergence_{args.ranks}.png")
    print(stem.with_suffix(".md").read_text() if stem.with_suffix(".md").exists() else "nothing was measured")


def _kept(path: Path, settings: dict[str, Any]) -> dict[str, Curve]:
    """The curves of an earlier run with these settings, {} where there is none."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    return found["curves"] if found.get("settings") == settings else {}


def _train(args: argparse.Namespace, name: str) -> Curve:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"),
        *("-m", "benchmarks.compressed_communication.train_one", name),
        *(f"--steps={args.steps}", f"--warm={args.warm}", f"--measure-every={args.measure_every}"),
        f"--seed={args.seed}",
        *([f"--text={args.text}"] if args.text else []),
    ]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    try:
        job = subprocess.run(
            command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, text=True, timeout=args.limit
        )
    except subprocess.TimeoutExpired:
        return []
    lines = [line for line in job.stdout.splitlines() if line.startswith(MARK)]
    return [(step, loss) for step, loss in json.loads(lines[-1].removeprefix(MARK))] if lines else []


def _table(args: argparse.Namespace, found: dict[str, Any]) -> str:
    curves = found["curves"]
    lines = [
        f"# Convergence: {args.ranks} ranks, {args.steps} steps, variance frozen after {args.warm:.0%}",
        "",
        *(
            f"- {key}: {value}"
            for key, value in (found["environment"] | {"text": found["settings"]["text"]}).items()
        ),
        "",
        "| optimizer | held-out loss, nats per byte | against its dense form | at most 1 % above |",
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
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--warm", type=float, default=0.2, help="share of the run before the variance is frozen"
    )
    parser.add_argument("--measure-every", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, default=None)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--limit", type=int, default=3600, help="seconds for one optimizer")
    parser.add_argument("--anew", action="store_true", help="measure again what is there already")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs" / "pictures")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    return parser.parse_args()


if __name__ == "__main__":
    main()
