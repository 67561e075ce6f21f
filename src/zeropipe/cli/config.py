"""``zeropipe config``: check a configuration before a job starts, and write its schema and reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zeropipe.config import reference as reference_text
from zeropipe.config.batch import BatchSizes, solve_batch
from zeropipe.config.checks import check_world
from zeropipe.config.parse import parse_config
from zeropipe.config.schema import Config
from zeropipe.errors import ConfigError

app = typer.Typer(help="Check and document configurations.", no_args_is_help=True, add_completion=False)

Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Write to this file instead of the screen.")
]


@app.command()
def check(
    path: Annotated[str, typer.Argument(help="The JSON file.", metavar="FILE")],
    world: Annotated[int, typer.Option("--world", "-w", min=1, help="Number of data-parallel ranks.")] = 1,
) -> None:
    """Say what a configuration means at this number of ranks; exit 1 with the error if it cannot be used."""
    config = parse_config(path)
    check_world(config, world)
    console = Console(soft_wrap=True)
    left_open = [name for name in _BATCH_KEYS if config.is_auto(name)]
    if left_open:
        console.print(f"[bold]batch[/]  left to the software in between: {', '.join(left_open)}")
    else:
        console.print(f"[bold]batch[/]  {_solve(config, world)}")
    console.print(
        f"[bold]dtype[/]  {config.precision}    [bold]ZeRO stage[/]  {config.zero_optimization.stage}"
    )
    for notice in config.notices:
        console.print(f"[yellow]note[/]   {escape(notice.text)}")
    console.print(_changed(config))


@app.command()
def schema(output: Output = None) -> None:
    """The JSON schema of the configuration, for editors."""
    _emit(json.dumps(reference_text.json_schema(), indent=2) + "\n", output)


@app.command()
def reference(output: Output = None) -> None:
    """The reference of all keys, as markdown."""
    _emit(reference_text.markdown(), output)


_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def _solve(config: Config, world: int) -> BatchSizes:
    train, micro, accumulation = (getattr(config, name) for name in _BATCH_KEYS)
    return solve_batch(train, micro, accumulation, world)


def _changed(config: Config) -> Table | str:
    defaults = Config().settings()
    rows = config.settings(changed=True)
    if not rows:
        return "every setting has its default"
    table = Table("setting", "value", "default", title="settings that differ from their default")
    for name, value in rows.items():
        default = escape(str(defaults[name])) if name in defaults else ""
        table.add_row(escape(name), escape(str(value)), default)
    return table


def _emit(text: str, output: Path | None) -> None:
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write {str(output)!r}: {error.strerror}", fix="give another --output"
        ) from None
