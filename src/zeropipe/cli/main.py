"""The ``zeropipe`` command: a group whose subcommands are imported only when they are called."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Any, Final

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup
from typer.main import get_command

from zeropipe.errors import ZeropipeError
from zeropipe.given import Anything

SUBCOMMANDS: Final = ("ckpt", "config", "onebit", "pipe", "plan", "report")


class LazyGroup(TyperGroup):
    """Imports a subcommand when it is asked for, so that checking a config never waits for torch."""

    def list_commands(self, ctx: Anything) -> list[str]:
        return list(SUBCOMMANDS)

    def get_command(self, ctx: Anything, cmd_name: str) -> Any:
        if cmd_name not in SUBCOMMANDS:
            return None
        if cmd_name == "ckpt":
            from zeropipe.cli.ckpt import app as found
        elif cmd_name == "plan":
            from zeropipe.cli.planning import app as found
        elif cmd_name == "report":
            from zeropipe.cli.planning import reporting as found
        else:
            from zeropipe.cli import plan

            found = getattr(plan, cmd_name)
        command = get_command(found)
        # A Typer app has no name of its own until a parent gives it one.
        command.name = cmd_name
        return command

    def invoke(self, ctx: Anything) -> Any:
        try:
            return super().invoke(ctx)
        except ZeropipeError as error:
            # Plain text: a message may hold square brackets, which rich would read as markup.
            Console(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), str(error)))
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=LazyGroup,
    help="Tools of zeropipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"zeropipe {importlib.metadata.version('zeropipe')}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Tools of zeropipe."""


def main() -> None:
    """Entry point of the ``zeropipe`` script."""
    sys.exit(app())
