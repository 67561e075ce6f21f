"""The ``ds_report`` command: what is installed under which name, and what this machine offers it."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata

from rich.console import Console
from rich.table import Table

import zeropipe
from zeropipe.compat.finder import ROOT, install_as_deepspeed
from zeropipe.compat.table import ABSENT, VERSION
from zeropipe.errors import ZeropipeError

Row = tuple[str, str]


def alias() -> str:
    """Who answers ``import deepspeed`` in a process of this environment."""
    # Asked of the metadata first, which runs no code of a package that may be broken.
    try:
        found = next(iter(metadata.distributions(name=ROOT)), None)
        if found is None:
            return "not installed (pip install ./compat/deepspeed, or zeropipe.compat.install_as_deepspeed())"
        if found.version != VERSION:
            whose = "an alias of another zeropipe" if "+zeropipe" in found.version else "the real package"
            return f"{found.version}: {whose}, not zeropipe {zeropipe.__version__}"
        install_as_deepspeed()
    except (ZeropipeError, OSError) as error:
        return f"broken: {error}"
    return f"{VERSION}: zeropipe {zeropipe.__version__}"


def software() -> Iterator[Row]:
    import torch

    yield "import deepspeed", alias()
    yield "zeropipe", f"{zeropipe.__version__} in {os.path.dirname(zeropipe.__file__)}"
    yield "torch", f"{torch.__version__} in {os.path.dirname(torch.__file__)}"
    yield "CUDA that torch was built for", str(torch.version.cuda or "none")
    yield "Python", f"{platform.python_version()} ({sys.executable})"
    # Libraries whose versions decide what they ask of the name deepspeed.
    for name in (
        "numpy",
        "pydantic",
        "safetensors",
        "transformers",
        "accelerate",
        "peft",
        "trl",
        "lightning",
    ):
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            yield name, "not installed"


def machine() -> Iterator[Row]:
    import torch

    from zeropipe.comm.group import backends

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    yield "GPUs", ", ".join(torch.cuda.get_device_name(i) for i in range(gpus)) or "none: computes on the CPU"
    yield "cores", f"{len(os.sched_getaffinity(0))} usable, torch uses {torch.get_num_threads()} threads"
    yield "communication", ", ".join(backends()) or "none: one process only"


def operations() -> Iterator[Row]:
    yield "Adam, AdamW, Adagrad", "torch's fused steps"
    yield "Lion, Lamb, Muon, 1-bit optimizers", "zeropipe's, in torch operations"
    yield "offload to files", "memory-mapped files"
    yield "compiled by zeropipe", "nothing"
    yield "not part of zeropipe", ", ".join(sorted(ABSENT))


def main() -> None:
    """Entry point of ``ds_report``."""
    console = Console()
    for title, rows in (("software", software()), ("machine", machine()), ("operations", operations())):
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)


if __name__ == "__main__":
    main()
