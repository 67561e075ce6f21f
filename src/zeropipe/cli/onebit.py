"""``zeropipe onebit plan``: what compressed communication will send over a run, before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zeropipe.errors import ConfigError

app = typer.Typer(help="Compressed communication: 1-bit Adam, 1-bit LAMB, 0/1 Adam.", no_args_is_help=True)


@app.callback()
def _onebit() -> None:
    """Keeps ``plan`` a named command."""


@app.command()
def plan(
    config: Annotated[Path, typer.Option(help="The run's JSON config; its optimizer section is used.")],
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
    from zeropipe.config.parse import parse_config
    from zeropipe.runtime.fp16.onebit import plan as planning

    parsed = parse_config(config)
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
