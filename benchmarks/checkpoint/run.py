"""How fast checkpoints are saved and loaded, beside ``torch.save``, torch's DCP and DeepSpeed, on the same states.

    python -m benchmarks.checkpoint.run --peer-python PATH_OF_A_PYTHON_WITH_DEEPSPEED

Two ranks at ZeRO stage 2 in fp32, loaded at two and at one. DeepSpeed reaches another number of ranks by converting to
its universal format first; zeropipe loads what either of them wrote as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.checkpoint.engines import MARK, WRITTEN
from benchmarks.common.report import write

ROOT = Path(__file__).resolve().parents[2]
Numbers = dict[str, list[float]]


def job(python: str, module: str, ranks: int, *arguments: object) -> Numbers:
    """One torchrun; what its first rank measured. Raises RuntimeError with the end of its errors."""
    command = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=600)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return json.loads(lines[-1].removeprefix(MARK))  # type: ignore[no-any-return]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}


def engines(arguments: argparse.Namespace, folder: Path) -> tuple[Numbers, dict[str, int]]:
    """Both systems in turn; a round's checkpoint of DeepSpeed is converted by DeepSpeed and loaded by both."""
    found: Numbers = {}
    sizes: dict[str, int] = {}
    theirs, ours = folder / "deepspeed", folder / "zeropipe"
    common = (f"--mbytes={arguments.mbytes}", f"--rounds={arguments.repeats}")
    worker = "benchmarks.checkpoint.engines"

    def note(prefix: str, numbers: Numbers) -> None:
        for name, values in numbers.items():
            found.setdefault(f"{prefix}: {name}", []).extend(values)

    for _ in range(arguments.rounds):
        peer = arguments.peer_python
        if peer:
            note("DeepSpeed", job(peer, worker, 2, "deepspeed", *common, f"--save={theirs}",
                                  "--load", f"load at 2 ranks={theirs}"))  # fmt: skip
            sizes["DeepSpeed: checkpoint"] = size_of(theirs / "full")
            convert(peer, theirs, found, sizes)
            note("DeepSpeed", job(peer, worker, 1, "deepspeed", *common, "--universal",
                                  "--load", f"load of the converted at 1 rank={theirs}"))  # fmt: skip
        loads = [f"load at 2 ranks={ours}"]
        more = [f"load at 1 rank={ours}"]
        if peer:
            loads.append(f"load of DeepSpeed's at 2 ranks={theirs}")
            more.append(f"load of DeepSpeed's at 1 rank={theirs}")
        me = sys.executable
        note("zeropipe", job(me, worker, 2, "zeropipe", *common, f"--save={ours}", "--load", *loads))
        note("zeropipe", job(me, worker, 1, "zeropipe", *common, "--load", *more))
        sizes["zeropipe: checkpoint"] = size_of(ours / "full")
    return found, sizes


def convert(python: str, folder: Path, found: Numbers, sizes: dict[str, int]) -> None:
    """DeepSpeed's converter as its command is run; its temporary files are measured once, by keeping them."""
    out = folder / "universal"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    command = [python, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(folder / "full"), "--output_folder", str(out)]
    keep = "DeepSpeed: temporary bytes of the conversion"
    if keep not in sizes:
        subprocess.run([*command, "--keep_temp_folder"], env=_environment(), check=True, capture_output=True)
        sizes[keep] = size_of(out / "tmp")
        shutil.rmtree(out)
        out.mkdir()
    start = time.perf_counter()
    subprocess.run(command, env=_environment(), check=True, capture_output=True)
    found.setdefault("DeepSpeed: convert", []).append(time.perf_counter() - start)
    (folder / "latest_universal").write_text(out.name)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def middle(numbers: Numbers, name: str) -> float:
    return statistics.median(numbers[name])


def claims(bare: Numbers, real: Numbers) -> dict[str, float]:
    """The figures that the project holds itself to, from medians."""
    z = "zeropipe: "
    figures = {
        "asynchronous save blocks for this part of a full one (engine)": middle(real, z + "blocked")
        / middle(real, z + "save"),
        "asynchronous save blocks for this part of a full one (bare state)": middle(
            bare, "zeropipe save, asynchronous: blocked"
        )
        / middle(bare, "zeropipe save"),
        "load at 1 rank against load at 2 (engine, checked)": middle(real, z + "load at 1 rank")
        / middle(real, z + "load at 2 ranks"),
        "load at 1 rank against load at 2 (bare state)": middle(bare, "zeropipe load at 1 rank")
        / middle(bare, "zeropipe load, same size"),
    }
    if "DeepSpeed: convert" in real:
        both = middle(real, "DeepSpeed: convert") + middle(real, "DeepSpeed: load of the converted at 1 rank")
        mine = middle(real, z + "load of DeepSpeed's at 1 rank")
        figures["DeepSpeed's convert and load against zeropipe's load of the same files"] = both / mine
        figures["the same against zeropipe's load of its own checkpoint"] = both / middle(
            real, z + "load at 1 rank"
        )
        figures["zeropipe's save (synced) against DeepSpeed's (not synced)"] = middle(
            real, z + "save"
        ) / middle(real, "DeepSpeed: save")
    return figures


def text(tables: dict[str, tuple[Numbers, float]], sizes: dict[str, int], figures: dict[str, float]) -> str:
    lines: list[str] = []
    for title, (numbers, gigabytes) in tables.items():
        lines += [f"## {title}", "", "| what | median, s | fastest, s | GB/s |", "|---|---:|---:|---:|"]
        for name, values in numbers.items():
            if "MB" in name or WRITTEN in name:
                continue
            quick = (
                ""
                if "blocked" in name or "convert" in name
                else f"{gigabytes / statistics.median(values):.2f}"
            )
            lines.append(f"| {name} | {statistics.median(values):.3f} | {min(values):.3f} | {quick} |")
        lines.append("")
    lines += ["## In one line each", ""]
    lines += [f"- {name}: {value:.3g}" for name, value in figures.items()]
    lines += [f"- {name}: {value / 1e6:.1f} MB" for name, value in sizes.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.checkpoint.run", description=__doc__)
    parser.add_argument("--mbytes", type=int, default=514)
    parser.add_argument("--rounds", type=int, default=2, help="of the engines; each in processes of its own")
    parser.add_argument("--repeats", type=int, default=3, help="of each save and load inside a process")
    parser.add_argument("--bare-rounds", type=int, default=5)
    parser.add_argument("--peer-python", default="", help="an interpreter that has DeepSpeed")
    parser.add_argument("--folder", default=None, help="where to write; default: a temporary folder")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=arguments.folder))
    try:
        worker, me = "benchmarks.checkpoint.states", sys.executable
        real, sizes = engines(arguments, folder)
        shutil.rmtree(folder)
        folder.mkdir()
        size = (f"--mbytes={arguments.mbytes}", f"--folder={folder}")
        bare = job(me, worker, 2, "times", *size, f"--rounds={arguments.bare_rounds}")
        exported = job(me, worker, 1, "export", *size)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    peak = next(name for name in exported if "MB" in name)
    written = [values for name, values in real.items() if name.startswith("zeropipe") and WRITTEN in name]
    sizes["zeropipe: temporary bytes of a load at another size"] = int(max(map(max, written)))
    sizes["export: peak of memory, one tensor being 4.2 MB and a shard 64 MB"] = int(
        exported[peak][0] * 2**20
    )
    figures = claims(bare, real)
    gigabytes = arguments.mbytes / 1e3
    tables = {
        f"Through the engines ({arguments.mbytes} MB, stage 2, fp32, saved by 2 ranks)": (real, gigabytes),
        "A bare state of the same size, 2 ranks": (bare, gigabytes),
        "Export to safetensors (a quarter of the bytes: the fp32 weights)": (exported, gigabytes / 4),
    }
    numbers: dict[str, Any] = {
        "engines": real,
        "bare": bare,
        "export": exported,
        "bytes": sizes,
        "claims": figures,
    }
    write(arguments.output, "Checkpoints: save, load, convert, export", text(tables, sizes, figures), numbers)


if __name__ == "__main__":
    main()
