"""What a run will be, before it starts: ``zeropipe config`` checks and documents configurations, ``zeropipe onebit
plan`` counts what compressed communication will send, and ``zeropipe pipe plan`` simulates a schedule.

Checking a configuration never waits for torch: what the plans need is imported when they are asked for.
"""

from __future__ import annotations

import json
import shutil
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zeropipe.cli import shown, to_file
from zeropipe.config import reference as reference_text
from zeropipe.config.batch import ACCUMULATION, MICRO, TRAIN, check_world, solve_batch
from zeropipe.config.parse import parse_config
from zeropipe.config.schema import Config
from zeropipe.errors import ConfigError, ScheduleError

if TYPE_CHECKING:
    from zeropipe.runtime.pipe.simulate import Costs, Simulation

_BEST_CHUNKS = 4
_MOST_STEPS = 2**14  # a few seconds: schedules that are played out take longer than linear time
_MOST_CELLS = 1024  # of a rank's line

config = typer.Typer(help="Check and document configurations.", no_args_is_help=True, add_completion=False)
onebit = typer.Typer(help="Compressed communication: 1-bit Adam, 1-bit LAMB, 0/1 Adam.", no_args_is_help=True)
pipe = typer.Typer(help="Pipeline schedules: plan, compare, draw.", no_args_is_help=True)


@onebit.callback()
@pipe.callback()
def _keeps_plan_a_named_command() -> None:
    pass


# Configurations.

Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Write to this file instead of the screen.")
]


@config.command()
def check(
    path: Annotated[str, typer.Argument(help="The JSON file.", metavar="FILE")],
    world: Annotated[int, typer.Option("--world", "-w", min=1, help="Number of data-parallel ranks.")] = 1,
) -> None:
    """Say what a configuration means at this number of ranks; exit 1 with the error if it cannot be used."""
    parsed = parse_config(path)
    check_world(parsed, world)
    console = Console(soft_wrap=True)
    left_open = [name for name in (TRAIN, MICRO, ACCUMULATION) if parsed.is_auto(name)]
    if left_open:
        console.print(f"[bold]batch[/]  left to the software in between: {', '.join(left_open)}")
    else:
        train, micro, gas = (getattr(parsed, name) for name in (TRAIN, MICRO, ACCUMULATION))
        console.print(f"[bold]batch[/]  {solve_batch(train, micro, gas, world)}")
    stage = parsed.zero_optimization.stage
    console.print(f"[bold]dtype[/]  {parsed.precision}    [bold]ZeRO stage[/]  {stage}")
    for notice in parsed.notices:
        console.print(f"[yellow]note[/]   {escape(notice.text)}")
    console.print(_changed(parsed))


@config.command()
def schema(output: Output = None) -> None:
    """The JSON schema of the configuration, for editors."""
    _emit(json.dumps(reference_text.json_schema(), indent=2) + "\n", output)


@config.command()
def reference(output: Output = None) -> None:
    """The reference of all keys, as markdown."""
    _emit(reference_text.markdown(), output)


def _changed(parsed: Config) -> Table | str:
    defaults, rows = Config().settings(), parsed.settings(changed=True)
    if not rows:
        return "every setting has its default"
    table = Table("setting", "value", "default", title="settings that differ from their default")
    for name, value in rows.items():
        table.add_row(*(shown(cell) for cell in (name, value, defaults.get(name, ""))))
    return table


def _emit(text: str, output: Path | None) -> None:
    if output is None:
        typer.echo(text, nl=False)
        return
    with to_file(output, "--output"):
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")


# Compressed communication.


@onebit.command("plan")
def onebit_plan(
    path: Annotated[
        Path, typer.Option("--config", help="The run's JSON config; its optimizer section is used.")
    ],
    params: Annotated[int, typer.Option(help="Trained parameters (elements).")],
    world: Annotated[int, typer.Option(help="Ranks that average together.")],
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps; default: the schedule's total_num_steps.")
    ] = None,
    tensors: Annotated[int, typer.Option(help="Parameter tensors; each has a scale in the messages.")] = 100,
    against_freeze_step: Annotated[
        int | None, typer.Option(help="Compare with 1-bit Adam of this freeze_step too.")
    ] = None,
) -> None:
    """Print phases, rounds and bytes that one rank sends, beside dense Adam."""
    from zeropipe.runtime.fp16.onebit import plan as planning

    parsed = parse_config(path)
    schedule = parsed.scheduler.params or {}
    total = steps if steps is not None else schedule.get("total_num_steps")
    if not isinstance(total, int):
        raise ConfigError(
            "the run's length is not known", found=f"total_num_steps {total!r}", fix="pass --steps"
        )
    options = parsed.optimizer.params or {}
    width = 4 if parsed.precision == "fp32" else 2
    wire = parsed.communication_data_type
    job = planning.Job(
        params,
        total,
        world,
        element_bytes=width if wire is None else 4 if wire == "fp32" else 2,
        param_bytes=width,
        stage=parsed.zero_optimization.stage,
        tensors=tensors,
        node_size=int(options.get("node_size", 1)),
    )
    name, phases = planning.phases_of(parsed.optimizer.type, options)
    warmup = schedule.get("warmup_num_steps")
    planning.check(phases, name, job, warmup if isinstance(warmup, int) else None)
    ours, dense = planning.plan(name, phases, job), planning.dense_plan(job)
    others = [dense]
    if against_freeze_step is not None:
        one_bit = planning.Phases(planning.Rules(against_freeze_step))
        others.append(planning.plan("1-bit Adam", one_bit, job))
    typer.echo(f"{params} parameters, {total} steps, {world} ranks, stage {job.stage}, {parsed.precision}")
    for entry in (ours, *others):
        typer.echo(str(entry))
    for other in others:
        typer.echo(
            f"{name} sends {ours.times_less_than(other):.3g} times less than {other.name} "
            f"({100 * ours.saves('bytes', other):.1f} % less), in "
            f"{100 * ours.saves('exchanges', other):.1f} % fewer exchanges and "
            f"{100 * ours.saves('rounds', other):.1f} % fewer rounds"
        )
    typer.echo(
        "An exchange is a step in which gradients, momenta or updates travel, a round one in which ranks wait for each "
        "other: they agree on the gradients' norm in every step."
    )


# Pipelines.


@pipe.command("plan")
def pipe_plan(
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
    from zeropipe.runtime.pipe import schedule as schedules
    from zeropipe.runtime.pipe.simulate import Costs, simulate

    for option, value in (("--memory", memory), ("--activation-bytes", activation_bytes)):
        if value is not None and not value >= 0:  # neither is nan
            raise ConfigError(option, expected="a number that is not negative", found=value)
    files = {"png": png, "svg": svg, "trace": trace}
    for kind, path in files.items():
        if path is not None and kind != "trace" and path.suffix.lower() != f".{kind}":
            raise ConfigError(f"--{kind}", expected=f"a file that ends in .{kind}", found=path)
    # Before anything is laid out: to make one that is too large takes long by itself.
    _check_size(stages, micro_batches, max(chunks or 1, _BEST_CHUNKS if best else 1))
    measured = costs.endswith(".json")
    cost = Costs.from_mapping(_read_json(Path(costs))) if measured else Costs.parse(costs)
    if best:
        if measured:
            raise ConfigError("--best compares several cuts of the model", fix="give --costs as numbers")
        result = _best(stages, micro_batches, inf if memory is None else memory, cost)
    else:
        given = Path(schedule)
        wanted = _read_text(given) if given.suffix and given.exists() else schedule
        share = cost if measured else cost.share(chunks or schedules.default_chunks(wanted))
        made = schedules.make_schedule(wanted, stages, micro_batches, chunks, share)
        # Again, now that it is known: a schedule from a file has sizes of its own.
        _check_size(made.num_ranks, made.micro_batches, made.num_stages // made.num_ranks)
        result = simulate(made, share.checked(made.num_stages))
    if text:
        typer.echo(str(result.schedule), nl=False)
    elif not best:
        _show(result, activation_bytes)
    _write(result, files, quiet=text)


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
    from zeropipe.runtime.pipe import picture

    made = result.schedule
    title = (
        f"{made.name}: {made.num_ranks} ranks, {made.micro_batches} micro-batches, "
        f"{made.num_stages // made.num_ranks} stage(s) a rank; "
        f"bubble {result.bubble:.4f}, peak activations {result.peak:.4g}"
    )
    for kind, path in files.items():
        if path is None:
            continue
        with to_file(path, f"--{kind}"):
            if kind == "trace":
                path.write_text(picture.chrome_trace(result.events, made.num_ranks))
            else:
                picture.draw(result.events, made.num_ranks, path, title)
        typer.echo(f"wrote {path}", err=quiet)


# Files of the user's.


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
