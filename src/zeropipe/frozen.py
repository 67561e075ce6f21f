"""JSON of frozen data: a dataclass by its fields and their types, there and back, so that no class spells it out."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from zeropipe.given import Anything, Json


def to_json(value: Anything) -> Any:
    """``value`` in JSON's words: a dataclass as an object, a tuple as a list, anything else as it is."""
    if _is_record(value):
        kind: Any = type(value)
        return {name: to_json(getattr(value, name)) for name in _types(kind)}
    return list(map(to_json, value)) if isinstance(value, tuple) else value


def from_json(kind: Anything, data: Json) -> Any:
    """What ``to_json`` was given, of the type ``kind``. Raises KeyError or TypeError where ``data`` is not of it."""
    if _is_record(kind):
        return kind(**{name: from_json(of, data[name]) for name, of in _types(kind).items()})
    origin: Any = get_origin(kind)
    if origin is tuple:
        return tuple(from_json(get_args(kind)[0], item) for item in data)
    return data


@cache  # a manifest has thousands of records, and each look at the types evaluates every annotation
def _types(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    types = {field.name: hints[field.name] for field in fields(kind) if field.init}
    # Records stand last: who opens the file sees what is short first. (The sort keeps the order among equals.)
    return dict(sorted(types.items(), key=lambda item: any(map(_is_record, (item[1], *get_args(item[1]))))))


def _is_record(value: object) -> bool:
    """A dataclass or an object of one; ``is_dataclass`` would have the type checker take it for only that."""
    return hasattr(value, "__dataclass_fields__")
