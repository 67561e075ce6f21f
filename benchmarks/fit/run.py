"""Does ``--fit`` find what looking at everything finds, and does it train?

    python -m benchmarks.fit.run [--cases 20] [--train 4] [--first SEED]

Each case is a random small GPT on two CPU ranks, a global batch, and a limit on memory between the least and the most
that any choice needs. Brute force rehearses every choice on both ranks, with all of its micro-steps;
``zeropipe.fit`` is given the limit alone. Of ``--train`` cases the configuration that it chose is then trained by two
real processes whose private memory may grow by that limit and no more (RLIMIT_DATA).
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common.model import Size
from benchmarks.common.report import environment
from benchmarks.plan.cases import RANKS, Case, begin
from benchmarks.plan.measure import limited
from zeropipe.planning.devices import KNOWN
from zeropipe.planning.fitting.choices import NONE, Choice, Space
from zeropipe.planning.fitting.fit import Follows, fit_program
from zeropipe.planning.plan import rehearse_all

console = Console(stderr=True)


def case_of(choice: Choice, size: Size, dtype: str) -> Case:
    made = replace(size, micro_batch=choice.micro)
    return Case(choice.stage, dtype, choice.accumulation, choice.recompute, size=made)


def one(seed: int, train: bool) -> dict[str, Any]:
    """A case: what brute force finds, what ``fit`` finds, and whether that trains under the limit."""
    chance = random.Random(seed)
    width = chance.choice([128, 192, 256])
    size = Size(
        layers=chance.randint(2, 4),
        width=width,
        heads=width // 64,
        vocabulary=chance.choice([512, 2048]),
        context=64,
        micro_batch=1,
    )
    dtype, batch = chance.choice(["fp32", "bf16"]), RANKS * chance.choice([4, 6, 8])
    with tempfile.TemporaryDirectory() as folder:
        device = Path(folder, "here.json")  # what a process takes by itself is no part of the limit
        device.write_text(
            json.dumps({"name": "here", "base": 0, "ranks_per_node": KNOWN["cpu"].ranks_per_node})
        )

        def program(choice: Choice, config: dict[str, Any] | None = None) -> Callable[[], None]:
            def run() -> None:
                _, step = begin(case_of(choice, size, dtype), folder)
                while True:
                    step()

            return run

        every = {}
        for choice in Space(batch, RANKS, KNOWN["cpu"].ranks_per_node, offload=(NONE,)).choices():
            every[choice] = rehearse_all(program(choice), RANKS, device=str(device))
        needs = sorted(plan.needed for plan in every.values())
        limit = chance.randint(needs[0], needs[-1])
        fits = {choice: plan.seconds.total for choice, plan in every.items() if plan.needed <= limit}
        given = Choice(0, 1, batch // RANKS)
        started = time.perf_counter()
        found = fit_program(
            program,
            case_of(given, size, dtype).config(folder),
            RANKS,
            follows=Follows(micro=True, recompute=True),
            device=str(device),
            device_memory=limit,
        )
        took = time.perf_counter() - started
        trained = None
        if train and found.choice is not None:
            trained = limited(case_of(found.choice, size, dtype), limit) or "yes"
    best = min(fits, key=lambda choice: fits[choice])
    return {
        "seed": seed,
        "choices": len(every),
        "fit": len(fits),
        "limit": limit,
        "best": str(best),
        "chosen": str(found.choice),
        "times the best": None if found.choice is None else fits.get(found.choice, 0.0) / fits[best],
        "looks": found.looks,
        "seconds": took,
        "trained under the limit": trained,
    }


def page(rows: list[dict[str, Any]]) -> str:
    good = [row for row in rows if row["times the best"] and row["times the best"] <= 1.1]
    lines = [
        "# What `--fit` finds, beside looking at everything",
        "",
        f"`python -m benchmarks.fit.run --cases {len(rows)}`; "
        f"{len(good)} of {len(rows)} within 10 % of the fastest that fits.",
        "",
        "| case | fit | limit, MB | the fastest | chosen | times the fastest | looks | trained |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['seed']} | {row['fit']} of {row['choices']} | {row['limit'] / 1e6:.1f} | {row['best']} | "
            f"{row['chosen']} | {row['times the best'] or 0:.3f} | {row['looks']} | "
            f"{row['trained under the limit'] or ''} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--train", type=int, default=4, help="of so many cases the choice is trained as well")
    parser.add_argument("--first", type=int, default=0, help="the seed of the first case")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    rows = []
    for seed in range(args.first, args.first + args.cases):
        rows.append(one(seed, train=seed - args.first < args.train))
        console.print(rows[-1])
        args.out.mkdir(parents=True, exist_ok=True)
        data = {"environment": environment(), "rows": rows}
        (args.out / "results.json").write_text(json.dumps(data, indent=1) + "\n")
        (args.out / "README.md").write_text(page(rows))


if __name__ == "__main__":
    main()
