"""``zeropipe pipe plan``: what a pipeline schedule costs, seen before anything runs."""

from __future__ import annotations

import json
import shutil
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zeropipe.errors import ConfigError, ScheduleError, ZeropipeError

if TYPE_CHECKING:
    from zeropipe.runtime.pipe.schedules.costs import Costs
    from zeropipe.runtime.pipe.simulate import Simulation

_BEST_CHUNKS = 4
_MOST_STEPS = 2**14  # a few seconds: schedules that are played out take longer than linear time
_MOST_CELLS = 1024  # of a rank's line

app = typer.Typer(help="Pipeline schedules: plan, compare, draw.", no_args_is_help=True)


@app.callback()
def _pipe() -> None:
    """Keeps ``plan`` a named command."""


@app.command()
def plan(
    schedule: Annotated[
        str, typer.Option(help="A schedule's name, or a file that holds one as text.")
    ] = "1f1b",
    stages: Annotated[int, typer.Option(help="Pipeline ranks.")] = 4,
    micro_batches: Annotated[int, typer.Option(help="Micro-batches of one optimizer step.")] = 8,
    chunks: Annotated[
        int | None, typer.Option(help="Stages on each rank; default: the schedule's own.")
    ] = None,
    costs: Annotated[
        str,
        typer.Option(
            help="F,B,W or F,B,W,comm: time of a rank's whole share for one micro-batch (B: input gradient); "
            "or a JSON file with the keys of a profile, by stage."
        ),
    ] = "1,1,1",
    best: Annotated[
        bool, typer.Option("--best", help="Rank every schedule and chunk count that fits --memory.")
    ] = False,
    memory: Annotated[
        float | None, typer.Option(help="Limit for --best: activations of this many micro-batches a rank.")
    ] = None,
    activation_bytes: Annotated[
        float | None, typer.Option(help="Bytes that a rank's whole share saves for one micro-batch.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Write a picture.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Write a picture.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a timeline for a browser's trace viewer.")] = None,
    text: Annotated[bool, typer.Option("--text", help="Print the schedule itself, ready to edit.")] = False,
) -> None:
    """Simulate a schedule: its grid, bubble, and peak activations."""
    try:
        _plan(
            schedule,
            stages,
            micro_batches,
            chunks,
            costs,
            best,
            memory,
            activation_bytes,
            {"png": png, "svg": svg, "trace": trace},
            text,
        )
    except ZeropipeError as error:
        typer.echo(f"zeropipe: {error}", err=True)
        raise typer.Exit(1) from error


def _plan(
    name: str,
    ranks: int,
    micro_batches: int,
    chunks: int | None,
    costs_text: str,
    best: bool,
    memory: float | None,
    activation_bytes: float | None,
    files: dict[str, Path | None],
    print_text: bool,
) -> None:
    from zeropipe.runtime.pipe import schedule as schedules
    from zeropipe.runtime.pipe.schedules.costs import Costs
    from zeropipe.runtime.pipe.simulate import simulate

    for option, value in (("--memory", memory), ("--activation-bytes", activation_bytes)):
        if value is not None and not value >= 0:  # neither is nan
            raise ConfigError(option, expected="a number that is not negative", found=value)
    for kind, path in files.items():
        if path is not None and kind != "trace" and path.suffix.lower() != f".{kind}":
            raise ConfigError(f"--{kind}", expected=f"a file that ends in .{kind}", found=path)
    _check_size(ranks, micro_batches, max(chunks or 1, _BEST_CHUNKS if best else 1))
    measured = costs_text.endswith(".json")
    costs = Costs.from_mapping(_read_json(Path(costs_text))) if measured else Costs.parse(costs_text)
    if best:
        if measured:
            raise ConfigError("--best compares several cuts of the model", fix="give --costs as numbers")
        result = _best(ranks, micro_batches, inf if memory is None else memory, costs)
    else:
        given = Path(name)
        wanted = _read_text(given) if given.suffix and given.exists() else name
        share = costs if measured else costs.share(chunks or schedules.default_chunks(wanted))
        made = schedules.make_schedule(wanted, ranks, micro_batches, chunks, share)
        _check_size(made.num_ranks, made.micro_batches, made.num_stages // made.num_ranks)
        result = simulate(made, share.checked(made.num_stages))
    if print_text:
        typer.echo(str(result.schedule), nl=False)
    elif not best:
        _show(result, activation_bytes)
    _write(result, files, quiet=print_text)


def _check_size(ranks: int, micro_batches: int, chunks: int) -> None:
    steps = ranks * micro_batches * chunks
    if min(ranks, micro_batches, chunks) > 0 and steps > _MOST_STEPS:
        raise ConfigError(
            "this schedule is too large to be played out here",
            expected=f"at most {_MOST_STEPS:,} ranks x micro-batches x chunks",
            found=f"{steps:,}",
            fix="the figures hardly change beyond four micro-batches a rank: plan with fewer",
        )


def _best(ranks: int, micro_batches: int, memory: float, costs: Costs) -> Simulation:
    """Print every plan that fits; the quickest."""
    from zeropipe.runtime.pipe import schedule as schedules

    plans = schedules.choose(ranks, micro_batches, memory, costs, range(1, _BEST_CHUNKS + 1))
    if not plans:
        raise ScheduleError(
            "no schedule fits the memory limit",
            expected=f"activations of at most {memory:g} micro-batches",
            fix="raise --memory, recompute activations, or use smaller micro-batches",
        )
    typer.echo("schedule         chunks   time     bubble   peak activations")
    for one in plans:
        v = one.schedule.num_stages // ranks
        typer.echo(f"{one.schedule.name:<16} {v:>6} {one.makespan:>8.4g} {one.bubble:>9.4f}   {one.peak:.4g}")
    return plans[0]


def _show(result: Simulation, activation_bytes: float | None) -> None:
    from zeropipe.runtime.pipe.picture import text_grid

    made = result.schedule
    # Steps that are short beside the rest share a cell, else one long step would fill the screen.
    shortest = min(e.end - e.start for e in result.events if e.end > e.start)
    unit = max(shortest, result.makespan / _MOST_CELLS)
    columns = shutil.get_terminal_size((120, 24)).columns
    typer.echo(text_grid(result.events, made.num_ranks, unit=unit, columns=columns))
    typer.echo(
        f"\ntime {result.makespan:.6g}   bubble {result.bubble:.4f} (idle over ideal)   peak {result.peak:.4g}"
    )
    for rank, peak in enumerate(result.peaks):
        bytes_text = "" if activation_bytes is None else f", {peak * activation_bytes / 2**20:,.1f} MiB"
        owned = ",".join(map(str, made.stages_of(rank)))
        typer.echo(f"rank {rank}: stages {owned}; peak activations {peak:.4g} micro-batches{bytes_text}")


def _write(result: Simulation, files: dict[str, Path | None], quiet: bool) -> None:
    from zeropipe.runtime.pipe.picture import chrome_trace

    made = result.schedule
    title = (
        f"{made.name}: {made.num_ranks} ranks, {made.micro_batches} micro-batches, "
        f"{made.num_stages // made.num_ranks} stage(s) a rank; "
        f"bubble {result.bubble:.4f}, peak activations {result.peak:.4g}"
    )
    for kind, path in files.items():
        if path is None:
            continue
        try:
            if kind == "trace":
                path.write_text(chrome_trace(result.events, made.num_ranks))
            else:
                from zeropipe.runtime.pipe.picture import draw

                draw(result.events, made.num_ranks, path, title)
        except OSError as error:
            raise ConfigError(
                f"cannot write {path}", found=error.strerror or str(error), fix="name another file"
            ) from error
        typer.echo(f"wrote {path}", err=quiet)


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}", found=str(error), fix="give a text file") from error


def _read_json(path: Path) -> dict[str, object]:
    try:
        data = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"cannot read the cost profile {path}", found=str(error)) from error
    if not isinstance(data, dict):
        raise ConfigError(f"the cost profile {path} is not an object", found=type(data).__name__)
    return data
