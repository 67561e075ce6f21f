"""``zeropipe plan``: what a run needs before it runs; ``zeropipe report``: what it did after."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.main import get_command

from zeropipe.cli import to_file
from zeropipe.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from zeropipe.planning.fitting.choices import Choice
    from zeropipe.planning.fitting.fit import Program
    from zeropipe.planning.plan import Plan

app = typer.Typer(add_completion=False)
reporting = typer.Typer(add_completion=False)
CALIBRATE = "calibrate"  # in place of a script
_HOLES = ("micro", "accumulation", "recompute", "config", "stages", "schedule", "chunks")
_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}


@app.command(context_settings=_SETTINGS)
def plan(
    context: typer.Context,
    script: Annotated[
        str | None,
        typer.Argument(
            help="The training script; what follows it are its own arguments. With --fit these may hold {micro}, "
            "{accumulation}, {recompute}, {stages}, {schedule}, {chunks} and {config}."
        ),
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
    batch: Annotated[
        int | None, typer.Option(min=1, help="Micro-batch, with --hf; default: the configuration's.")
    ] = None,
    seq: Annotated[int, typer.Option(min=1, help="Tokens of a sample, with --hf.")] = 2048,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Gradient checkpointing, with --hf.")
    ] = False,
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps to rehearse.")] = 3,
    assume: Annotated[
        float | None, typer.Option(help="What the script gets where it asks for a value: loss.item().")
    ] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the plan to this file.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write the plan as a page (HTML).")] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two configurations, planned side by side.")
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Search the fastest configuration of the same batch that fits.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the configuration that --fit found.")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="With --fit: stage, micro, shard, recompute, offload or pipeline stays as it is."),
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option(help="With --fit: memory of a node's host that offload may take.")
    ] = None,
) -> None:
    """Rehearse a run as some ranks of any world, on this machine: bytes, traffic, time, and whether it fits.

    ``zeropipe plan calibrate`` measures this machine instead: its profile is a ``--device``.
    """
    if script == CALIBRATE and not Path(script).is_file():
        from zeropipe.cli.calibrate import app as calibrating

        get_command(calibrating).main(context.args, f"zeropipe plan {CALIBRATE}", standalone_mode=False)
        return
    from zeropipe.cli import tables
    from zeropipe.planning.plan import rehearse_all

    if (script is None) == (hf is None):
        raise ConfigError(
            "zeropipe plan", expected="a script or --hf config.json", found="both" if script else "neither"
        )
    if config is None and compare is None and (hf is not None or fit):
        raise ConfigError(
            f"zeropipe plan {'--fit' if fit else '--hf'}", expected="--config my.json", found="none"
        )
    if fit and compare is not None:
        raise ConfigError("zeropipe plan", expected="--fit or --compare", found="both")
    _used(context, hf is not None, fit, compare is not None)

    def planned(source: str | None) -> Plan:
        if hf is not None:
            from zeropipe.planning.transformers import program_of

            assert source is not None
            shaped = _sized(source, batch, world)
            program: Callable[[], object] = program_of(hf, *shaped, seq, recompute)
            source = None
        else:
            program = _script(Path(str(script)), context.args)
        return rehearse_all(
            program,
            world,
            config=source,
            device=device,
            device_memory=device_memory,
            steps=steps,
            assume=assume,
        )

    if compare is not None:
        names = (str(compare[0]), str(compare[1]))
        found = [planned(name) for name in names]
        tables.compare(names, (found[0], found[1]))
        raise typer.Exit(0 if all(one.fits for one in found) else 3)
    if fit:
        best = _fitted(context, script, str(config), hf, seq, output, keep or (), host_memory)
        if best is None:
            raise typer.Exit(3)
        plan = best
    else:
        plan = planned(config)
        tables.show(plan)
    if as_json is not None:
        with to_file(as_json, "--json"):
            as_json.write_text(json.dumps(plan.to_json(), indent=1))
    if report is not None:
        from zeropipe.reporting.drawing import write
        from zeropipe.reporting.page import plan_page

        with to_file(report, "--report"):
            write(plan_page(plan.to_json()), report)
        Console(soft_wrap=True).print(f"wrote {report}", highlight=False)
    if not plan.fits:
        raise typer.Exit(3)


def _used(context: typer.Context, hf: bool, fit: bool, compare: bool) -> None:
    """Raise ConfigError for an option that was given and would do nothing."""
    needs = {
        "--hf": (hf, ("seq",)),
        "--hf, without --fit, which chooses it": (hf and not fit, ("batch", "recompute")),
        "--fit": (fit, ("output", "keep", "host_memory")),
        "one plan, without --compare": (not compare, ("config", "as_json", "report")),
    }
    for expected, (there, names) in needs.items():
        for name in names:
            source = context.get_parameter_source(name)
            if not there and source is not None and source.name == "COMMANDLINE":
                option = "--json" if name == "as_json" else f"--{name.replace('_', '-')}"
                raise ConfigError(f"zeropipe plan {option}", expected=expected, found=option)


def _sized(source: str, batch: int | None, world: int) -> tuple[dict[str, Any], int]:
    """The configuration of a model without a script, and its micro-batch; ``batch`` is for one that has none."""
    from zeropipe.config.batch import MICRO, batch_of
    from zeropipe.config.parse import parse_config, read_source

    config = read_source(source)
    parsed = parse_config(config)
    if batch is not None and parsed.train_batch_size is parsed.train_micro_batch_size_per_gpu is None:
        return {**config, MICRO: batch}, batch
    found = batch_of(parsed, world // max(parsed.sequence_parallel_size, 1)).micro_batch_size
    if batch not in (None, found):
        raise ConfigError(
            "--batch",
            expected=f"{found}, the micro-batch of {source}",
            found=batch,
            fix=f"leave --batch out, or change {MICRO}",
        )
    return config, found


def _fitted(
    context: typer.Context,
    script: str | None,
    config: str,
    hf: Path | None,
    seq: int,
    output: Path | None,
    keep: Collection[str],
    host_memory: str | None,
) -> Plan | None:
    """The plan of what --fit has found and written."""
    from zeropipe.cli import tables
    from zeropipe.planning.fitting.fit import Follows, fit_program

    said, errors = context.params, Console(stderr=True, soft_wrap=True)
    errors.print("rehearsing:", highlight=False)
    with TemporaryDirectory() as folder:
        program: Program
        if hf is not None:
            program, follows = _of_shape(hf, seq), Follows(micro=True, recompute=True)
        else:
            program = _filled(Path(str(script)), context.args, Path(folder) / "config.json")
            asked = {name: any(f"{{{name}}}" in word for word in context.args) for name in _HOLES}
            follows = Follows(asked["micro"] or None, asked["recompute"], asked["stages"])
        found = fit_program(
            program,
            config,
            said["world"],
            follows=follows,
            device=said["device"],
            device_memory=said["device_memory"],
            host_memory=host_memory,
            keep=keep,
            steps=said["steps"],
            assume=said["assume"],
            told=lambda choice, plan: errors.print(
                tables.looked(choice, plan), highlight=False, markup=False
            ),
        )
    tables.show_fit(found)
    if output is not None and found.config is not None:
        with to_file(output, "--output"):
            output.write_text(json.dumps(found.config, indent=2) + "\n")
        Console(soft_wrap=True).print(f"wrote {output}", highlight=False)
    return found.plan


def _of_shape(hf: Path, seq: int) -> Program:
    from zeropipe.planning.transformers import program_of

    def program(choice: Choice, config: dict[str, Any]) -> Callable[[], object]:
        return program_of(hf, config, choice.micro, seq, choice.recompute)

    return program


def _filled(path: Path, arguments: list[str], place: Path) -> Program:
    """The script with what a choice says in the holes of its arguments; its configuration lies at ``place``."""

    def program(choice: Choice, config: dict[str, Any]) -> Callable[[], object]:
        place.write_text(json.dumps(config))
        cut = choice.cut
        pipeline = (cut.ranks, cut.schedule, cut.chunks) if cut else (1, "1f1b", 1)
        values = (choice.micro, choice.accumulation, int(choice.recompute), place, *pipeline)
        words = arguments
        for name, value in zip(_HOLES, values, strict=True):
            words = [word.replace(f"{{{name}}}", str(value)) for word in words]
        return _script(path, words)

    return program


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
