"""Keys that users' configurations have and that change nothing here, or are refused: read from one data file.

``keys_without_effect.json`` has them by section: what the key was for where it comes from, and either what happens
``instead`` of it, or why it is ``refused`` and the ``fix``. ``in_use`` says which values ask for something: by default
any but the ``default``; "enabled" a section that switches something on; "not empty" any value that is true.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import Annotated, Any, Literal, TypeVar

from pydantic import create_model

from zeropipe.config.fields import AUTO, Count, Dtype, Lowercase, Mark, NoEffect, Real, Refused, Section, key

_TYPES: dict[str, Any] = {
    "any": Any,
    "dtype or null": Dtype | None,
    "list or null": list[str] | None,
    "number": Real,
    "object": dict[str, Any],
    "object or null": dict[str, Any] | None,
    "string or null": str | None,
    "true/false": bool,
    "whole number": Count,
    "whole number or null": Count | None,
}
_LIMITS = ("gt", "ge", "le")
_Model = TypeVar("_Model", bound=type[Section])


def with_keys_without_effect(section: str) -> Callable[[_Model], _Model]:
    """Add to a section's model the keys that the data file has for it; ``""`` is the top level."""

    def extended(model: _Model) -> _Model:
        fields: dict[str, Any] = {name: _field(entry) for name, entry in _table()[section].items()}
        return create_model(  # type: ignore[return-value]
            model.__name__, __base__=model, __doc__=model.__doc__, __module__=model.__module__, **fields
        )

    return extended


@cache
def _table() -> dict[str, dict[str, dict[str, Any]]]:
    return json.loads(resources.files(__package__).joinpath("keys_without_effect.json").read_text("utf-8"))


def _field(entry: dict[str, Any]) -> tuple[Any, Any]:
    kind = entry["type"]
    marked = (
        Annotated[Literal[tuple(kind)], Lowercase, _mark(entry)]  # type: ignore[valid-type]
        if isinstance(kind, list)
        else Annotated[_TYPES[kind], _mark(entry)]
    )
    limits = {name: entry[name] for name in _LIMITS if name in entry}
    return marked, key(entry["default"], entry["was_for"], **limits)


def _mark(entry: dict[str, Any]) -> Mark:
    in_use = _IN_USE[entry["in_use"]] if "in_use" in entry else None
    if "refused" in entry:
        return Refused(entry["refused"], entry["fix"], in_use)
    return NoEffect(entry["instead"], in_use)


def _switched_on(value: object) -> bool:
    """Whether there is any ``"enabled": true`` inside."""
    return isinstance(value, dict) and any(
        (name == "enabled" and inner not in (False, 0, "false", AUTO)) or _switched_on(inner)
        for name, inner in value.items()
    )


def _deep_compiled(value: object) -> bool:
    return isinstance(value, dict) and bool(value.get("deepcompile"))


_IN_USE: dict[str, Callable[[object], bool]] = {
    "enabled": _switched_on,
    "deepcompile": _deep_compiled,
    "not empty": bool,
}
