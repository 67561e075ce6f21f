"""``zeropipe plan calibrate``: the profile of this machine, for ``zeropipe plan --device``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from zeropipe.cli import to_file
from zeropipe.reporting import in_words

if TYPE_CHECKING:
    from zeropipe.planning.devices import Device

app = typer.Typer(add_completion=False)


@app.command()
def calibrate(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The profile: zeropipe plan --device FILE takes it.")
    ] = Path("device.json"),
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes at once; default: one for each GPU, or 2.")
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Of each thing that is timed; the least counts.")] = 8,
) -> None:
    """Measure this machine in a few seconds: rates, links, and what a process takes by itself."""
    from zeropipe.planning.calibrate import calibrate

    with to_file(output, "--output"):
        output.touch()  # before the seconds are spent
    found = calibrate(ranks, steps, output.stem)
    with to_file(output, "--output"):
        output.write_text(json.dumps(asdict(found), indent=1) + "\n")
    _show(found)
    Console(soft_wrap=True).print(f"wrote {output}", highlight=False)


def _show(found: Device) -> None:
    table = Table(title="A rank on this machine", title_justify="left", show_header=False)
    for dtype, rate in found.flops.items():
        table.add_row(f"products in {dtype}", f"{rate / 1e9:,.0f} GFLOP/s")
    table.add_row("kernels read and write", f"{found.bandwidth / 1e9:,.1f} GB/s")
    table.add_row("each kernel costs, with the engine's share", f"{found.launch * 1e6:,.1f} us")
    table.add_row(
        "ranks send each other", f"{found.inside / 1e9:,.2f} GB/s, after {found.latency * 1e6:,.0f} us"
    )
    table.add_row("computing hides of sending", f"{found.overlap:.0%}")
    table.add_row("the process takes by itself", in_words(found.base))
    table.add_row("a rank may have", in_words(found.memory))
    Console(soft_wrap=True).print(table)
