"""Makes ``import deepspeed`` and everything below it give zeropipe's own modules and objects, as the table says, once
per process and unless another deepspeed is in the way.

A second import of the same files under another name would make second classes: ``isinstance`` would fail and a
patch would not be seen. So a loader here returns the module that exists.
"""

from __future__ import annotations

import dis
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from email.message import Message
from importlib import metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from zeropipe.compat.absent import ROOT, message, stand_in
from zeropipe.compat.table import ABSENT, BESIDE, MODULES, NAMES, VERSION
from zeropipe.errors import InstallationError, UsageError
from zeropipe.given import Anything

_IMPORT_FROM = dis.opmap["IMPORT_FROM"]
_UNKNOWN = "see what is there, and what stands in for what is not, in docs/from-deepspeed.md"


def instead_of(path: str) -> str | None:
    """What to do in place of the name ``path`` below ``deepspeed``; None where the table does not know it."""
    while path and path not in ABSENT:
        path = path.rpartition(".")[0]
    return ABSENT.get(path)


def _exists(path: str) -> bool:
    return path == "" or path in MODULES or path in NAMES


class _AliasLoader(Loader):
    """Hands out the real module of an alias, or makes the module of a table of names, or one of stand-ins."""

    def __init__(self, path: str) -> None:
        self._path = path

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        # What it is by itself is kept until the import system has written over it.
        if self._path in MODULES:
            real = importlib.import_module(MODULES[self._path])
            self._spec = real.__spec__, getattr(real, "__loader__", None), real.__package__
            return real
        return ModuleType(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if self._path in MODULES:
            # The import system has written the alias's spec over the module's own.
            module.__spec__, module.__loader__, module.__package__ = self._spec
            extend(module, self._path)
            # A module below a package of ours is its attribute and never asked for under this name: extend it now.
            for path in BESIDE:
                if path.rpartition(".")[0] == self._path:
                    extend(importlib.import_module(MODULES[path]), path)
        else:
            fill(module, self._path)

    def get_code(self, fullname: str) -> Any:
        """For ``python -m deepspeed.launcher.runner``: the code of the real module."""
        spec = importlib.util.find_spec(MODULES[self._path]) if self._path in MODULES else None
        loader: Any = None if spec is None else spec.loader
        return None if loader is None else loader.get_code(loader.name)


def _find(module: ModuleType, path: str, name: str, asking: FrameType) -> Any:
    """The ``name`` that ``module``, which stands for ``path``, does not have itself.

    Raises AttributeError for one that is not offered, and ImportError where ``asking`` imports it.
    """
    below = f"{path}.{name}" if path else name
    target = NAMES.get(path, {}).get(name) or BESIDE.get(path, {}).get(name)
    if target is not None:
        home, _, attribute = target.partition(":")
        return getattr(importlib.import_module(home), attribute)
    if _exists(below):
        return importlib.import_module(f"{ROOT}.{below}")
    if name.startswith("__"):
        raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
    fix = instead_of(below)
    if fix is not None:
        return stand_in(below, fix)
    # ``from x import y`` makes its own message of an AttributeError, without the way out and with another path.
    if asking.f_code.co_code[asking.f_lasti] == _IMPORT_FROM:
        raise ImportError(message(f"{_imported(asking, path)}.{name}".lstrip("."), _UNKNOWN))
    raise AttributeError(message(below, _UNKNOWN))


def _imported(asking: FrameType, path: str) -> str:
    """The ``x`` below deepspeed of the statement ``from x import y`` that ``asking`` is at; one module has several."""
    imported = path
    for step in dis.get_instructions(asking.f_code):
        if step.offset >= asking.f_lasti:
            break
        if step.opname == "IMPORT_NAME":
            root, _, below = str(step.argval).partition(".")
            imported = below if root == ROOT else path
    return imported


def extend(module: ModuleType, path: str) -> None:
    """Have zeropipe's own ``module`` answer, after its own names, for those that only DeepSpeed users look for."""
    own = vars(module).get("__getattr__")

    def lookup(name: str) -> Any:
        if own is not None:
            try:
                return own(name)
            except AttributeError:
                if ROOT not in sys.modules:
                    raise
        elif ROOT not in sys.modules:  # the alias was taken away again
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        return _find(module, path, name, sys._getframe(1))

    if getattr(own, "extends", None) != path:
        lookup.extends = path  # type: ignore[attr-defined]
        vars(module)["__getattr__"] = lookup


def fill(module: ModuleType, path: str) -> None:
    """Make ``module`` answer for the names that the tables have under ``path``."""

    # Looked up when they are asked for: importing all would load every subject, and take its time.
    def lookup(name: str) -> Any:
        value = _find(module, path, name, sys._getframe(1))
        # Kept here, in the module that only the alias has: the next look-up costs nothing, and a name that a client
        # exchanges in it stays exchanged.
        setattr(module, name, value)
        return value

    prefix = path + "." if path else ""
    children = {key[len(prefix) :] for key in (*MODULES, *NAMES) if key and key.startswith(prefix)}
    offered = {child for child in children if child and "." not in child}.union(NAMES.get(path, ()))
    module.__doc__ = f"zeropipe, under the name {module.__name__}."
    module.__path__ = []
    vars(module).update(__getattr__=lookup, __dir__=lambda: sorted({*vars(module), *offered}))
    if path == "":
        vars(module).update(__version__=VERSION, __zeropipe__=True, __zeropipe_prints__=_print_progress)


def _print_progress(progress: Anything) -> None:
    # By way of the module, which loads what prints: ``import deepspeed`` alone stays cheap.
    from zeropipe.compat.printed import print_progress

    print_progress(progress)


class AliasFinder(MetaPathFinder):
    """Finds ``deepspeed`` and the modules below it.

    ``with_metadata``: also answer ``importlib.metadata.version("deepspeed")``, where no distribution does.
    """

    def __init__(self, with_metadata: bool) -> None:
        self._with_metadata = with_metadata

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of an alias, or of stand-ins for what is declared to stay out.

        Raises ModuleNotFoundError for another name below deepspeed.
        """
        root, _, below = fullname.partition(".")
        if root != ROOT:
            return None
        known = _exists(below)
        if not known and instead_of(below) is None:
            # Without ``name``: ``from deepspeed import x`` would hide an error that carries it.
            raise ModuleNotFoundError(message(below, _UNKNOWN))
        holds_more = not known or below in NAMES or any(key.startswith(below + ".") for key in MODULES)
        return ModuleSpec(fullname, _AliasLoader(below), origin="zeropipe", is_package=holds_more)

    def find_distributions(
        self, context: metadata.DistributionFinder.Context | None = None
    ) -> Iterable[metadata.Distribution]:
        name = getattr(context, "name", None)
        return [_Distribution()] if self._with_metadata and name in (ROOT, None) else []


class _Distribution(metadata.Distribution):
    """What ``importlib.metadata`` says of deepspeed in a process where only the alias is there."""

    def read_text(self, filename: str) -> str | None:
        if filename == "METADATA":
            message = Message()
            message["Metadata-Version"] = "2.1"
            message["Name"] = ROOT
            message["Version"] = VERSION
            message["Requires-Dist"] = "zeropipe"
            return str(message)
        return ROOT + "\n" if filename == "top_level.txt" else None

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(f"{path}: deepspeed is an alias in this process, not an installed package")


# What the distribution compat/deepspeed puts into its folder.
_OURS = frozenset({"__init__.py", "__pycache__"})
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
    # The first that is found answers for the name, wherever it lies; one beside the alias shares its folder.
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
    # Once it is imported its classes are in use: a finder that came later would hand out others beside them.
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
