"""How plans are shown: one, two side by side, and what was found by a search."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from zeropipe.reporting import in_words, rate_in_words

if TYPE_CHECKING:
    from zeropipe.planning.fitting.choices import Choice
    from zeropipe.planning.fitting.fit import Fit
    from zeropipe.planning.plan import Plan
    from zeropipe.planning.rehearse import Rehearsal

_ALIVE = 3  # kinds that are named beside the peak
_REFUSED = 12
_NUMBER = re.compile(r"(?<![^.\s])\d+(?![^.\s])")  # a part of a name by itself


def show(found: Plan) -> None:
    """Print ``found``: bytes by kind and rank, the peak, what is sent, the time, and the verdict."""
    console = Console(soft_wrap=True)
    console.print(_bytes(found))
    fullest = found.fullest
    alive = ", ".join(
        f"{in_words(size)} {kind}" for kind, size in Counter(fullest.peak.kinds).most_common(_ALIVE)
    )
    console.print(
        f"The peak of rank {fullest.place.rank} comes in: {fullest.peak.moment} (most of it: {alive})",
        highlight=False,
    )
    traffic = _traffic(found)
    if traffic.row_count:
        console.print(traffic)
    links = ", ".join(f"{in_words(size)} {where}" for where, size in found.links().items()) or "nothing"
    console.print(f"Sent by a rank in each step: {links}", highlight=False)
    console.print(f"A step on {found.device.name}: {_time(found)}", highlight=False)
    if found.bubble is not None:
        console.print(
            f"The pipeline's ranks wait {found.bubble:.0%} of the time that they compute", highlight=False
        )
    style = "green" if found.fits else "bold red"
    console.print(found.verdict(), style=style, highlight=False)


def _bytes(found: Plan) -> Table:
    every = list(dict.fromkeys(kind for one in found.rehearsals for kind in (*one.peak.kinds, *one.resting)))
    table = Table(title="Bytes of a rank at its peak", title_justify="left")
    table.add_column("")
    for one in found.rehearsals:
        table.add_column(f"rank {one.place.rank}", justify="right")
    table.add_column("between steps", justify="right")
    for kind in every:
        away = kind.startswith(("host", "disk"))
        # What lies elsewhere is no part of a device's peak; it is there all the time.
        cells = [in_words((one.resting if away else one.peak.kinds).get(kind, 0)) for one in found.rehearsals]
        table.add_row(kind, *cells, in_words(found.fullest.resting.get(kind, 0)))
    base = found.device.base
    if base:
        table.add_row("the process itself", *(in_words(base) for _ in found.rehearsals), in_words(base))
    kept = [found.device.keeps(one.passing) for one in found.rehearsals]
    if any(kept):
        table.add_row("what the heap may keep", *map(in_words, kept), in_words(found.kept))
    table.add_section()
    totals = [in_words(one.peak.peak + base + more) for one, more in zip(found.rehearsals, kept, strict=True)]
    table.add_row("together", *totals, in_words(found.resting + found.kept), style="bold")
    for name, part in (("while training", "trained"), ("while building", "built")):
        table.add_row(name, *(in_words(getattr(one, part).peak + base) for one in found.rehearsals), "")
    return table


def _traffic(found: Plan) -> Table:
    one, node = found.fullest, found.device.ranks_per_node
    table = Table(title=f"What rank {one.place.rank} sends in a step", title_justify="left")
    for name in ("", "for", "ranks", "calls", "bytes", "link"):
        table.add_column(
            name, justify="right" if name in ("ranks", "calls", "bytes") else "left", overflow="fold"
        )
    rows: dict[tuple[str, str, int, str], list[int]] = {}
    for (op, label, nbytes, ranks, _), count in one.traffic.items():
        if len(ranks) > 1:
            link = "inside a node" if len({rank // node for rank in ranks}) == 1 else "between nodes"
            # A pipeline's messages of all micro-batches are one row: "0>1 F3" is a forward from stage 0 to 1. So are
            # layers that differ in their number: "layers.3.weight".
            what = label.rstrip("0123456789") if op in ("send", "recv") else _NUMBER.sub("*", label)
            row = rows.setdefault((op, what, len(ranks), link), [0, 0])
            row[0] += count
            row[1] += count * nbytes
    for (op, label, size, link), (calls, nbytes) in sorted(rows.items(), key=lambda item: -item[1][1]):
        table.add_row(op.replace("_", " "), label, str(size), f"{calls:,}", in_words(nbytes), link)
    return table


def compare(names: tuple[str, str], plans: tuple[Plan, Plan]) -> None:
    """Print two plans side by side; what differs is bold, with by how much."""
    files = [Path(name).name for name in names]
    table = Table(title_justify="left")
    for column in ("", *(files if files[0] != files[1] else names), "difference"):
        table.add_column(column, justify="left" if not column else "right")

    def rows(of: Callable[[Plan], Mapping[str, int]]) -> None:
        left, right = map(of, plans)
        for name in dict.fromkeys((*left, *right)):
            a, b = left.get(name, 0), right.get(name, 0)
            _row(
                table,
                name,
                in_words(a),
                in_words(b),
                f"{'+' if b > a else '-'}{in_words(abs(b - a))}",
                a != b,
            )
        table.add_section()

    settings = [plan.fullest.settings for plan in plans]
    for name in dict.fromkeys((*settings[0], *settings[1])):
        a, b = (str(one.get(name, "default")) for one in settings)
        if a != b:
            _row(table, name, a, b, "", True)
    table.add_section()
    rows(lambda plan: {**_kinds(plan.fullest), "the process itself": plan.device.base})
    rows(lambda plan: {"together at the peak": plan.peak, "between steps": plan.resting})
    if any(plan.kept for plan in plans):
        rows(lambda plan: {"what the heap may keep": plan.kept})
    rows(lambda plan: {f"sent {where}": size for where, size in plan.links().items()})
    times = [plan.seconds.total for plan in plans]
    share = f"{times[1] / times[0] - 1:+.1%}" if times[0] else ""
    a, b = map(_seconds, times)
    _row(table, f"step on {plans[0].device.name}", a, b, share, times[0] != times[1])
    a, b = (rate_in_words(plan.throughput) for plan in plans)
    _row(table, "samples/s", a, b, "", a != b)
    a, b = ("yes" if plan.fits else "no" for plan in plans)
    _row(table, "fits", a, b, "", a != b)
    console = Console(soft_wrap=True)
    console.print(table)
    for name, plan in zip(names, plans, strict=True):
        console.print(
            f"{name}: {plan.verdict()}", style="green" if plan.fits else "bold red", highlight=False
        )


def _kinds(one: Rehearsal) -> dict[str, int]:
    away = {kind: size for kind, size in one.resting.items() if kind.startswith(("host", "disk"))}
    return {**one.peak.kinds, **away}


def _row(table: Table, name: str, left: str, right: str, difference: str, differs: bool) -> None:
    table.add_row(name, left, right, difference if differs else "", style="bold" if differs else "dim")


def show_fit(found: Fit) -> None:
    """Print what a search has found, and of each faster family why it was refused."""
    console = Console(soft_wrap=True)
    for part, why in found.kept.items():
        console.print(f"not searched: {part}, since {why}", highlight=False)
    if found.refused:
        table = Table(title="Faster, and refused", title_justify="left")
        for name in ("", "step, at least", "why"):
            table.add_column(name, justify="right" if "step" in name else "left")
        for one in found.refused[:_REFUSED]:
            table.add_row(str(one.choice), _seconds(one.seconds) if one.seconds else "?", one.why)
        if len(found.refused) > _REFUSED:
            table.add_row(f"and {len(found.refused) - _REFUSED} more", "", "")
        console.print(table)
    console.print(f"{found.choices} configurations, {found.looks} rehearsals", highlight=False)
    console.print(f"as given: {found.given}: {found.before.verdict()}", highlight=False)
    if found.choice is None or found.plan is None:
        text = "nothing fits: take more devices, larger ones, or let more be chosen (recompute, offload, a pipeline)"
        console.print(text, style="bold red", highlight=False)
        return
    console.print(f"chosen: {found.choice}", style="bold green", highlight=False)
    if found.choice.recompute and not found.choice.cut:
        console.print(
            "no key of the configuration says recompute: switch it on in the program", highlight=False
        )
    console.print(f"a step in {_time(found.plan)}", highlight=False)
    console.print(found.plan.verdict(), style="green", highlight=False)


def looked(choice: Choice, found: object) -> str:
    """One line for each rehearsal of a search."""
    fits, plan = getattr(found, "fits", None), found
    if fits is None:
        return f"  {choice}: cannot be run"
    return f"  {choice}: {in_words(getattr(plan, 'needed', 0))}{'' if fits else ', too much'}"


def _time(found: Plan) -> str:
    timing = found.seconds
    parts = f"{_seconds(sum(timing.computing.values()))} computing, {_seconds(sum(timing.sending.values()))} sending"
    return f"about {_seconds(timing.total)} ({parts}), {rate_in_words(found.throughput)} samples/s"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
