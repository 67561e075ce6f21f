"""Puts the alias in place, once per process, unless another deepspeed is in the way."""

from __future__ import annotations

import importlib
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

from zeropipe.compat.finder import ROOT, AliasFinder, fill
from zeropipe.errors import InstallationError, UsageError

_OURS = frozenset(
    {"__init__.py", "__pycache__"}
)  # what the distribution compat/deepspeed puts into its folder
_REPAIR = "run pip uninstall deepspeed, remove what is left there, then pip install ./compat/deepspeed"


def foreign_files(folder: Path) -> list[str]:
    """What lies in the alias's package ``folder`` and is not the alias's; folders of mere bytecode do not count."""
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.name not in _OURS
        and any(file.is_file() and file.suffix != ".pyc" for file in (entry, *entry.rglob("*")))
    )


def foreign_distribution(site: Path) -> str | None:
    """The version of another distribution named deepspeed that would answer for the alias installed in ``site``."""
    for order, found in enumerate(metadata.distributions(name=ROOT)):
        beside = Path(str(found.locate_file(""))).resolve() == site.resolve()
        if "+zeropipe" not in found.version and (beside or order == 0):
            return found.version
    return None


def check_installation(file: str) -> None:
    """Raise InstallationError when the package whose ``__init__.py`` is ``file`` is mixed with another deepspeed."""
    folder = Path(file).parent
    files = foreign_files(folder)
    if files:
        raise InstallationError(
            f"{folder} also holds files of another deepspeed", found=", ".join(files), fix=_REPAIR
        )
    version = foreign_distribution(folder.parent)
    if version is not None:
        raise InstallationError(
            f"deepspeed is zeropipe's alias in {folder}, but its metadata is another distribution's",
            found=f"version {version}",
            fix=_REPAIR,
        )


def install_as_deepspeed() -> ModuleType:
    """Have this process import zeropipe under the name ``deepspeed``; may be repeated. Returns that module.

    Call it before libraries are imported that look for deepspeed (transformers and accelerate keep the answer),
    in every process. The distribution ``compat/deepspeed`` does it for every process of an environment.

    Raises UsageError where the real package has been imported already, and InstallationError where the
    distribution is mixed with files of the real one.
    """
    present = sys.modules.get(ROOT)
    if present is not None and getattr(present, "__zeropipe__", False):
        return present
    if present is None:
        sys.meta_path.insert(0, AliasFinder(with_metadata=True))
        return importlib.import_module(ROOT)
    if not getattr(present, "__zeropipe_shim__", False):
        raise UsageError(
            "install_as_deepspeed: the real deepspeed is imported already",
            found=getattr(present, "__file__", None),
            fix="call zeropipe.compat.install_as_deepspeed() before every other import",
        )
    check_installation(str(present.__file__))
    sys.meta_path.insert(0, AliasFinder(with_metadata=False))
    fill(present, "")
    return present
