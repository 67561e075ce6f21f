"""All that a machine with a GPU can tell, in one go of under eight minutes.

    make gpu                                       # in the project's own environment
    make gpu PYTHON=/path/to/python PACKAGES=folder   # any interpreter with torch >= 2.8; installs nothing
    make gpu DEVICE=cpu                            # the same script on small sizes, where there is no GPU

Runs `tests/gpu`, then measures: a step's time and memory against the peers, in turns; the largest model that trains
with and without offload; one step as a trace. Writes results.md, results.json and trace.json.gz to --out. When time is
short it leaves out what comes last and says so.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NEEDS = ("torch", "numpy", "pydantic", "rich", "safetensors", "typer")
CONTENDERS = [
    *("plain", "ddp", "fsdp2", "zeropipe_0", "zeropipe_1", "zeropipe_2", "zeropipe_3"),
    *("deepspeed_1", "deepspeed_3"),
]
REFERENCE = "plain"


@dataclass(frozen=True)
class Scale:
    """What is measured on a kind of device."""

    sizes: tuple[str, ...]
    steps: int  # of a turn
    rounds: int
    layers: tuple[int, ...]  # of the models of the search for the largest one


# Layers of width 4,096 have 201 M parameters each; on the CPU they have 256, 0.8 M.
SCALES = {
    "cuda": Scale(("125M", "1.3B"), steps=4, rounds=9, layers=(6, 13, 20, 26, 32, 40, 52, 64)),
    "cpu": Scale(("tiny", "10M"), steps=1, rounds=3, layers=(2, 4)),
}


@dataclass
class Session:
    """One run of the script: how much time is left, and what was found so far."""

    device: str
    until: float  # by time.monotonic()
    out: Path
    only: str
    contenders: list[str]
    numbers: dict[str, Any] = field(default_factory=dict)
    chapters: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        return self.until - time.monotonic()

    @property
    def scale(self) -> Scale:
        return SCALES[self.device]

    def say(self, text: str) -> None:
        print(f"[{self.left:4.0f} s left] {text}", file=sys.stderr, flush=True)

    def environment(self, **more: str) -> dict[str, str]:
        # A CPU run sees no GPU, wherever it runs.
        hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if self.device == "cpu" else {}
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
        return {**os.environ, **hidden, "PYTHONPATH": path, "ZEROPIPE_TEST_DEVICE": self.device, **more}

    def part(self, name: str, least: float, do: Callable[["Session"], None]) -> None:
        """Do ``do`` if ``least`` seconds are left; what fails is written down, and the next part follows."""
        if self.only and self.only not in name:
            return
        if self.left < least:
            self.left_out.append(f"{name}: {self.left:.0f} s were left, it takes {least:.0f}")
            return
        self.say(name)
        try:
            do(self)
        except Exception as error:  # one part's failure is a finding, not the end of the others
            self.left_out.append(f"{name}: {type(error).__name__}: {error}")

    def ask(self, module: str, *arguments: str, limit: float, **environment: str) -> dict[str, Any] | str:
        """What ``module`` prints as JSON; or why it printed nothing."""
        try:
            job = subprocess.run(
                [sys.executable, "-m", module, *arguments, f"--device={self.device}"],
                cwd=ROOT,
                env=self.environment(**environment),
                capture_output=True,
                text=True,
                timeout=max(min(limit, self.left), 1),
            )
        except subprocess.TimeoutExpired:
            return "took longer than there was time"
        lines = job.stdout.splitlines()
        return (
            json.loads(lines[-1]) if job.returncode == 0 and lines else last_error(job.stderr, job.returncode)
        )


def last_error(text: str, status: int) -> str:
    """The line of ``text`` that says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if "Error" in line or "Killed" in line]
    return lines[-1][:300] if lines else f"exit status {status}"


# The parts, in the order in which a short session needs them.


def tests(session: Session) -> None:
    """`tests/gpu`; its streams once more under torch's CUDA sanitizer, where there is a GPU."""
    session.numbers["tests"], lines = {}, []
    passes = [("tests/gpu", "tests/gpu", {}, 150.0)]
    if session.device == "cuda":
        sanitized = {"TORCH_CUDA_SANITIZER": "1"}
        passes.append(("under the CUDA sanitizer", "tests/gpu/test_streams_gpu.py", sanitized, 60.0))
    for name, path, environment, limit in passes:
        found = run_tests(session, path, environment, limit)
        session.numbers["tests"][name] = found
        lines.append(f"- {name}: {found['summary']}")
        lines += [f"  - failed: {case}" for case in found["failed"]]
    session.chapters.append("## Tests\n\n" + "\n".join(lines))


def run_tests(session: Session, path: str, environment: dict[str, str], limit: float) -> dict[str, Any]:
    report, log = session.out / "tests.xml", session.out / "tests.log"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", path, "-q", "-c", os.devnull, f"--rootdir={ROOT}"]
    # The tests around need more packages than these, and their options too.
    command += ["--confcutdir=tests/gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
    with log.open("a") as written:
        try:
            status = subprocess.run(
                command,
                cwd=ROOT,
                env=session.environment(**environment),
                stdout=written,
                stderr=written,
                timeout=max(min(limit, session.left), 1),
            ).returncode
        except subprocess.TimeoutExpired:
            return {"summary": f"did not end in {limit:.0f} s; see tests.log", "failed": []}
    if not report.exists():
        return {"summary": f"could not start (exit status {status}); see tests.log", "failed": []}
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    bad = [
        f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    passed = count["tests"] - count["failures"] - count["errors"] - count["skipped"]
    summary = (
        f"{passed} passed, {len(bad)} failed, {count['skipped']} skipped, {float(suite.get('time', 0)):.0f} s"
    )
    return {"summary": summary, "failed": bad, **count}


def steps(session: Session, size: str) -> None:
    """Step times of all contenders in turns, and the memory of each."""
    from benchmarks.common import turns
    from benchmarks.common.model import GPT, SIZES
    from benchmarks.common.peers import why_no_deepspeed

    parameters = parameters_of(GPT, SIZES[size])
    together = how_many(session, parameters)
    others = [who for who in session.contenders if who != REFERENCE]
    rows: dict[str, dict[str, Any]] = {}
    why_not = why_no_deepspeed(sys.executable)
    absent = {who for who in others if who.startswith("deepspeed") and why_not}
    for who in absent:
        rows[who] = {"why_not": why_not}
    present = [who for who in others if who not in absent]
    # Where they do not all fit, the reference takes part in each group.
    groups = [present[i : i + together - 1] for i in range(0, len(present), together - 1)]
    share = session.left * 0.8 / len(groups) if size == session.scale.sizes[0] else session.left / len(groups)
    for number, group in enumerate(groups):
        end_of_group = time.monotonic() + min(share, session.left - 5)
        with TemporaryDirectory() as folder:
            sets, logs = {}, {who: Path(folder, f"{who}.log") for who in (REFERENCE, *group)}
            try:
                for place, who in enumerate((REFERENCE, *group)):
                    command = turns.python(
                        "benchmarks.gpu.worker", who, f"--size={size}", f"--device={session.device}"
                    )
                    port = 29700 + 20 * number + place
                    sets[who] = turns.start(command, 1, port, session.environment(), logs[who])

                def lost(who: str, logs: dict[str, Path] = logs) -> None:
                    rows[who] = {"why_not": last_error(logs[who].read_text(), 1)}

                seconds = turns.play(
                    sets,
                    rounds=session.scale.rounds,
                    warm_up=3,
                    steps=session.scale.steps,
                    lost=lost,
                    enough=lambda end=end_of_group: time.monotonic() > end,  # type: ignore[misc]
                )
                for who, times in seconds.items():
                    held = json.loads(turns.answers(sets[who], "memory")[0])
                    pairs = list(zip(times, seconds.get(REFERENCE, []), strict=False))
                    row = {"seconds": times, "relative": [mine / base for mine, base in pairs], **held}
                    rows.setdefault(who, row)
            finally:
                turns.end(sets)
    session.numbers.setdefault("steps", {})[size] = {"parameters": parameters, "rows": rows}
    session.chapters.append(step_table(size, parameters, rows))


def parameters_of(model: Any, size: Any) -> int:
    import torch

    with torch.device("meta"):
        return sum(p.numel() for p in model(size).parameters())


def how_many(session: Session, parameters: int) -> int:
    """Contenders that fit beside each other: 24 bytes a parameter hold state, gradients and activations of these."""
    if session.device == "cpu":
        return max(2, len(session.contenders))
    import torch

    free = torch.cuda.mem_get_info()[0]
    return max(2, min(len(session.contenders), int(0.9 * free / (24 * parameters + 2e9))))


def step_table(size: str, parameters: int, rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        f"## One step of a GPT in bf16: {size}, {parameters / 1e6:,.1f} M parameters\n",
        f"| contender | step, ms | relative to {REFERENCE} (median, range) | most in training, MB | in building, MB |",
        "|---|---:|---:|---:|---:|",
    ]
    for who in sorted(rows, key=CONTENDERS.index):
        row = rows[who]
        if not row.get("seconds"):
            lines.append(f"| {who} | not run: {row.get('why_not', 'no time')} | | | |")
            continue
        relative = row["relative"]
        span = f"{statistics.median(relative):.2f} ({min(relative):.2f}-{max(relative):.2f})"
        milliseconds = statistics.median(row["seconds"]) * 1e3
        lines.append(
            f"| {who} | {milliseconds:.1f} | {span} | {row['training'] / 1e6:,.0f} | {row['building'] / 1e6:,.0f} |"
        )
    return "\n".join(lines)


def largest(session: Session, state: str, share: float) -> None:
    """Larger and larger models until one does not train, or time is out."""
    end = time.monotonic() + share * session.left
    tries = []
    for layers in session.scale.layers:
        if time.monotonic() > end:
            tries.append({"layers": layers, "why_not": "not tried: no time"})
            break
        limit = max(end - time.monotonic(), 20)
        arguments = (f"--layers={layers}", f"--state={state}")
        found = session.ask("benchmarks.gpu.largest", *arguments, limit=limit)
        tries.append({"layers": layers, **({"why_not": found} if isinstance(found, str) else found)})
        if isinstance(found, str):
            break
    session.numbers.setdefault("largest", {})[state] = tries
    lines = [
        f"## The largest model that trains at stage 3, its state in {state} memory\n",
        "| layers | parameters, M | step, s | most on the device, GB | most on the host, GB |",
        "|---:|---:|---:|---:|---:|",
    ]
    for each in tries:
        if "why_not" in each:
            lines.append(f"| {each['layers']} | {each['why_not']} | | | |")
        else:
            lines.append(
                f"| {each['layers']} | {each['parameters'] / 1e6:,.1f} | {each['step_seconds']:.2f} | "
                f"{each['device_peak'] / 1e9:.1f} | {each['host_peak'] / 1e9:.1f} |"
            )
    session.chapters.append("\n".join(lines))


def trace(session: Session) -> None:
    """One step of stage 3 as a trace, with the places where host and device meet."""
    size = session.scale.sizes[0]
    out = session.out / "trace.json.gz"
    found = session.ask("benchmarks.gpu.trace", f"--size={size}", f"--out={out}", limit=90)
    if isinstance(found, str):
        raise RuntimeError(found)
    session.numbers["trace"] = found
    lines = [
        f"## One step at stage 3 ({size}, bf16)\n",
        f"- kernels launched: {found['launches']}; copies: {found['copies'] or 'none'}",
        f"- the host waited for the device: {found['meetings'] or 'never'}",
        f"- host {found['host_ms']:.1f} ms, device {found['device_ms']:.1f} ms under the profiler\n",
        "| longest | calls | host, us | device, us |",
        "|---|---:|---:|---:|",
        *(
            f"| {r['name']} | {r['calls']} | {r['host_us']:.0f} | {r['device_us']:.0f} |"
            for r in found["longest"]
        ),
    ]
    session.chapters.append("\n".join(lines))


def main() -> None:
    args = arguments()
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"{sys.executable} has no {', '.join(missing)}. "
            "Fix: put what is missing into a folder and name it: make gpu PACKAGES=folder"
        )
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "torch sees no GPU here. Fix: make gpu DEVICE=cpu runs the same script on small sizes"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tests.log").unlink(missing_ok=True)
    session = Session(
        args.device, time.monotonic() + 60 * args.minutes, args.out.resolve(), args.only, args.contenders
    )
    small, large = session.scale.sizes
    try:
        session.part("tests", 30, tests)
        session.part(f"steps, {small}", 40, lambda s: steps(s, small))
        session.part("trace", 20, trace)
        session.part(f"steps, {large}", 60 if args.device == "cuda" else 20, lambda s: steps(s, large))
        session.part("largest, on the device", 30, lambda s: largest(s, "device", 0.4))
        session.part("largest, offloaded", 30, lambda s: largest(s, "host", 0.9))
    except KeyboardInterrupt:
        session.left_out.append("what came after it was stopped by hand")
        raise SystemExit(130) from None
    finally:  # minutes on a GPU are not measured again for a key that was pressed
        write(session)


def write(session: Session) -> None:
    from benchmarks.common import report

    session.numbers["device"] = device_facts(session.device)
    session.numbers["left out"] = session.left_out
    facts = "\n".join(f"- {key}: {value}" for key, value in session.numbers["device"].items())
    left = "\n".join(f"- {line}" for line in session.left_out) or "- nothing"
    body = "\n\n".join([facts, *session.chapters, f"## Left out\n\n{left}"])
    report.write(
        session.out,
        "One GPU" if session.device == "cuda" else "The GPU script on a CPU",
        body,
        session.numbers,
    )


def device_facts(device: str) -> dict[str, Any]:
    import torch

    if device == "cpu":
        return {"device": "cpu: this shows that the script works, and nothing about a GPU"}
    about = torch.cuda.get_device_properties(0)
    return {
        "device": about.name,
        "devices seen": torch.cuda.device_count(),
        "device memory, GB": round(about.total_memory / 1e9, 1),
        "CUDA that torch was built for": torch.version.cuda,
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=SCALES, default="cuda")
    parser.add_argument("--minutes", type=float, default=7.5, help="all together")
    parser.add_argument("--only", default="", help="parts whose name has this in it")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    return parser.parse_args()


if __name__ == "__main__":
    main()
