"""What is on the page of a run, and on that of a plan."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from zeropipe.given import Json
from zeropipe.reporting import in_words, rate_in_words
from zeropipe.reporting.drawing import Page
from zeropipe.reporting.record import Run

_MOST_RANKS = 8  # that a chart shows one by one


def run_page(run: Run, plan: Json = None) -> str:
    """The page of ``run``; with ``plan`` (as ``zeropipe plan --json`` writes it) planned memory behind the measured.

    Raises ConfigError where plotly is missing.
    """
    start, steps = run.start, run.first.steps
    page = Page(f"Run {run.folder.resolve().name}", _below(run))
    page.facts(_facts(run))
    few = run.ranks[:_MOST_RANKS]
    if steps:
        at = [row["step"] for row in steps]
        page.heading("Training")
        page.lines("Loss", "step", "loss", {"rank 0": (at, [row["loss"] for row in steps])})
        batch = _batch(steps)
        page.lines("Throughput", "step", "samples a second", {"all ranks": (at, batch)}, rangemode="tozero")
        rates = {f"group {g}": (at, [row["lr"][g] for row in steps]) for g in range(len(steps[0]["lr"]))}
        page.lines("Learning rate", "step", "learning rate", rates, rangemode="tozero")
        norms = [row.get("grad_norm") for row in steps]
        if any(norm is not None for norm in norms):
            page.lines("Norm of the gradient", "step", "norm", {"rank 0": (at, norms)}, rangemode="tozero")
        if any(row["loss_scale"] != 1.0 or row["skipped"] for row in steps):
            page.lines(
                "Loss scale",
                "step",
                "scale",
                {"scale": (at, [row["loss_scale"] for row in steps])},
                type="log",
            )
            page.lines(
                "Skipped steps", "step", "so far", {"skipped": (at, [row["skipped"] for row in steps])}
            )
        page.heading("Memory")
        memory: dict[str, tuple[list[Any], list[Any]]] = {}
        for rank in few:
            known = [row for row in rank.steps if row.get("memory")]
            memory[f"rank {rank.number}, now"] = (
                [r["step"] for r in known],
                [r["memory"]["now"] / 1e6 for r in known],
            )
        top = [row for row in run.first.steps if row.get("memory")]
        memory["rank 0, at most"] = ([r["step"] for r in top], [r["memory"]["peak"] / 1e6 for r in top])
        if plan:
            memory["planned peak"] = ([at[0], at[-1]], [plan["peak"] / 1e6] * 2)
        page.lines("Memory of a rank over the run", "step", "MB", memory, rangemode="tozero")
        _traffic(page, steps)
    if any(rank.phases for rank in few):
        page.heading("A step, rank by rank")
        page.spans(
            f"Step {max(row['step'] for rank in few for row in rank.phases)}",
            {
                f"rank {rank.number}": [(w, b * 1e3, e * 1e3) for w, b, e in rank.phases[-1]["phases"]]
                for rank in few
                if rank.phases
            },
        )
    _grid(page, run)
    if plan:
        plan_sections(page, plan)
    page.heading("Checkpoints")
    if run.first.saves:
        rows = [(s["step"], s["tag"], s["folder"], round(s["seconds"], 3)) for s in run.first.saves]
        page.table(("step", "tag", "folder", "seconds"), rows)
    else:
        page.say("None was saved.")
    _configuration(page, start)
    page.heading("Environment")
    page.table(("", "rank 0"), [(k, v) for k, v in start.get("environment", {}).items()])
    return page.text()


def plan_page(plan: Json) -> str:
    """The page of a plan (``Plan.to_json``). Raises ConfigError where plotly is missing."""
    page = Page(f"Plan for {plan['world']:,} ranks on {plan['device']}", plan["verdict"])
    page.facts(
        {
            "peak of a rank": in_words(plan["peak"]),
            "memory of a device": in_words(plan["memory"]),
            "fits": "yes" if plan["fits"] else "no",
            "parameters": f"{plan['parameters']:,}",
            "a step": f"{plan['seconds'] * 1e3:,.3g} ms"
            if plan["seconds"] < 1
            else f"{plan['seconds']:,.3g} s",
            "samples a second": rate_in_words(plan["samples_per_second"]),
            **_beside(plan),
        }
    )
    plan_sections(page, plan)
    page.heading("Configuration")
    page.table(("setting that differs from its default", "value"), sorted(plan["settings"].items()))
    return page.text()


def _beside(plan: Json) -> dict[str, str]:
    """What only some plans have: bytes in host memory or files, and a pipeline's bubble."""
    away = max(
        sum(size for kind, size in one["resting"].items() if kind.startswith(("host: ", "disk: ")))
        for one in plan["ranks"]
    )
    found = {"a rank's host memory and files": in_words(away)} if away else {}
    if plan.get("bubble") is not None:
        found["ranks wait, of the time they compute"] = f"{plan['bubble']:.0%}"
    return found


def plan_sections(page: Page, plan: Json) -> None:
    """Bytes by kind at each rank's peak, memory through the rehearsed steps, traffic."""
    page.heading("Planned memory")
    ranks = plan["ranks"]
    kinds = list(dict.fromkeys(kind for one in ranks for kind in one["kinds"]))
    names = [f"rank {one['rank']}" for one in ranks]
    series = {kind: [one["kinds"].get(kind, 0) / 1e6 for one in ranks] for kind in kinds}
    page.bars("What a rank holds at its peak, without the process itself", "", "MB", names, series)
    curves = {
        f"rank {one['rank']}": (list(range(len(one["curve"]))), [size / 1e6 for _, size, _ in one["curve"]])
        for one in ranks
    }
    page.lines("Through the rehearsed steps", "allocations, in their order", "MB", curves, rangemode="tozero")
    page.say("; ".join(f"rank {one['rank']}: the peak comes in {one['moment']}" for one in ranks))
    rows: dict[tuple[str, str], list[int]] = {}
    for entry in ranks[0]["traffic"]:
        row = rows.setdefault((entry["op"], entry["phase"]), [0, 0])
        row[0] += entry["calls"]
        row[1] += entry["calls"] * entry["bytes"]
    page.heading("Planned traffic of a step")
    page.table(
        ("collective", "in", "calls", "bytes"), [(op, phase, *row) for (op, phase), row in rows.items()]
    )


def _below(run: Run) -> str:
    end = run.first.steps[-1]["time"] if run.first.steps else None
    when = "" if end is None else f", last step {datetime.datetime.fromtimestamp(end):%Y-%m-%d %H:%M:%S}"
    whole = "ended well" if all(rank.ended for rank in run.ranks) else "still running, or ended in the middle"
    again = f", started {len(run.first.starts)} times" if len(run.first.starts) > 1 else ""
    return f"{len(run.ranks)} rank(s){when}; {whole}{again}"


def _facts(run: Run) -> dict[str, str]:
    start, steps = run.start, run.first.steps
    found = {
        "parameters": f"{start.get('parameters', 0):,}",
        "batch": str(start.get("batch", "")),
        "ZeRO stage": str(start.get("settings", {}).get("zero_optimization.stage", 0)),
    }
    if steps:
        found["steps"] = f"{steps[-1]['step']:,}"
        found["samples"] = f"{steps[-1]['samples']:,}"
        if steps[-1]["loss"] is not None:
            found["loss (rank 0)"] = f"{steps[-1]['loss']:.4g}"
        seconds = sorted(row["seconds"] for row in steps)
        found["median step"] = f"{seconds[len(seconds) // 2] * 1e3:,.0f} ms"
        peak = max(
            (row["memory"]["peak"] for rank in run.ranks for row in rank.steps if row.get("memory")),
            default=0,
        )
        found["memory at most"] = in_words(peak)
    return found


def _batch(steps: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Samples a second of each step."""
    found: list[float | None] = []
    before: Mapping[str, Any] | None = None
    for row in steps:
        gained = (
            None
            if before is None
            else (row["samples"] - before["samples"]) / max(1, row["step"] - before["step"])
        )
        found.append(None if gained is None or not row["seconds"] else gained / row["seconds"])
        before = row
    return found


def _traffic(page: Page, steps: Sequence[Mapping[str, Any]]) -> None:
    sent = [row["sent"] for row in steps if row.get("sent")]
    if not sent:
        return
    page.heading("Traffic")
    ops = list(dict.fromkeys(op for row in sent for op in row))
    at = [row["step"] for row in steps if row.get("sent")]
    page.lines(
        "Bytes of collectives on rank 0 in each step",
        "step",
        "MB",
        {op: (at, [row.get(op, 0) / 1e6 for row in sent]) for op in ops},
        rangemode="tozero",
    )


def _grid(page: Page, run: Run) -> None:
    """A batch of a pipeline as it was planned, in units of the plan, and as it ran; one replica of each stage."""
    latest = {rank.grids[-1]["rank"]: rank.grids[-1] for rank in reversed(run.ranks) if rank.grids}
    if not latest:
        return
    page.heading("The pipeline's grid")
    for title, name, scale in (("Planned (units of time)", "planned", 1.0), ("As it ran", "ran", 1e3)):
        rows = {
            f"rank {at}": [
                (_OPS[_op(word)], begin * scale, end * scale) for word, begin, end in latest[at][name]
            ]
            for at in sorted(latest)
        }
        page.spans(title, rows, x="milliseconds" if scale > 1 else "units of the plan")


_OPS = {"F": "forward", "B": "backward", "I": "backward of the input", "W": "backward of the weights"}


def _op(word: str) -> str:
    """Of an instruction as it prints: stage, letter, micro-batch."""
    return word.lstrip("0123456789")[0]


def _configuration(page: Page, start: Mapping[str, Any]) -> None:
    page.heading("Configuration")
    settings, changed = start.get("settings", {}), set(start.get("changed", ()))
    rows = sorted(settings.items(), key=lambda item: (item[0] not in changed, item[0]))
    page.say("What differs from its default stands first, in bold.")
    page.folded(f"{len(changed)} of {len(rows)} settings")
    page.table(("setting", "value"), rows, bold=range(len(changed)))
    page.unfolded()
