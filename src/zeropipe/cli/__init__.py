"""The ``zeropipe`` command; here, how its parts show what they have found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from zeropipe.errors import ConfigError


def shown(value: object) -> Text:
    """Text from a file as it is: brackets are no markup, and nothing in it steers the terminal."""
    text = str(value)
    return Text(text if text.isprintable() else repr(text))


def say(what: str | Table) -> None:
    """Without the width of the screen in it: a path that is cut cannot be copied."""
    Console(soft_wrap=True).print(what, highlight=False, markup=False)


@contextmanager
def bar(what: str, total: int, files: bool = True) -> Iterator[Callable[[int], None]]:
    """A progress bar on the error stream, so that output stays clean; gone when the work is done."""
    count = DownloadColumn() if files else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total or None)
        yield lambda done: progress.advance(task, done)


@contextmanager
def to_file(path: Path, option: str) -> Iterator[None]:
    """Around what writes ``path``: a ConfigError names it and the option that asked for it."""
    try:
        yield
    except OSError as error:
        found = error.strerror or str(error)
        raise ConfigError(f"cannot write {path}", found=found, fix=f"give another {option}") from error
