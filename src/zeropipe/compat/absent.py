"""What stands where a name of DeepSpeed is that zeropipe does not offer: it may be imported, and says so when used.

Many scripts import such a name at the top and use it only where an option asks for it; some inherit from it.
"""

from __future__ import annotations

from typing import Any

from zeropipe.errors import UsageError, describe

ROOT = "deepspeed"


class AbsentError(UsageError, AttributeError):
    """A name of DeepSpeed was used that zeropipe does not offer.

    As an AttributeError it lets ``hasattr`` say no.
    """


class _Absent(type):
    """The class of stand-ins; calls, attributes and items of one raise what ``says`` says."""

    says: str

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise AbsentError(cls.says)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):  # what Python and its tools ask of any object
            raise AttributeError(name)
        raise AbsentError(f"{cls.says} (asked for its {name!r})")

    def __getitem__(cls, key: Any) -> Any:
        raise AbsentError(cls.says)

    def __iter__(cls) -> Any:
        raise AbsentError(cls.says)


def message(path: str, fix: str) -> str:
    """``path``: below deepspeed, as the user wrote it."""
    return describe(f"{ROOT}.{path} is not part of zeropipe, which stands in for deepspeed here", fix=fix)


def stand_in(path: str, fix: str) -> type:
    """A class for the name ``path`` below deepspeed; nothing is an instance of it."""
    name = path.rpartition(".")[2]
    return _Absent(name, (), {"says": message(path, fix), "__module__": f"{ROOT}.{path.rpartition('.')[0]}"})
