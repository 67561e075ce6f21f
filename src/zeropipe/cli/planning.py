"""``zeropipe plan``: what a run needs before it runs; ``zeropipe report``: what it did after."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from typer.main import get_command

from zeropipe.cli import to_file
from zeropipe.errors import ConfigError, UsageError
from zeropipe.reporting import in_words

if TYPE_CHECKING:
    from zeropipe.planning.plan import Plan

app = typer.Typer(add_completion=False)
reporting = typer.Typer(add_completion=False)
CALIBRATE = "calibrate"  # in place of a script
_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}


@app.command(context_settings=_SETTINGS)
def plan(
    context: typer.Context,
    script: Annotated[
        str | None, typer.Argument(help="The training script; what follows it are its own arguments.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="JSON configuration, in place of what the script gives initialize.")
    ] = None,
    world: Annotated[int, typer.Option("--world", "-w", min=1, help="Ranks of the run.")] = 1,
    device: Annotated[
        str, typer.Option(help="h200, h100, a100, cpu, or a JSON file with a device's keys.")
    ] = "cpu",
    device_memory: Annotated[
        str | None, typer.Option(help="Of one device, such as 80GB; default: the device's.")
    ] = None,
    hf: Annotated[Path | None, typer.Option(help="A transformers config.json, in place of a script.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Micro-batch, with --hf.")] = 1,
    seq: Annotated[int, typer.Option(min=1, help="Tokens of a sample, with --hf.")] = 2048,
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps to rehearse.")] = 3,
    assume: Annotated[
        float | None, typer.Option(help="What the script gets where it asks for a value: loss.item().")
    ] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the plan to this file.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write the plan as a page (HTML).")] = None,
) -> None:
    """Rehearse a run as some ranks of any world, on this machine: bytes, traffic, time, and whether it fits.

    ``zeropipe plan calibrate`` measures this machine instead: its profile is a ``--device``.
    """
    if script == CALIBRATE and not Path(script).is_file():
        from zeropipe.cli.calibrate import app as calibrating

        get_command(calibrating).main(context.args, f"zeropipe plan {CALIBRATE}", standalone_mode=False)
        return
    from zeropipe.planning.plan import rehearse_all

    if (script is None) == (hf is None):
        raise ConfigError(
            "zeropipe plan", expected="a script or --hf config.json", found="both" if script else "neither"
        )
    if hf is not None:
        if config is None:
            raise ConfigError("zeropipe plan --hf", expected="--config my.json", found="none")
        from zeropipe.planning.transformers import program_of

        program: Callable[[], object] = program_of(hf, config, batch, seq)
    else:
        assert script is not None
        program = _script(Path(script), context.args)
    found = rehearse_all(
        program,
        world,
        config=config if hf is None else None,
        device=device,
        device_memory=device_memory,
        steps=steps,
        assume=assume,
    )
    show(found)
    if as_json is not None:
        with to_file(as_json, "--json"):
            as_json.write_text(json.dumps(found.to_json(), indent=1))
    if report is not None:
        from zeropipe.reporting.drawing import write
        from zeropipe.reporting.page import plan_page

        with to_file(report, "--report"):
            write(plan_page(found.to_json()), report)
        Console(soft_wrap=True).print(f"wrote {report}", highlight=False)
    if not found.fits:
        raise typer.Exit(3)


@reporting.command()
def report(
    run: Annotated[Path, typer.Argument(help="The folder that the configuration's report.folder names.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; default: report.html in the folder.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="A plan (zeropipe plan --json), to stand behind what was measured.")
    ] = None,
) -> None:
    """Make a page of what a run has left in its record: one HTML file that opens from a disk."""
    from zeropipe.reporting.drawing import write
    from zeropipe.reporting.page import run_page
    from zeropipe.reporting.record import read

    found = read(run)
    try:
        planned = None if plan is None else json.loads(plan.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the plan {plan}", found=str(error)) from error
    path = output or run / "report.html"
    if planned is not None and not (isinstance(planned, dict) and {"peak", "ranks"} <= planned.keys()):
        raise ConfigError(f"{plan} holds no plan", expected="what zeropipe plan --json wrote")
    with to_file(path, "--output"):
        write(run_page(found, planned), path)
    Console(soft_wrap=True).print(f"wrote {path}", highlight=False)


def _script(path: Path, arguments: list[str]) -> Callable[[], object]:
    if not path.is_file():
        raise UsageError(
            "zeropipe plan: no such script", found=path, fix="name a file, or give --hf config.json"
        )

    def run() -> object:
        sys.argv = [str(path), *arguments]
        sys.path.insert(0, str(path.parent.resolve()))
        return runpy.run_path(str(path), run_name="__main__")

    return run


def show(found: Plan) -> None:
    """Print ``found``: a table of bytes by kind and rank, the peak, traffic, time, the verdict."""
    console = Console(soft_wrap=True)
    every = list(dict.fromkeys(kind for one in found.rehearsals for kind in (*one.peak.kinds, *one.resting)))
    table = Table(title="Bytes of a rank at its peak", title_justify="left")
    table.add_column("")
    for one in found.rehearsals:
        table.add_column(f"rank {one.place.rank}", justify="right")
    table.add_column("between steps", justify="right")
    for kind in every:
        cells = [in_words(one.peak.kinds.get(kind, 0)) for one in found.rehearsals]
        table.add_row(kind, *cells, in_words(found.fullest.resting.get(kind, 0)))
    if found.device.base:
        base = in_words(found.device.base)
        table.add_row("the process itself", *(base for _ in found.rehearsals), base)
    kept = [found.device.keeps(one.passing) for one in found.rehearsals]
    if any(kept):
        table.add_row("what the heap may keep", *map(in_words, kept), in_words(found.kept))
    totals = [
        in_words(one.peak.peak + found.device.base + more)
        for one, more in zip(found.rehearsals, kept, strict=True)
    ]
    resting = sum(
        size for kind, size in found.fullest.resting.items() if not kind.startswith(("host", "disk"))
    )
    table.add_row("together", *totals, in_words(resting + found.device.base + found.kept), style="bold")
    console.print(table)
    fullest = found.fullest
    console.print(f"The peak of rank {fullest.place.rank} comes in: {fullest.peak.moment}", highlight=False)
    links = ", ".join(f"{in_words(size)} {where}" for where, size in found.links().items()) or "nothing"
    console.print(f"Sent by a rank in each step: {links}", highlight=False)
    timing = found.seconds
    console.print(
        f"A step on {found.device.name}: about {_time(timing.total)} "
        f"({_time(sum(timing.computing.values()))} computing, {_time(sum(timing.sending.values()))} sending), "
        f"{found.throughput:,.3g} samples/s",
        highlight=False,
    )
    if found.bubble is not None:
        console.print(
            f"The pipeline's ranks wait {found.bubble:.0%} of the time that they compute", highlight=False
        )
    style = "green" if found.fits else "bold red"
    console.print(found.verdict(), style=style, highlight=False)


def _time(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
