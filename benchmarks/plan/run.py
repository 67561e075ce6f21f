"""Is the plan true? Each part plans a configuration, runs it on two real ranks of this machine, and compares.

    python -m benchmarks.plan.run memory            # 24 configurations: states and peak
    python -m benchmarks.plan.run limit --cases 60  # random configurations under a limit: no "fits" that does not
    python -m benchmarks.plan.run time              # calibrate, then 8 configurations: seconds of a step
    python -m benchmarks.plan.run peers --peer-python python    # other estimators, on the same models

A part writes its JSON beside this file (or to --out), and README.md is made of all that are there.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.common.report import environment
from benchmarks.plan import tables
from benchmarks.plan.cases import RANKS, Case, begin, chosen, drawn, timed
from benchmarks.plan.measure import limited, measured
from zeropipe.planning.calibrate import calibrate
from zeropipe.planning.devices import GIVE_BACK, KNOWN, Device
from zeropipe.planning.plan import Plan, rehearse_all

console = Console(stderr=True)


def planned(case: Case, device: Device) -> Plan:
    """The plan of ``case``, both of its ranks."""
    with tempfile.TemporaryDirectory() as folder:

        def program() -> None:
            _, step = begin(case, folder)
            while True:
                step()

        found = rehearse_all(program, RANKS, ranks=range(RANKS))
    return Plan(found.rehearsals, device, device.memory)


def memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """States and peak of each configuration."""
    rows = []
    for case in chosen()[: args.cases]:
        plan = planned(case, KNOWN["cpu"])
        allocated, resident, default = (
            measured(case, profiled=True),
            measured(case, tight=True),
            measured(case),
        )
        states = ("parameters", "gradients", "masters", "moments")
        rows.append(
            {
                "case": str(case),
                "ranks": [
                    {
                        "states": sum(
                            size
                            for kind, size in one.resting.items()
                            if kind.removeprefix("disk: ") in states
                        ),
                        "peak": one.peak.peak,
                        "kept": KNOWN["cpu"].keeps(one.passing),
                        "measured states": allocated[rank].states,
                        "allocated": allocated[rank].allocated,
                        "resident": resident[rank].grown,
                        "default heap": default[rank].grown,
                        "base": default[rank].base,
                    }
                    for rank, one in enumerate(plan.rehearsals)
                ],
            }
        )
        console.print(tables.memory_line(rows[-1]), highlight=False)
        save(args, rows)
    return rows


def limit(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Random configurations, each under a limit near what it needs: the plan's word, and whether it trained."""
    rows = []
    for seed in range(args.first, args.first + args.cases):
        case, pick = drawn(seed), random.Random(~seed)
        tight = pick.random() < 0.5
        os.environ.pop(GIVE_BACK, None)
        if tight:
            os.environ[GIVE_BACK] = "65536"
        plan = planned(case, KNOWN["cpu"])
        os.environ.pop(GIVE_BACK, None)
        # Most near the border, on both sides of it.
        allowance = int(plan.fullest.peak.peak * pick.uniform(0.8, 1.6))
        fits = Plan(plan.rehearsals, plan.device, allowance + plan.device.base)
        if tight:
            os.environ[GIVE_BACK] = "65536"
        word = fits.fits
        os.environ.pop(GIVE_BACK, None)
        why = limited(case, allowance, tight=tight)
        rows.append(
            {
                "seed": seed,
                "case": str(case),
                "size": asdict(case.size),
                "gives back": tight,
                "peak": plan.fullest.peak.peak,
                "allowance": allowance,
                "fits": word,
                "trained": not why,
                "why": next((line[:200] for line in reversed(why.splitlines()) if "Error" in line), ""),
            }
        )
        console.print(tables.limit_line(rows[-1]), highlight=False)
        save(args, rows)
    return rows


def time(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step: the machine is calibrated before and between, since it may be busy; the least counts."""
    cases = timed()[: args.cases]
    found: list[list[float]] = [[] for _ in cases]
    devices = []
    plans = [planned(case, KNOWN["cpu"]) for case in cases]
    for number in range(args.rounds):
        devices.append(calibrate(RANKS))
        for place, case in enumerate(cases):
            runs = measured(case, args.steps)
            found[place] += [max(pair) for pair in zip(*(run.seconds[2:] for run in runs), strict=True)]
        console.print(f"round {number + 1} of {args.rounds}", highlight=False)
    rows = []
    for case, plan, seconds in zip(cases, plans, found, strict=True):
        said = [Plan(plan.rehearsals, device, device.memory) for device in devices]
        rows.append(
            {
                "case": str(case),
                "planned": min(one.seconds.total for one in said),
                "least": min(seconds),
                "median": median(seconds),
                "bubble": said[0].bubble,
            }
        )
        console.print(tables.time_line(rows[-1]), highlight=False)
    return {"devices": [asdict(device) for device in devices], "rows": rows}


def peers(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What others say of the same models, and what their own runs take."""
    from benchmarks.plan.peers import compare

    rows = []
    for row in compare(args.peer_python):
        rows.append(row)
        save(args, rows)
    return rows


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "memory": memory,
    "limit": limit,
    "time": time,
    "peers": peers,
}


def save(args: argparse.Namespace, rows: Any) -> None:
    """Write what is there by now: parts take minutes, and one that is stopped leaves what it has."""
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.part}.json").write_text(
        json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n"
    )
    page = tables.page({part: args.out / f"{part}.json" for part in PARTS})
    (args.out / "README.md").write_text(page)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--cases", type=int, help="how many configurations; default: all, or 200 random ones")
    parser.add_argument("--first", type=int, default=0, help="the seed of the first random configuration")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="of each run; the first two only warm up")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    if args.part == "limit" and args.cases is None:
        args.cases = 200
    save(args, PARTS[args.part](args))


if __name__ == "__main__":
    main()
