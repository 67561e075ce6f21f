"""Step time of compressed optimizers against DDP + AdamW on links of 100 Mbit/s, 1 Gbit/s and the plain loopback.

    python -m benchmarks.compressed_communication.run
    python -m benchmarks.compressed_communication.run --ranks 4 --links 100mbit loopback

The slow links are network namespaces joined by a rate-limited bridge (see link.py), which takes root; where that
is not allowed they are skipped with the reason. Dense steps come first and are not timed: the figures are those of
the compressed phase. A machine that others use too slows down what computes more than what waits for the link.
So the table has the mean of all steps, the best four on end, and the CPU time, which is all that a step takes besides
waiting. Ratios are taken within a round, and shown as median (range) over rounds.

Writes results.md and results.json beside this file (results-N for N ranks other than 2; or to --out). Links that were
measured before with the same settings, and are not measured now, stay in the files.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.common import report
from benchmarks.common.model import SIZES
from benchmarks.compressed_communication.link import INTERFACE, Network, NotAllowedError, network
from benchmarks.compressed_communication.worker import CONTENDERS, MARK

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = "DDP + AdamW"


def main() -> None:
    args = arguments()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(1)
    )  # so that a `timeout` too leaves no namespace behind
    args.out.mkdir(parents=True, exist_ok=True)
    name = "results" if args.ranks == 2 else f"results-{args.ranks}"
    settings = {key: getattr(args, key) for key in ("ranks", "size", "warm_up", "steps")}
    found = _kept(args.out / f"{name}.json", settings)
    skipped: dict[str, str] = {}
    for link in args.links:
        try:
            with _place(link, args.ranks) as place:
                found[link] = _rounds(args, link, place)
        except NotAllowedError as error:
            skipped[link] = str(error)
            print(f"{link}: skipped, this machine does not allow it: {error}", file=sys.stderr)
    body = "\n\n".join(_table(link, rows) for link, rows in found.items())
    body += "".join(f"\n\n## {link}\n\nSkipped: {why}" for link, why in skipped.items())
    title = f"Compressed communication: {args.ranks} ranks, {args.size} parameters in fp32, micro-batch "
    report.write(
        args.out,
        title + str(SIZES[args.size].micro_batch),
        body,
        {"settings": settings, "links": found, "skipped": skipped},
        name,
    )


def _kept(path: Path, settings: dict[str, Any]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """What an earlier run with these settings found, by link."""
    if not path.exists():
        return {}
    earlier = json.loads(path.read_text())
    return dict(earlier["links"]) if earlier.get("settings") == settings else {}


def _place(link: str, ranks: int) -> AbstractContextManager[Network | None]:
    return nullcontext(None) if link == "loopback" else network(ranks, link)


def _rounds(args: argparse.Namespace, link: str, place: Network | None) -> dict[str, list[dict[str, Any]]]:
    """Each contender once per round, in turn, so that what disturbs the machine disturbs them alike."""
    rows: dict[str, list[dict[str, Any]]] = {contender: [] for contender in args.only}
    for number in range(args.rounds):
        for contender in args.only:
            print(f"{link}, round {number + 1}/{args.rounds}: {contender}", file=sys.stderr)
            outcome = _run(args, contender, place)
            if outcome is None:
                print("  did not finish; left out of this round", file=sys.stderr)
            else:
                rows[contender].append(
                    outcome | {"round": number, "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}"}
                )
    return rows


def _run(args: argparse.Namespace, contender: str, place: Network | None) -> dict[str, Any] | None:
    """All ranks of one contender; the slowest rank's numbers, or None."""
    address = place.address if place else "127.0.0.1"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["GLOO_SOCKET_IFNAME"] = INTERFACE if place else "lo"
    jobs = [
        subprocess.Popen(
            [
                *(place.prefix(rank) if place else []),
                *(sys.executable, "-m", "benchmarks.compressed_communication.worker", contender),
                *(f"--rank={rank}", f"--ranks={args.ranks}", f"--address={address}", f"--port={port}"),
                *(f"--size={args.size}", f"--warm-up={args.warm_up}", f"--steps={args.steps}"),
                f"--limit={args.limit}",
            ],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(args.ranks)
    ]
    try:
        outputs = [job.communicate(timeout=args.limit) for job in jobs]
    except subprocess.TimeoutExpired:
        return None
    finally:
        for job in jobs:
            job.kill()
            job.wait()
    lines = [line for line in outputs[0][0].splitlines() if line.startswith(MARK)]
    if not lines:
        print(outputs[0][1][-2000:], file=sys.stderr)
        return None
    ranks: list[dict[str, Any]] = json.loads(lines[-1].removeprefix(MARK))
    slowest = max(ranks, key=lambda numbers: numbers["step_seconds"])
    return slowest | {"link_mbit_per_second": ranks[0]["link_mbit_per_second"]}


def _table(link: str, rows: dict[str, list[dict[str, Any]]]) -> str:
    every = [row for results in rows.values() for row in results]
    rate = statistics.median(row["link_mbit_per_second"] for row in every) if every else 0.0
    dates = sorted({row["date"] for row in every})
    lines = [
        f"## {link}",
        "",
        f"Measured {dates[0]} to {dates[-1]}; a message of 8 MB travels at {rate:.0f} Mbit/s."
        if every
        else "",
        "",
        "| contender | step, ms | best four, ms | faster than DDP: all steps | best four | CPU, ms | MB of tensors |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for contender, results in rows.items():
        if not results:
            lines.append(f"| {contender} | not run | | | | | |")
            continue
        times, ratios = [], []
        for key in ("step_seconds", "best_seconds"):
            base = {row["round"]: row[key] for row in rows.get(REFERENCE, [])}
            found = [base[row["round"]] / row[key] for row in results if row["round"] in base]
            times.append(f"{statistics.median(row[key] for row in results) * 1e3:.0f}")
            ratios.append(
                f"{statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})" if found else "-"
            )
        # DDP's own collectives do not pass our seam; it sends its gradients once
        sent = results[0]["bytes_per_step"] or 4 * results[0]["parameters"]
        cpu = statistics.median(row["cpu_seconds"] for row in results) * 1e3
        lines.append(f"| {contender} | {' | '.join(times + ratios)} | {cpu:.0f} | {sent / 1e6:.2f} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--links", nargs="+", default=["100mbit", "1gbit", "loopback"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=9, help="steps before the clock starts; 2 are dense")
    parser.add_argument(
        "--steps", type=int, default=8, help="timed steps; a multiple of 0/1 Adam's interval, 4"
    )
    parser.add_argument("--size", choices=SIZES, default="10M")
    parser.add_argument("--only", nargs="+", metavar="CONTENDER", default=list(CONTENDERS))
    parser.add_argument("--limit", type=int, default=300, help="seconds for one contender in one round")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    return parser.parse_args()


if __name__ == "__main__":
    main()
